"""Ranges of models' settings, refused by their names."""

from collections.abc import Sequence

from sonosco_mlflow.errors import UserError


def require_shares(**settings: float) -> None:
    """Return if each of ``settings`` lies between 0 and 1.

    Raises:
        UserError: one does not.
    """
    for name, value in settings.items():
        if not 0.0 <= value <= 1.0:
            raise UserError(f"model.settings.{name} is {value}, expected a share from 0 to 1")


def require_positive(**settings: float | Sequence[float]) -> None:
    """Return if each of ``settings``, or each of its numbers, is above 0.

    Raises:
        UserError: one is not.
    """
    for name, value in settings.items():
        numbers = [value] if isinstance(value, int | float) else list(value)
        if not all(number > 0 for number in numbers):
            found, expected = (value, "a number") if isinstance(value, int | float) else (numbers, "numbers")
            raise UserError(f"model.settings.{name} is {found}, expected {expected} above 0")
