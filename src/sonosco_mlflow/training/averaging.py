"""Weights that a model has for a while, and means of weights.

A mean of weights on the way often does better than the last of them (Polyak and Juditsky 1992; Vaswani et al. 2017,
section 6.1). Training itself goes on with the model's own.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]

# The callback whose state holds the weights that a checkpoint's metrics are of.
EXPONENTIAL = "ExponentialAverage"


def floating(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of ``model`` that can be averaged, by name; a counter cannot."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }


@contextmanager
def borrowed_weights(model: nn.Module, weights: Weights | None) -> Iterator[None]:
    """Give ``model`` other weights in the block, and its own, to the last bit, after it; None changes nothing.

    Args:
        model: its tensors stay the same objects.
        weights: by name, of the parameters and buffers that change.
    """
    own = floating(model) if weights else {}
    kept = {name: tensor.clone() for name, tensor in own.items()}
    try:
        _copy(weights or {}, own)
        yield
    finally:
        _copy(kept, own)


def _copy(values: Weights, tensors: Weights) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in values:
                tensor.copy_(values[name])


def mean_weights(all_of_them: Iterable[Weights]) -> dict[str, Tensor]:
    """Return the mean of several states of one model, taken in float64 in their order; at least one.

    What cannot be averaged is left out: counters, and what a module adds to its state that is no tensor.
    """
    count = 0
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for weights in all_of_them:
        count += 1
        for name, tensor in weights.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                dtypes[name] = tensor.dtype
                sums[name] = sums[name] + tensor.double() if name in sums else tensor.double()
    return {name: (total / count).to(dtypes[name]) for name, total in sums.items()}


def evaluated_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the model's state that a trainer's metrics are of: its own, or an exponential average where there is one.

    Of a trainer with another kind of average nothing here knows it: :func:`.callbacks.averages.are_known` says so.

    Args:
        state: what ``ModelTrainer.state_dict()`` gave.
    """
    average = state["trainer"]["callbacks"].get(EXPONENTIAL, {"average": {}})
    return {**state["model"], **average["average"]}
