"""The size of each layer's gradient: which layers learn, which have died, which explode."""

import re
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sonosco_mlflow.errors import require_positive
from sonosco_mlflow.training.callbacks.base import Callback

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer


class LayerGradientNorms(Callback):
    """Records ``gradient_norm/<layer>``, the 2-norm over a layer's parameters before clipping.

    A layer is a module that owns parameters itself, by its dotted name.

    Args:
        every_steps: optimizer steps between two recordings.

    Raises:
        UserError: ``every_steps`` is below 1.
    """

    def __init__(self, every_steps: int = 50) -> None:
        require_positive(type(self).__name__, every_steps=every_steps)
        self.every_steps = every_steps
        self._norms: dict[str, float] = {}

    def on_gradients(self, trainer: "ModelTrainer") -> None:
        """Measure, while the gradients stand, what :meth:`on_step_end` records under the step's number."""
        if (trainer.progress.step + 1) % self.every_steps == 0:
            self._norms = layer_gradient_norms(trainer.model)

    def on_step_end(self, trainer: "ModelTrainer") -> None:
        """Record what was measured."""
        if self._norms:
            trainer.record({f"gradient_norm/{layer}": norm for layer, norm in self._norms.items()})
            self._norms = {}


def layer_gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the gradient's 2-norm of each layer that has one, by names that a tracking store takes."""
    norms: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layer = name.rpartition(".")[0] or name
            norms[re.sub(r"[^\w\-. :/]", "_", layer)].append(torch.linalg.vector_norm(parameter.grad))
    if not norms:
        return {}
    # One transfer from the device for all layers.
    values = torch.stack([torch.linalg.vector_norm(torch.stack(parts)) for parts in norms.values()]).tolist()
    return dict(zip(norms, values, strict=True))
