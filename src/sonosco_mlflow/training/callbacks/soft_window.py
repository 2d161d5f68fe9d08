"""Soft-window attention for the first epochs, so that attention finds the diagonal."""

from typing import TYPE_CHECKING

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.training.callbacks.base import Callback

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer


class SoftWindow(Callback):
    """Sets ``model.soft_window``: on in the first ``epochs`` epochs, off from then on.

    Hannun et al. 2019 (arXiv 1904.02619) bias the attention towards a diagonal that moves at constant speed, and drop
    the bias once attention has found its way.

    Args:
        epochs: number of epochs with the window.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Refuse a model without soft window.

        Raises:
            UserError: the model has no such switch.
        """
        if not hasattr(trainer.model, "soft_window"):
            raise UserError(
                f"SoftWindow needs a model with an attribute soft_window, {type(trainer.model).__name__} has none; "
                "leave the callback out"
            )

    def on_epoch_begin(self, trainer: "ModelTrainer") -> None:
        """Set the switch for this epoch."""
        trainer.model.soft_window = trainer.progress.epoch < self.epochs  # type: ignore[assignment]
