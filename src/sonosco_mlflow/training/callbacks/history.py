"""Every recorded metric by step, kept with the trainer."""

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.training.callbacks.base import Callback, is_timing

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer


class _Curve(NamedTuple):
    steps: "array[int]"
    values: "array[float]"


class History(Callback):
    """Keeps what was recorded, for learning curves. Timings are left out: they are no state of the training.

    The curves are as long as the training, and each checkpoint has them whole: they are kept as plain memory, which is
    copied at once.
    """

    def __init__(self) -> None:
        self._curves: dict[str, _Curve] = {}

    def on_metrics(self, trainer: "ModelTrainer", metrics: Mapping[str, float]) -> None:
        """Keep ``metrics`` under the trainer's step."""
        for name, value in metrics.items():
            if not is_timing(name):
                if name not in self._curves:
                    self._curves[name] = _Curve(array("q"), array("d"))
                steps, values = self._curves[name]
                if steps and steps[-1] == trainer.progress.step:
                    # Recorded after the step, by a run that was stopped and continued there: it comes again.
                    values[-1] = value
                    continue
                # First what may be refused: both are to be of one length.
                values.append(value)
                steps.append(trainer.progress.step)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which ``name`` was recorded, and its values.

        Raises:
            UserError: nothing was recorded under ``name``.
        """
        if name not in self._curves:
            raise UserError(f"nothing was recorded under '{name}'; {nearest(name, self._curves)}")
        steps, values = self._curves[name]
        return steps.tolist(), values.tolist()

    def names(self) -> list[str]:
        """The names of all curves, sorted."""
        return sorted(self._curves)

    def state_dict(self) -> dict[str, object]:
        """Return all curves: ``steps`` ``[length]`` int64 and ``values`` ``[length]`` float64."""
        return {
            name: {key: torch.from_numpy(np.array(part)) for key, part in curve._asdict().items()}
            for name, curve in self._curves.items()
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        self._curves = {}
        for name, curve in state.items():
            assert isinstance(curve, dict)
            self._curves[name] = _Curve(array("q", curve["steps"].tolist()), array("d", curve["values"].tolist()))
