"""The parameters of torch's own modules and schedulers, which remember none: read from the object, and proven.

A module is built once more from what was read, without memory or random numbers (on torch's ``meta`` device), and
compared with the original in everything but the values of its tensors. Where they differ, or cannot be compared, the
parameters are not known. A scheduler is read only by the table below, of attributes that stepping leaves alone.

This module is loaded only where torch is: importing the serializer must not cost torch.
"""

import inspect
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import built_from, qualified_name

_MISSING = object()
# Parameters that leave nothing behind: a place, initial values that the state brings, old names of other parameters.
_WITHOUT_TRACE = {"device", "_weight", "size_average", "reduce", "min_value", "max_value"}
# What is set after construction, or compared apart; hooks are passed over too.
_NOT_COMPARED = {"training", "_compiled_call_impl", "_modules"}
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")

_TRANSFORMER: Mapping[str, Callable[[Any], Any]] = {
    "d_model": lambda layer: layer.linear1.in_features,
    "nhead": lambda layer: layer.self_attn.num_heads,
    "dim_feedforward": lambda layer: layer.linear1.out_features,
    "dropout": lambda layer: layer.dropout.p,
    "layer_norm_eps": lambda layer: layer.norm1.eps,
    "batch_first": lambda layer: layer.self_attn.batch_first,
    "bias": lambda layer: layer.linear1.bias is not None,
}
# How to read what no attribute of the parameter's name holds, by class and parameter.
_READERS: Mapping[type[nn.Module], Mapping[str, Callable[[Any], Any]]] = {
    nn.MultiheadAttention: {
        "bias": lambda attention: attention.in_proj_bias is not None,
        "add_bias_kv": lambda attention: attention.bias_k is not None,
    },
    nn.Embedding: {"_freeze": lambda embedding: not embedding.weight.requires_grad},
    nn.TransformerEncoderLayer: _TRANSFORMER,
    nn.TransformerDecoderLayer: _TRANSFORMER,
}
# The parameters of schedulers that attributes hold unchanged, by class; "optimizer" apart.
_SCHEDULERS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "StepLR": {"step_size": lambda it: it.step_size, "gamma": lambda it: it.gamma},
    "MultiStepLR": {"milestones": lambda it: sorted(it.milestones.elements()), "gamma": lambda it: it.gamma},
    "ConstantLR": {"factor": lambda it: it.factor, "total_iters": lambda it: it.total_iters},
    "LinearLR": {
        "start_factor": lambda it: it.start_factor,
        "end_factor": lambda it: it.end_factor,
        "total_iters": lambda it: it.total_iters,
    },
    "ExponentialLR": {"gamma": lambda it: it.gamma},
    "PolynomialLR": {"total_iters": lambda it: it.total_iters, "power": lambda it: it.power},
    "CosineAnnealingLR": {"T_max": lambda it: it.T_max, "eta_min": lambda it: it.eta_min},
    "LambdaLR": {"lr_lambda": lambda it: list(it.lr_lambdas)},
    "MultiplicativeLR": {"lr_lambda": lambda it: list(it.lr_lambdas)},
    "SequentialLR": {"schedulers": lambda it: list(it._schedulers), "milestones": lambda it: list(it._milestones)},
    "ReduceLROnPlateau": {
        "mode": lambda it: it.mode,
        "factor": lambda it: it.factor,
        "patience": lambda it: it.patience,
        "threshold": lambda it: it.threshold,
        "threshold_mode": lambda it: it.threshold_mode,
        "cooldown": lambda it: it.cooldown,
        "min_lr": lambda it: list(it.min_lrs),
        "eps": lambda it: it.eps,
    },
}


def is_known(target: type[Any]) -> bool:
    """Return whether ``target`` is a module or scheduler of torch's own that :func:`torch_parameters` may read."""
    if issubclass(target, nn.Module):
        return target.__module__.startswith("torch.nn.modules.")
    return target.__module__ == lr_scheduler.__name__ and target.__name__ in _SCHEDULERS


def torch_parameters(value: Any) -> dict[str, Any] | None:
    """Return the parameters that make ``value`` again, or None where it is no object of torch's.

    Raises:
        UserError: they cannot be known; the message says what to do.
    """
    target = type(value)
    if isinstance(value, Tensor):
        raise UserError(
            "a tensor is no parameter but state; register it as a buffer of the model, or give it anew: "
            "Serializer(external={'name': tensor})"
        )
    if isinstance(value, torch.optim.Optimizer):
        raise UserError(
            f"an optimizer ({target.__name__}) belongs to the parameters of its model; give it to the ModelTrainer, "
            "which writes it by their names, or give it anew: Serializer(external={'optimizer': optimizer})"
        )
    if not is_known(target):
        return None
    return _module_parameters(value) if isinstance(value, nn.Module) else _scheduler_parameters(value)


def _scheduler_parameters(value: Any) -> dict[str, Any]:
    readers = _SCHEDULERS[type(value).__name__]
    expected = {"optimizer", "last_epoch", *readers}
    if not inspect.signature(type(value)).parameters.keys() <= expected:
        raise _unknown(type(value), "this version of torch gives it other parameters")
    return {"optimizer": value.optimizer, **{name: read(value) for name, read in readers.items()}}


def _module_parameters(value: nn.Module) -> dict[str, Any]:
    target = type(value)
    parameters = _read(value)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = built_from(target, parameters)
        difference = _difference(value, again)
    except Exception as error:
        raise _unknown(target, f"{sorted(parameters)} do not build it ({error})") from error
    if difference is not None:
        raise _unknown(target, f"its {difference} does not follow from its attributes {sorted(parameters)}")
    return parameters


def _unknown(target: type[Any], reason: str) -> UserError:
    return UserError(
        f"{qualified_name(target)} cannot be serialised: {reason}, so what its constructor was given is not known. "
        f"Call serializable({target.__name__}) before the object is made, or mark a subclass with @serializable"
    )


def _read(value: nn.Module) -> dict[str, Any]:
    children = value._modules
    match value:
        case nn.Sequential():
            is_numbered = list(children) == [str(i) for i in range(len(children))]
            return {"args": list(children.values()) if is_numbered else [OrderedDict(children)]}
        case nn.ModuleList():
            return {"modules": list(children.values())}
        case nn.ModuleDict():
            return {"modules": dict(children)}
        case nn.RNNBase():
            last = {nn.LSTM: ("proj_size",), nn.RNN: ("nonlinearity",)}.get(type(value), ())
            parameters = {name: getattr(value, name) for name in (*_RECURRENT, *last)}
            return {**parameters, "dtype": _float_type(value)}
    parameters = {}
    readers = _READERS.get(type(value), {})
    for name, parameter in inspect.signature(type(value)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in _WITHOUT_TRACE:
            continue
        found = getattr(value, name, _MISSING)
        if name in readers:
            parameters[name] = readers[name](value)
        elif name == "dtype":
            parameters[name] = _float_type(value)
        elif isinstance(parameter.default, bool) and (found is None or isinstance(found, Tensor)):
            # bias=True becomes a tensor, bias=False becomes None.
            parameters[name] = found is not None
        elif found is not _MISSING:
            parameters[name] = found
    return parameters


def _float_type(value: nn.Module) -> torch.dtype | None:
    tensors = [*value.parameters(), *value.buffers()]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()), None)


def _difference(one: nn.Module, other: nn.Module) -> str | None:
    """Return where two modules differ, values of tensors and hooks apart, or None."""
    if type(one) is not type(other):
        return f"class {type(one).__name__}"
    mine, others = vars(one), vars(other)
    for name in sorted((mine.keys() | others.keys()) - _NOT_COMPARED):
        if "_hook" not in name and not _alike(mine.get(name, _MISSING), others.get(name, _MISSING)):
            return name
    if list(one._modules) != list(other._modules):
        return "children"
    for name, child in one._modules.items():
        twin = other._modules[name]
        if child is twin:
            continue
        found = "child" if child is None or twin is None else _difference(child, twin)
        if found is not None:
            return f"{name}.{found}"
    return None


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    # What points back to the module's own tensors (weakref) points to different ones in another module.
    return isinstance(one, weakref.ref) or bool(one == other)
