"""Means of the weights, which the model has when it is evaluated and when it has been trained."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.training.averaging import floating, mean_weights
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.model_checkpoint import ModelCheckpoint
from sonosco_mlflow.training.optimizer import placed_as

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer

Which = Literal["last", "best"]


def are_known(callbacks: Iterable[Callback]) -> bool:
    """Return whether :func:`.averaging.evaluated_state` finds in a checkpoint what its step's metrics are of.

    It does not where a class of the user's has its own ``evaluated_weights``: in which part of its state they are, if
    they are in it at all, that class alone knows.
    """
    own = Callback.evaluated_weights
    return all(
        type(callback) in (ExponentialAverage, CheckpointAverage) or type(callback).evaluated_weights is own
        for callback in callbacks
    )


class ExponentialAverage(Callback):
    """Averages the weights of all steps, the newest the most: ``average = decay * average + (1 - decay) * weights``.

    Validations, and the final model, are of the average. In the beginning the decay is smaller, ``(1 + step) / (10 +
    step)``, or the average would be of weights that had learned nothing yet.

    Args:
        decay: in (0, 1); the average reaches back about ``1 / (1 - decay)`` steps.

    Raises:
        UserError: ``decay`` is out of its range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"the decay of ExponentialAverage is {decay}, expected one between 0 and 1")
        self.decay = decay
        self._average: dict[str, Tensor] = {}

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Begin with the weights as they are, or go on with an average that was loaded, on the trainer's device."""
        own = floating(trainer.model)
        self._average = {name: placed_as(tensor, self._average.get(name, tensor)) for name, tensor in own.items()}

    def on_step_end(self, trainer: "ModelTrainer") -> None:
        """Take the new weights into the average."""
        step = trainer.progress.step
        decay = min(self.decay, (1 + step) / (10 + step))
        own = floating(trainer.model)
        with torch.no_grad():
            for name, average in self._average.items():
                average.lerp_(own[name], 1 - decay)

    def evaluated_weights(self, trainer: "ModelTrainer") -> Mapping[str, Tensor] | None:
        """Return the average; before the first training there is none."""
        return self._average or None

    def state_dict(self) -> dict[str, object]:
        """Return the average by parameter and buffer."""
        return {"average": dict(self._average)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        average = state["average"]
        assert isinstance(average, dict)
        self._average = {name: tensor.clone() for name, tensor in average.items()}


class CheckpointAverage(Callback):
    """Makes the mean of several checkpoints the final model (Vaswani et al. 2017, section 6.1).

    Of those on ModelCheckpoint's schedule; fewer than ``count`` where training had no more. The trainer itself stays at
    its own last weights, from which it can be given more epochs.

    Args:
        which: the ``last`` ones, or the ``best`` by what ModelCheckpoint monitors.
        count: how many; ModelCheckpoint must keep as many.

    Raises:
        UserError: there is no such choice, or ``count`` is below 1.
    """

    def __init__(self, which: Which = "last", count: int = 5) -> None:
        if which not in get_args(Which):
            raise UserError(f"which is {which!r}, expected one of {', '.join(get_args(Which))}")
        if count < 1:
            raise UserError(f"count is {count}, expected at least 1 checkpoint")
        self.which = which
        self.count = count
        self._mean: tuple[list[int], dict[str, Tensor]] = ([], {})

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Refuse a trainer whose checkpoints will not be there at the end.

        Raises:
            UserError: ModelCheckpoint is missing, or keeps too few; the message says what to change.
        """
        self._mean = ([], {})
        kept = self._checkpoints(trainer)
        option = f"keep_{self.which}"
        if getattr(kept, option) < self.count:
            raise UserError(
                f"CheckpointAverage needs {self.count} checkpoints, and ModelCheckpoint keeps {getattr(kept, option)}; "
                f"set {option} to at least {self.count}"
            )
        if self.which == "best" and trainer.val_loader is None:
            raise UserError("CheckpointAverage('best') ranks by validations; give the ModelTrainer a val_loader")
        if self.which == "last" and kept.every_epochs is None and kept.every_steps is None:
            raise UserError("CheckpointAverage needs checkpoints on a schedule; set every_epochs or every_steps")

    def evaluated_weights(self, trainer: "ModelTrainer") -> Mapping[str, Tensor] | None:
        """Return the mean once training has come to its end; None before.

        Raises:
            UserError: a checkpoint is missing or broken.
        """
        # Within its last step the trainer is finished too, and validates its own weights once more.
        if not (trainer.finished and trainer.at_safe_point):
            return None
        kept = self._checkpoints(trainer)
        choose: Callable[[int], list[int]] = kept.best_steps if self.which == "best" else kept.last_steps
        steps = sorted(choose(self.count))
        if steps != self._mean[0]:
            self._mean = (steps, mean_weights(kept.model_state(step) for step in steps))
        return self._mean[1] or None

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Forget the mean of another training; there is no state of its own."""
        self._mean = ([], {})

    def _checkpoints(self, trainer: "ModelTrainer") -> ModelCheckpoint:
        found = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
        if not found:
            raise UserError(
                "CheckpointAverage needs the checkpoints of a ModelCheckpoint; add one as the last callback"
            )
        return found[0]
