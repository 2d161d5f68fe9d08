"""Callback: what may happen beside the training loop.

A callback is any subclass that overrides some of the events below; its constructor parameters and its
``state_dict`` are kept in every checkpoint. Events of one step come in this order: ``on_gradients``,
``on_step_end``, ``on_metrics``; then, where due, ``on_validation_end`` and ``on_epoch_end``; and at last
``on_safe_point``, when the whole state is consistent and may be saved.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from sonosco_mlflow.serialization.parameters import serializable

if TYPE_CHECKING:
    from torch import Tensor

    from sonosco_mlflow.training.trainer import ModelTrainer
    from sonosco_mlflow.training.validation import Validation


STEP_METRICS = ("train_loss", "learning_rate", "gradient_norm", "utterances_per_second")
"""What is recorded at each optimizer step."""
EPOCH_METRICS = ("padding_share",)
"""What is recorded at the last optimizer step of an epoch: the share of its frames that were padding."""


def is_timing(name: str) -> bool:
    """Return whether a metric of that name is of the clock: a repeated run does not repeat it, and it is no state."""
    return name.endswith(("_seconds", "_per_second"))


class Callback:
    """Base of all callbacks; every event does nothing unless overridden.

    Attributes:
        follows_total_epochs: whether what it does depends on ``trainer.epochs``. A finished run with such a callback
            cannot be given more epochs: it would have taken another way from the start.
    """

    follows_total_epochs: ClassVar[bool] = False

    def __init_subclass__(cls, is_part_of_trainer: bool = True) -> None:
        """Let documents name the class, unless it only ever observes: then nothing may ask for it by name."""
        super().__init_subclass__()
        if is_part_of_trainer:
            serializable(cls)

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Training starts, or continues after a resume; what is recorded here is recorded by each of them."""

    def on_epoch_begin(self, trainer: "ModelTrainer") -> None:
        """``trainer.progress.epoch`` starts, or is entered again by a resume in its middle."""

    def on_gradients(self, trainer: "ModelTrainer") -> None:
        """The gradients of an optimizer step stand complete and unclipped in ``parameter.grad``."""

    def on_step_end(self, trainer: "ModelTrainer") -> None:
        """The optimizer made step number ``trainer.progress.step``."""

    def on_metrics(self, trainer: "ModelTrainer", metrics: Mapping[str, float]) -> None:
        """``metrics`` were recorded at ``trainer.progress.step``."""

    def on_text(self, trainer: "ModelTrainer", name: str, text: str) -> None:
        """A text (Markdown) was recorded under ``name`` at ``trainer.progress.step``."""

    def on_validation_end(self, trainer: "ModelTrainer", validation: "Validation") -> None:
        """The validation set was evaluated."""

    def on_epoch_end(self, trainer: "ModelTrainer", epoch: int) -> None:
        """``epoch`` ended; ``trainer.progress`` stands at the beginning of the next."""

    def on_safe_point(self, trainer: "ModelTrainer") -> None:
        """The state is consistent: this is where it may be saved."""

    def on_train_end(self, trainer: "ModelTrainer") -> None:
        """Training ended: all epochs are done, or a callback asked to stop."""

    def on_exception(self, trainer: "ModelTrainer", error: BaseException) -> None:
        """Training ends by ``error`` (or an interrupt) and without :meth:`on_train_end`: let go of what is held."""

    def learning_rate_factor(self, trainer: "ModelTrainer") -> float:
        """Return what the base learning rate is multiplied by at the coming step.

        The factors of all callbacks multiply, so that warm-up and reduction need not know of each other.
        """
        return 1.0

    def evaluated_weights(self, trainer: "ModelTrainer") -> "Mapping[str, Tensor] | None":
        """Return other weights for the model while it is evaluated, by parameter and buffer; None leaves its own.

        Where a class of yours gives some, a run's checkpoints are no models of their own in MLflow: they would be shown
        with metrics of weights that they may not hold.
        """
        return None

    def state_dict(self) -> dict[str, object]:
        """Return what changes while training, as a tree of plain data (:mod:`sonosco_mlflow.serialization.state`)."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        for name, value in state.items():
            setattr(self, name, value)
