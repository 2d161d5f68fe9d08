"""Stop when validations no longer improve."""

from typing import TYPE_CHECKING

from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.monitor import Patience

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer
    from sonosco_mlflow.training.validation import Validation


class EarlyStopping(Callback):
    """Ends training after ``patience`` validations in a row without a better value (lower is better).

    Args:
        patience: in validations, at least 1.
        monitor: a metric of the validation.
        minimum_change: by how much a value must fall to count as better.
    """

    def __init__(self, patience: int = 3, monitor: str = "val_loss", minimum_change: float = 0.0) -> None:
        self._patience = Patience(patience, monitor, minimum_change)

    def on_validation_end(self, trainer: "ModelTrainer", validation: "Validation") -> None:
        """Stop the training where patience has come to its end."""
        patience = self._patience
        if patience.exhausted_by(validation):
            trainer.stop_training(
                f"{patience.monitor} has not improved on {patience.best:.6g} "
                f"for {patience.without_improvement} validations"
            )

    def state_dict(self) -> dict[str, object]:
        """Return the best value and the count of validations since."""
        return self._patience.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        self._patience.load_state_dict(state)
