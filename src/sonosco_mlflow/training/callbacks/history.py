"""Every recorded metric by step, kept with the trainer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.training.callbacks.base import Callback, is_timing

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer


class History(Callback):
    """Keeps what was recorded, for learning curves. Timings are left out: they are no state of the training."""

    def __init__(self) -> None:
        self._curves: dict[str, dict[str, list[float]]] = {}

    def on_metrics(self, trainer: "ModelTrainer", metrics: Mapping[str, float]) -> None:
        """Keep ``metrics`` under the trainer's step."""
        for name, value in metrics.items():
            if not is_timing(name):
                curve = self._curves.setdefault(name, {"steps": [], "values": []})
                if curve["steps"] and curve["steps"][-1] == trainer.progress.step:
                    # Recorded after the step, by a run that was stopped and continued there: it comes again.
                    curve["values"][-1] = value
                    continue
                curve["steps"].append(trainer.progress.step)
                curve["values"].append(value)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which ``name`` was recorded, and its values.

        Raises:
            UserError: nothing was recorded under ``name``.
        """
        if name not in self._curves:
            raise UserError(f"nothing was recorded under '{name}'; {nearest(name, self._curves)}")
        curve = self._curves[name]
        return [int(step) for step in curve["steps"]], list(curve["values"])

    def names(self) -> list[str]:
        """The names of all curves, sorted."""
        return sorted(self._curves)

    def state_dict(self) -> dict[str, object]:
        """Return all curves."""
        return {
            name: {"steps": list(curve["steps"]), "values": list(curve["values"])}
            for name, curve in self._curves.items()
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        self._curves = {}
        for name, curve in state.items():
            assert isinstance(curve, dict)
            self._curves[name] = {"steps": list(curve["steps"]), "values": list(curve["values"])}
