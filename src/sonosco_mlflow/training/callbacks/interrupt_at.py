"""Stopping a training at a step, for what wants to look at it there."""

import signal
from typing import TYPE_CHECKING

from sonosco_mlflow.training.callbacks.base import Callback

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer


class InterruptAt(Callback, is_part_of_trainer=False):
    """Interrupts the process after an optimizer step, as Ctrl-C does: the state is saved, and knows nothing of it.

    Args:
        step: the optimizer step; a training that stands behind it already is interrupted after its next one.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: "ModelTrainer") -> None:
        """Ask for the interrupt; the trainer obeys it at its next safe point."""
        if trainer.progress.step >= self.step:
            signal.raise_signal(signal.SIGINT)
