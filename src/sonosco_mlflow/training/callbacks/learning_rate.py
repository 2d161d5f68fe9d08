"""How the learning rate moves: warm-up, and reductions down to a floor.

Each callback gives a factor on the base learning rate; the factors of all of them multiply. Where a factor follows
from the position alone, there is no state to keep.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.monitor import Patience

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer
    from sonosco_mlflow.training.validation import Validation


class LinearWarmUp(Callback):
    """Raises the learning rate in equal steps: at step ``i`` of ``steps`` it is ``i / steps`` of the base.

    Args:
        steps: optimizer steps of warm-up; 0 is none.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def learning_rate_factor(self, trainer: "ModelTrainer") -> float:
        """Return the share of the base learning rate, in (0, 1]."""
        return min(1.0, (trainer.progress.step + 1) / max(1, self.steps))


class LearningRateReduction(Callback):
    """Base of the reductions: ``factor`` to the power of how often it was reduced, never below ``floor``.

    Args:
        factor: in (0, 1); what one reduction multiplies the learning rate by.
        floor: a learning rate, not a factor. It bounds the reduction from below and never raises the rate above the
            base.

    Raises:
        UserError: ``factor`` or ``floor`` is out of its range.
    """

    def __init__(self, factor: float, floor: float) -> None:
        if not 0 < factor < 1:
            raise UserError(f"the factor of {type(self).__name__} is {factor}, expected one between 0 and 1")
        if floor < 0:
            raise UserError(f"the floor of {type(self).__name__} is {floor}, expected a learning rate of 0 or more")
        self.factor = factor
        self.floor = floor

    @abstractmethod
    def reductions(self, trainer: "ModelTrainer") -> int:
        """Return how often the learning rate is reduced by now."""

    def learning_rate_factor(self, trainer: "ModelTrainer") -> float:
        """Return the factor on the base learning rate, in (0, 1]."""
        base: float = trainer.optimizer_recipe.groups[0]["lr"]
        return max(self.factor ** self.reductions(trainer), min(1.0, self.floor / base))


class StepwiseLearningRateReduction(LearningRateReduction):
    """Reduces the learning rate each time that another ``every_epochs`` epochs are done."""

    def __init__(self, every_epochs: int, factor: float = 0.5, floor: float = 0.0) -> None:
        super().__init__(factor, floor)
        self.every_epochs = every_epochs

    def reductions(self, trainer: "ModelTrainer") -> int:
        """Return the number of whole periods done."""
        return trainer.progress.epoch // self.every_epochs


class ScheduledLearningRateReduction(LearningRateReduction):
    """Reduces the learning rate once each of the numbers in ``epochs`` of epochs is done."""

    def __init__(self, epochs: list[int], factor: float = 0.5, floor: float = 0.0) -> None:
        super().__init__(factor, floor)
        self.epochs = epochs

    def reductions(self, trainer: "ModelTrainer") -> int:
        """Return how many of the listed epochs are done."""
        return sum(epoch <= trainer.progress.epoch for epoch in self.epochs)


class PlateauLearningRateReduction(LearningRateReduction):
    """Reduces the learning rate after ``patience`` validations in a row without a better value (lower is better)."""

    def __init__(self, patience: int = 2, factor: float = 0.5, floor: float = 0.0, monitor: str = "val_loss") -> None:
        super().__init__(factor, floor)
        self._patience = Patience(patience, monitor)
        self._reductions = 0

    def on_validation_end(self, trainer: "ModelTrainer", validation: "Validation") -> None:
        """Reduce, and have patience anew, where it has come to its end."""
        if self._patience.exhausted_by(validation):
            self._reductions += 1
            self._patience.without_improvement = 0

    def reductions(self, trainer: "ModelTrainer") -> int:
        """Return how often patience came to its end."""
        return self._reductions

    def state_dict(self) -> dict[str, object]:
        """Return the number of reductions, the best value and the count of validations since."""
        return {"reductions": self._reductions, "patience": self._patience.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        reductions, patience = state["reductions"], state["patience"]
        assert isinstance(reductions, int)
        assert isinstance(patience, dict)
        self._reductions = reductions
        self._patience.load_state_dict(patience)
