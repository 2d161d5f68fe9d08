"""How the learning rate moves: warm-up, and from there down to a floor.

Each callback gives a factor on the base learning rate; the factors of all of them multiply. Where a factor follows
from the position alone, there is no state to keep.
"""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from sonosco_mlflow.errors import UserError, require_positive
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


class LearningRateDecay(Callback):
    """Base of what lowers the learning rate to a share of its base, never below ``floor``.

    Args:
        floor: a learning rate, not a share. It bounds the decay from below and never raises the rate above the base.

    Raises:
        UserError: ``floor`` is below 0.
    """

    def __init__(self, floor: float = 0.0) -> None:
        if floor < 0:
            raise UserError(f"the floor of {type(self).__name__} is {floor}, expected a learning rate of 0 or more")
        self.floor = floor

    @abstractmethod
    def share(self, trainer: "ModelTrainer") -> float:
        """Return the share of the base learning rate at the coming step, in [0, 1]."""

    def lowest_share(self, trainer: "ModelTrainer") -> float:
        """Return the share of the base learning rate that ``floor`` is."""
        base: float = trainer.optimizer_recipe.groups[0]["lr"]
        return min(1.0, self.floor / base)

    def learning_rate_factor(self, trainer: "ModelTrainer") -> float:
        """Return the factor on the base learning rate, in [0, 1]."""
        return max(self.share(trainer), self.lowest_share(trainer))


class InverseSquareRootDecay(LearningRateDecay):
    """Lowers the learning rate as 1 / sqrt(step) after warm-up (Vaswani et al. 2017, section 5.3).

    With :class:`LinearWarmUp` of as many steps the rate rises to the base at step ``warmup_steps`` and falls from
    there; the paper's own base is ``1 / sqrt(model size * warmup_steps)``.

    Args:
        warmup_steps: at this step the share is 1, and at four times this step 1/2; 0 is as 1.
        floor: as in :class:`LearningRateDecay`.
    """

    def __init__(self, warmup_steps: int, floor: float = 0.0) -> None:
        super().__init__(floor)
        self.warmup_steps = warmup_steps

    def share(self, trainer: "ModelTrainer") -> float:
        """Return the share of the base learning rate, in (0, 1]."""
        start = max(1, self.warmup_steps)
        return math.sqrt(start / max(start, trainer.progress.step + 1))


class CosineDecay(LearningRateDecay):
    """Lowers the learning rate along half a cosine from base to floor (Loshchilov and Hutter 2017, equation 5).

    It begins after warm-up and ends with the last step of all epochs. So it follows the number of epochs from the
    start: a run that trained with it cannot be given more of them.

    Args:
        warmup_steps: steps at the base rate before it begins; :class:`LinearWarmUp` may raise it meanwhile.
        floor: as in :class:`LearningRateDecay`.
    """

    follows_total_epochs: ClassVar[bool] = True

    def __init__(self, warmup_steps: int = 0, floor: float = 0.0) -> None:
        super().__init__(floor)
        self.warmup_steps = warmup_steps
        self._total: tuple[int, int] = (0, 0)

    def share(self, trainer: "ModelTrainer") -> float:
        """Return the share of the base learning rate, in [0, 1]."""
        done = max(0, trainer.progress.step - self.warmup_steps)
        all_of_them = max(1, self._total_steps(trainer) - self.warmup_steps)
        lowest = self.lowest_share(trainer)
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * min(1.0, done / all_of_them))) / 2

    def _total_steps(self, trainer: "ModelTrainer") -> int:
        # Each epoch has batches of its own, and so a number of steps of its own.
        if self._total[0] != trainer.epochs:
            assert trainer.train_loader is not None
            batches = map(trainer.train_loader.batches_in, range(trainer.epochs))
            self._total = (trainer.epochs, sum(-(-count // trainer.accumulation) for count in batches))
        return self._total[1]


class LearningRateReduction(LearningRateDecay):
    """Base of the reductions: ``factor`` to the power of how often it was reduced, never below ``floor``.

    Args:
        factor: in (0, 1); what one reduction multiplies the learning rate by.
        floor: as in :class:`LearningRateDecay`.

    Raises:
        UserError: ``factor`` or ``floor`` is out of its range.
    """

    def __init__(self, factor: float, floor: float) -> None:
        if not 0 < factor < 1:
            raise UserError(f"the factor of {type(self).__name__} is {factor}, expected one between 0 and 1")
        super().__init__(floor)
        self.factor = factor

    @abstractmethod
    def reductions(self, trainer: "ModelTrainer") -> int:
        """Return how often the learning rate is reduced by now."""

    def share(self, trainer: "ModelTrainer") -> float:
        """Return the share of the base learning rate, in (0, 1]."""
        return self.factor ** self.reductions(trainer)


class StepwiseLearningRateReduction(LearningRateReduction):
    """Reduces the learning rate each time that another ``every_epochs`` epochs are done."""

    def __init__(self, every_epochs: int, factor: float = 0.5, floor: float = 0.0) -> None:
        super().__init__(factor, floor)
        require_positive(type(self).__name__, every_epochs=every_epochs)
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
