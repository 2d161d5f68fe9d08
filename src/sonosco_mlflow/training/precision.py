"""What forward passes compute in: float32, or 16 bits where the hardware has units for them.

Weights, gradients, an optimizer's moments and every evaluation stay in float32; torch's autocast chooses which
operations run in 16 bits. float16 has so few exponents that small gradients would vanish, so the loss is scaled up
before the backward pass, by as much as the gradients bear (Micikevicius et al. 2018, section 3.2).

>>> Precision("float32", torch.device("cpu")).used
'float32'
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from sonosco_mlflow.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Without these a processor computes in float32 and rounds: 10 to 37 times slower, where that was measured. AVX-512
# alone is as fast in float16 as in float32, and torch has no recurrent layers for it.
_UNITS = {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("amx_fp16",)}
# From these on a GPU multiplies matrices in it: Ampere and Volta.
_CAPABILITY = {"bfloat16": (8, 0), "float16": (7, 0)}


class Precision:
    """Runs forward and backward passes of one trainer in what its device has units for.

    Args:
        wanted: ``float32``, ``bfloat16`` or ``float16``; refused with a warning where it would only cost.
        device: where the model trains.

    Attributes:
        used: what is computed in.

    Raises:
        UserError: there is no such precision.
    """

    def __init__(self, wanted: str, device: torch.device) -> None:
        if wanted not in DTYPES:
            raise UserError(f"precision is {wanted!r}, expected one of {', '.join(DTYPES)}")
        self.wanted = wanted
        self.device = device
        self.used = wanted
        if wanted != "float32" and not has_units(wanted, device):
            warnings.warn(
                f"training.precision: found '{wanted}', for which {device} has no units: it would only cost, and "
                "float32 is used",
                stacklevel=3,
            )
            self.used = "float32"
        # Switched off, it lets everything pass as it is.
        self._scaler = GradScaler(device.type, enabled=self.used == "float16")

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before the backward pass: 1, save in float16."""
        return float(self._scaler.get_scale())

    def computing(self) -> AbstractContextManager[object]:
        """Return the context for a forward pass and its loss."""
        if self.used == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.used])

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, scaled, to those that the parameters have."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradients of what ``optimizer`` moves those of the loss itself."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let ``optimizer`` make its step, after :meth:`unscale`; where gradients overflowed, nothing moves.

        Such a step counts all the same: it has its row of metrics, with a ``gradient_norm`` that is not finite, and
        schedules go on. The next one has half the scale.

        Raises:
            UserError: the gradients are not finite however small the scale is.
        """
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        if self._scaler.get_scale() < min(1.0, before):
            raise UserError(
                "the gradients overflow float16 even unscaled; set training.precision to bfloat16 or float32, or lower "
                "optimizer.lr"
            )

    def state_dict(self) -> dict[str, object]:
        """Return the scale and for how many steps it has held; nothing where none is needed."""
        state = self._scaler.state_dict()
        # The rest is how it was made.
        return {"scale": state["scale"], "steps": state["_growth_tracker"]} if state else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state_dict` described; without a state of one that scaled, begin anew."""
        if state and self._scaler.is_enabled():
            found = {"scale": state["scale"], "_growth_tracker": state["steps"]}
            self._scaler.load_state_dict({**self._scaler.state_dict(), **found})


def has_units(precision: str, device: torch.device) -> bool:
    """Return whether ``device`` multiplies in ``precision``, ``bfloat16`` or ``float16``, faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _CAPABILITY[precision]
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(unit, False) for unit in _UNITS[precision])
