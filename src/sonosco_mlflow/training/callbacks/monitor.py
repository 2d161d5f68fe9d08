"""Watching one metric of the validations: what it is now, and how long it has not improved."""

from typing import TYPE_CHECKING

from sonosco_mlflow.errors import UserError, nearest

if TYPE_CHECKING:
    from sonosco_mlflow.training.validation import Validation


def monitored(validation: "Validation", name: str) -> float:
    """Return the metric ``name`` of ``validation``.

    Raises:
        UserError: there is no such metric; the message gives the nearest one.
    """
    if name not in validation.metrics:
        raise UserError(f"monitor is '{name}', which no validation gives; {nearest(name, validation.metrics)}")
    return validation.metrics[name]


class Patience:
    """Counts validations in a row that did not improve on the best one. Lower is better; NaN never improves.

    Args:
        patience: how many of them exhaust it.
        monitor: name of the metric.
        minimum_change: by how much a value must be below the best to count as better.

    Raises:
        UserError: ``patience`` is below 1.
    """

    def __init__(self, patience: int, monitor: str, minimum_change: float = 0.0) -> None:
        if patience < 1:
            raise UserError(f"patience is {patience}, expected at least 1 validation")
        self.patience = patience
        self.monitor = monitor
        self.minimum_change = minimum_change
        self.best = float("inf")
        self.without_improvement = 0

    def exhausted_by(self, validation: "Validation") -> bool:
        """Take ``validation`` into account and return whether patience has come to its end."""
        value = monitored(validation, self.monitor)
        if value < self.best - self.minimum_change:
            self.best = value
            self.without_improvement = 0
        else:
            self.without_improvement += 1
        return self.without_improvement >= self.patience

    def state_dict(self) -> dict[str, object]:
        """Return the best value and the count."""
        return {"best": self.best, "without_improvement": self.without_improvement}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        vars(self).update(state)
