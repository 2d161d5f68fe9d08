"""What the model writes beside what was said, as tables to read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.metrics import word_error_rate
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.inspection import undisturbed

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer
    from sonosco_mlflow.training.validation import Validation


def comparison_table(ids: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> str:
    """Return a Markdown table: one row an utterance, its texts and its word error rate."""
    rows = ["| utterance | reference | hypothesis | WER |", "|---|---|---|---:|"]
    for cells in zip(ids, references, hypotheses, strict=True):
        utterance, reference, hypothesis = (cell.replace("|", "\\|") for cell in cells)
        rate = word_error_rate([cells[1]], [cells[2]])
        rows.append(f"| {utterance} | {reference} | {hypothesis} | {100 * rate:.1f} % |")
    return "\n".join(rows) + "\n"


class TextComparison(Callback):
    """Records ``text_comparison`` at each validation: decoded utterances beside their references.

    The same utterances each time, spread evenly over the validation set (which is ordered by length).

    Args:
        samples: number of utterances.
    """

    def __init__(self, samples: int = 5) -> None:
        self.samples = samples

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Refuse a trainer that decodes nothing.

        Raises:
            UserError: it has no decoder.
        """
        if trainer.decoder is None:
            raise UserError("TextComparison needs hypotheses; give the ModelTrainer a decoder or a model that decodes")

    def on_validation_end(self, trainer: "ModelTrainer", validation: "Validation") -> None:
        """Record the table."""
        count = len(validation.ids)
        chosen = sorted({i * count // self.samples for i in range(self.samples)})
        columns = (validation.ids, validation.references, validation.hypotheses)
        trainer.record_text("text_comparison", comparison_table(*([column[i] for i in chosen] for column in columns)))


class TeacherForcedTextComparison(Callback):
    """Records ``teacher_forced_text_comparison``: the best next token after each prefix of the *reference*.

    Beside :class:`TextComparison` it tells errors of the model from errors that accumulate in decoding.

    Args:
        samples: number of utterances, the first of the validation loader.
    """

    def __init__(self, samples: int = 5) -> None:
        self.samples = samples

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Refuse a model that knows no teacher forcing.

        Raises:
            UserError: it has no method ``teacher_forced``.
        """
        if not hasattr(trainer.model, "teacher_forced"):
            raise UserError(
                f"TeacherForcedTextComparison needs a model with teacher_forced(output), "
                f"{type(trainer.model).__name__} has none; leave the callback out"
            )

    def on_validation_end(self, trainer: "ModelTrainer", validation: "Validation") -> None:
        """Run the model on the first batches and record the table."""
        loader = trainer.val_loader
        assert loader is not None
        hypotheses: list[str] = []
        with trainer.evaluated_weights(), undisturbed(trainer.model):
            for batch in loader:
                output = trainer.model(batch.to(trainer.device))
                hypotheses += map(loader.tokenizer.decode, trainer.model.teacher_forced(output))  # type: ignore[operator]
                if len(hypotheses) >= self.samples:
                    break
        shown = slice(min(self.samples, len(hypotheses)))
        table = comparison_table(validation.ids[shown], validation.references[shown], hypotheses[shown])
        trainer.record_text("teacher_forced_text_comparison", table)
