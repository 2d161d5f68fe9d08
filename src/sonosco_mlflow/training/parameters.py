"""What a model's state does not tell of its parameters: which of them train, and how they lie in memory.

A program that makes a model and then freezes a part of it, or converts it, does something that the constructor does
not. A model that is built again lacks it until its trainer's state is loaded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sonosco_mlflow.errors import UserError


def parameter_traits(model: nn.Module) -> dict[str, object]:
    """Return the names of the parameters that are frozen, and the strides of those that do not lie row by row."""
    parameters = dict(model.named_parameters())
    return {
        "frozen": [name for name, parameter in parameters.items() if not parameter.requires_grad],
        "strides": {
            name: list(parameter.stride()) for name, parameter in parameters.items() if not parameter.is_contiguous()
        },
    }


def load_model_state(model: nn.Module, state: Mapping[str, Any], traits: Mapping[str, Any] | None) -> None:
    """Give ``model`` the values of ``state``, their types, and the ``traits`` of :func:`parameter_traits`.

    Args:
        model: what is changed; its parameters and buffers stay the same objects.
        state: what ``model.state_dict()`` gave.
        traits: None, where they are not known or not to be taken, leaves both types and traits as they are.

    Raises:
        UserError: strides do not lay a parameter out in the memory that it has.
    """
    if traits is not None:
        for name, tensor in model.state_dict(keep_vars=True).items():
            kept = state.get(name)
            if isinstance(tensor, Tensor) and isinstance(kept, Tensor) and tensor.dtype != kept.dtype:
                # To copy the values alone would round them.
                tensor.data = tensor.data.to(kept.dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in traits["frozen"])
            stride = tuple(traits["strides"].get(name, torch.empty(parameter.shape, device="meta").stride()))
            if parameter.stride() != stride:
                _require_layout(name, parameter, stride)
                parameter.data = torch.empty_strided(
                    parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
                )
    model.load_state_dict(state)


def _require_layout(name: str, parameter: Tensor, stride: tuple[int, ...]) -> None:
    """Return if ``stride`` gives each element a place of its own, within as much memory as the parameter takes now."""
    extent = 1 if len(stride) == parameter.ndim else 0
    for step, size in sorted(zip(stride, parameter.shape, strict=False)):
        if size > 1:
            extent = extent + step * (size - 1) if 0 < extent <= step else 0
    if not 0 < extent <= max(1, parameter.untyped_storage().nbytes() // parameter.element_size()):
        raise UserError(
            f"trainer/parameters/strides/{name}: found {list(stride)}, which does not lay out a parameter of shape "
            f"{list(parameter.shape)}"
        )
