"""Where a training stands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from sonosco_mlflow.errors import whole_number


@dataclass
class Progress:
    """Where training stands; ``epoch`` and ``batch`` name the next batch to train on."""

    epoch: int = 0
    batch: int = 0
    micro_step: int = 0
    step: int = 0
    utterances: int = 0
    frames: int = 0

    @classmethod
    def of_state(cls, state: Mapping[str, object]) -> Self:
        """Return what a trainer's state says.

        Raises:
            UserError: one of the numbers is none.
        """
        return cls(**{name: whole_number(number, f"trainer/progress/{name}") for name, number in state.items()})
