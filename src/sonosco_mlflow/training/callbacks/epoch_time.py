"""How long an epoch takes, and how long training still will."""

import time
from typing import TYPE_CHECKING

from sonosco_mlflow.training.callbacks.base import Callback

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer


class EpochTimeEstimate(Callback):
    """Records ``epoch_seconds`` at the end of each epoch, and estimates the time left.

    An epoch that a resume entered in its middle is not recorded. Times belong to this process and are no state.
    """

    def __init__(self) -> None:
        self._train_started = time.monotonic()
        self._first_micro_step = 0
        self._epoch_started: float | None = None
        self._batches = 0

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Begin to measure."""
        self._train_started = time.monotonic()
        self._first_micro_step = trainer.progress.micro_step

    def on_epoch_begin(self, trainer: "ModelTrainer") -> None:
        """Count the epoch's batches, and note the time if it is at its beginning."""
        assert trainer.train_loader is not None
        self._batches = trainer.train_loader.batches_in(trainer.progress.epoch)
        self._epoch_started = time.monotonic() if trainer.progress.batch == 0 else None

    def on_epoch_end(self, trainer: "ModelTrainer", epoch: int) -> None:
        """Record the time that ``epoch`` took, its validations included."""
        if self._epoch_started is not None:
            trainer.record({"epoch_seconds": time.monotonic() - self._epoch_started})

    def seconds_left(self, trainer: "ModelTrainer") -> float | None:
        """Return the seconds to the end of the last epoch at the pace so far, or None before the first batch."""
        progress = trainer.progress
        done = progress.micro_step - self._first_micro_step
        if done == 0:
            return None
        # Epochs differ by a few batches at most; counting those of each to come would cost more than it tells.
        left = (trainer.epochs - progress.epoch) * self._batches - progress.batch
        return (time.monotonic() - self._train_started) / done * left
