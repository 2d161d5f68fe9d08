"""Calling the callbacks of a trainer: its own in their order, then those that observe it."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.training.callbacks.base import Callback

if TYPE_CHECKING:
    from torch import Tensor

    from sonosco_mlflow.training.trainer import ModelTrainer


def emit(trainer: "ModelTrainer", event: str, *arguments: object) -> None:
    """Call ``event`` of every callback, the trainer's own before those that observe it."""
    tell_callbacks(trainer, event, *arguments)
    tell_observers(trainer, event, *arguments)


def tell_callbacks(trainer: "ModelTrainer", event: str, *arguments: object) -> None:
    """Call ``event`` of the trainer's own callbacks.

    What one of them raises before the safe point becomes ``trainer.failure`` and is raised there: the others are to see
    the whole step, so that the state lacks nothing but what this one missed. Between two micro-steps it is raised at
    once.
    """
    for callback in trainer.callbacks:
        try:
            getattr(callback, event)(trainer, *arguments)
        except Exception as error:
            if trainer.at_safe_point:
                raise
            trainer.failure = trainer.failure or error


def tell_observers(trainer: "ModelTrainer", event: str, *arguments: object) -> None:
    """Call ``event`` of those that observe the trainer; what one raises is raised at once."""
    for observer in trainer.observers:
        getattr(observer, event)(trainer, *arguments)


def emit_exception(trainer: "ModelTrainer", error: BaseException) -> None:
    """Tell every callback of ``error``; what one of them raises is noted on it and hides it from none."""
    for callback in (*trainer.callbacks, *trainer.observers):
        try:
            callback.on_exception(trainer, error)
        except Exception as second:
            if second is error:
                continue
            error.add_note(f"after it, {type(callback).__name__} failed as well: {second!r}")


def learning_rate_factor(trainer: "ModelTrainer") -> float:
    """Return the product of what all callbacks answer."""
    return math.prod(callback.learning_rate_factor(trainer) for callback in (*trainer.callbacks, *trainer.observers))


def evaluated_weights(trainer: "ModelTrainer") -> "Mapping[str, Tensor] | None":
    """Return the weights that the callbacks want the model evaluated with, or None for its own.

    Raises:
        UserError: two of them want it.
    """
    wanted = [(type(callback).__name__, callback.evaluated_weights(trainer)) for callback in trainer.callbacks]
    given = [(name, weights) for name, weights in wanted if weights is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(name for name, _ in given)} both average the weights; leave one of them out")
    return given[0][1] if given else None


def callbacks_state(callbacks: Sequence[Callback]) -> dict[str, object]:
    """Return the state of each callback by its name."""
    return {name: callback.state_dict() for name, callback in _named(callbacks).items()}


def load_callbacks_state(callbacks: Sequence[Callback], state: Mapping[str, Any]) -> None:
    """Put back what :func:`callbacks_state` returned.

    Raises:
        UserError: it is of other callbacks.
    """
    named = _named(callbacks)
    if named.keys() != state.keys():
        raise UserError(f"the state is for the callbacks {sorted(state)}, the trainer has {sorted(named)}")
    for name, callback in named.items():
        callback.load_state_dict(state[name])


def _named(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Return the callbacks by name: their class's, with a number where there are several of one class."""
    named: dict[str, Callback] = {}
    for callback in callbacks:
        name = type(callback).__name__
        same = sum(other == name or other.startswith(name + "-") for other in named)
        named[f"{name}-{same + 1}" if same else name] = callback
    return named
