"""When the state is saved, and which checkpoints are kept.

What is kept follows from the state alone, and a checkpoint's own state already counts it: a run that continues from
it keeps and removes the same directories as one that was never stopped.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import checkpoint_name, read_checkpoint, remove_leftovers
from sonosco_mlflow.serialization.durable import remove_directory
from sonosco_mlflow.serialization.serializer import Serializer
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.monitor import monitored

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer
    from sonosco_mlflow.training.validation import Validation


class ModelCheckpoint(Callback):
    """Saves the trainer: at the end of each epoch, when training stops, when a validation ranks, and as asked.

    Kept are the last ``keep_last`` checkpoints and the best ``keep_best``; another is removed only after the newer one
    has been read back and verified. It comes last among the callbacks, so that what it saves is what they decided.

    Args:
        directory: folder of this run's checkpoints.
        every_steps: save also every so many optimizer steps.
        every_minutes: save also at the first step after so many minutes.
        keep_last: at least 2, so that a broken newest one costs little.
        keep_best: checkpoints of the lowest ``monitor``.
        monitor: a metric of the validation.

    Attributes:
        serializer: writes the trainer's objects.
        listeners: called with the directory of each checkpoint once it is verified.
        digests: written into each checkpoint's manifest, of what the state belongs to.

    Raises:
        UserError: ``keep_last`` is below 2.
    """

    def __init__(
        self,
        directory: str | Path,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep_last: int = 2,
        keep_best: int = 1,
        monitor: str = "val_loss",
    ) -> None:
        if keep_last < 2:
            raise UserError(f"keep_last is {keep_last}, expected at least 2: the newest checkpoint may be broken")
        self.directory = Path(directory)
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.monitor = monitor
        self.serializer = Serializer()
        self.listeners: list[Callable[[Path], None]] = []
        self.digests: dict[str, str] = {}
        self._kept: list[int] = []
        self._dropped: list[int] = []
        self._scores: dict[int, float] = {}
        self._saved_at = time.monotonic()
        self._saved_micro_step: int | None = None

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Finish what a crash left undone, and start the clock.

        Raises:
            UserError: this is not the trainer's last callback, or the trainer cannot be written down.
        """
        if not trainer.callbacks or trainer.callbacks[-1] is not self:
            raise UserError(
                "ModelCheckpoint must be the last of the trainer's callbacks, or it would save a state that the others "
                "are still changing; put it at the end of callbacks=[...]"
            )
        # Refused now rather than at the first checkpoint, hours later.
        self.serializer.describe(trainer)
        if "model" in trainer.external_parameters:
            warnings.warn(
                f"the parameters of {type(trainer.model).__name__} are not known: checkpoints keep its state, but "
                "deserialize needs the model itself as model=...; @serializable on its class makes it known",
                stacklevel=2,
            )
        remove_leftovers(self.directory)
        self._remove_dropped()
        self._saved_at = time.monotonic()

    def on_validation_end(self, trainer: "ModelTrainer", validation: "Validation") -> None:
        """Note what the current step is worth."""
        self._scores[trainer.progress.step] = monitored(validation, self.monitor)

    def on_safe_point(self, trainer: "ModelTrainer") -> None:
        """Save if it is time to; between two optimizer steps only, so that a step is saved once."""
        if trainer.progress.batch % trainer.accumulation == 0 and self._is_due(trainer):
            self.save(trainer)

    def save(self, trainer: "ModelTrainer") -> Path:
        """Save now, whatever the schedule, and return the checkpoint's directory.

        In the middle of an accumulation this replaces the checkpoint of the same optimizer step.

        Raises:
            BrokenCheckpointError: what was read back is not what was written; nothing older was removed.
        """
        progress = trainer.progress
        path = self.directory / checkpoint_name(progress.step)
        if self._saved_micro_step == progress.micro_step:
            return path
        self._count(progress.step)
        self.serializer.serialize(trainer, self.directory, step=progress.step, digests=self.digests)
        read_checkpoint(path)
        self._saved_micro_step = progress.micro_step
        self._saved_at = time.monotonic()
        self._remove_dropped()
        for listener in self.listeners:
            listener(path)
        return path

    def state_dict(self) -> dict[str, object]:
        """Return which steps are kept, which the newest of them made superfluous, and what they are worth."""
        return {"kept": list(self._kept), "dropped": list(self._dropped), "scores": dict(self._scores)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        kept, dropped, scores = state["kept"], state["dropped"], state["scores"]
        assert isinstance(kept, list)
        assert isinstance(dropped, list)
        assert isinstance(scores, dict)
        self._kept, self._dropped, self._scores = list(kept), list(dropped), dict(scores)
        self._saved_micro_step = None

    def _is_due(self, trainer: "ModelTrainer") -> bool:
        step = trainer.progress.step
        return (
            trainer.progress.batch == 0
            or trainer.finished
            or (self.every_steps is not None and step % self.every_steps == 0)
            or (self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes)
            or step in self._best([*self._kept, step])
        )

    def _best(self, steps: Iterable[int]) -> list[int]:
        # NaN sorts nowhere: it is worth less than any number. Of equals the earlier is better.
        scored = [
            (score if score == score else float("inf"), step)
            for step in steps
            if (score := self._scores.get(step)) is not None
        ]
        return [step for _, step in sorted(scored)[: self.keep_best]]

    def _count(self, step: int) -> None:
        known = sorted({*self._kept, step})
        kept = {*known[-self.keep_last :], *self._best(known)}
        self._kept = sorted(kept)
        self._dropped = [other for other in known if other not in kept]
        self._scores = {other: score for other, score in self._scores.items() if other in kept}

    def _remove_dropped(self) -> None:
        for step in self._dropped:
            directory = self.directory / checkpoint_name(step)
            if directory.exists():
                remove_directory(directory)
