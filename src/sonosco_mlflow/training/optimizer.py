"""Optimizers described by the names of the parameters that they move.

torch numbers parameters in the order in which they were given. Names survive a change of that order, and say in a
checkpoint what belongs to what.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import remembered_parameters, serializable


@serializable
class OptimizerRecipe:
    """All that is needed to build an optimizer for a model.

    Args:
        kind: the optimizer's class.
        groups: one mapping a parameter group: its options, and ``parameters``, the names of what it moves.
        options: what the constructor was given beside, of a class that is ``@serializable``; None of others.
    """

    def __init__(
        self,
        kind: Callable[..., torch.optim.Optimizer],
        groups: list[dict[str, Any]],
        options: dict[str, Any] | None = None,
    ) -> None:
        self.kind = kind
        self.groups = groups
        self.options = options

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> Self:
        """Describe ``optimizer``.

        Raises:
            UserError: it moves a tensor that is no parameter of ``model``.
        """
        names = _names(model)
        groups = []
        for group in optimizer.param_groups:
            missing = [tuple(parameter.shape) for parameter in group["params"] if id(parameter) not in names]
            if missing:
                raise UserError(
                    f"the optimizer moves tensors that are not parameters of the model (shapes {missing[:3]}); "
                    "build it from model.parameters() of the same model"
                )
            # torch adds what the constructor does not take (the base class's own bookkeeping) under other names.
            options = {key: value for key, value in group.items() if key in optimizer.defaults}
            groups.append({**options, "parameters": [names[id(parameter)] for parameter in group["params"]]})
        return cls(type(optimizer), groups, _own_options(optimizer))

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer for the parameters of ``model``.

        Raises:
            UserError: ``model`` lacks one of the named parameters.
        """
        parameters = dict(model.named_parameters())
        missing = [name for group in self.groups for name in group["parameters"] if name not in parameters]
        if missing:
            raise UserError(f"the model has no parameter '{missing[0]}', which the optimizer should move")
        groups = []
        for group in self.groups:
            options = {key: value for key, value in group.items() if key != "parameters"}
            groups.append({**options, "params": [parameters[name] for name in group["parameters"]]})
        if not (isinstance(self.kind, type) and issubclass(self.kind, torch.optim.Optimizer)):
            # It may come from a document, by which nothing else may be called.
            raise UserError(f"{self.kind!r} is no class of optimizers")
        optimizer: torch.optim.Optimizer = self.kind(groups, **(self.options or {}))
        return optimizer

    def renew_options(self, optimizer: torch.optim.Optimizer) -> None:
        """Set all options of the optimizer's groups to what the recipe has."""
        for group, recipe in zip(optimizer.param_groups, self.groups, strict=True):
            group.update({key: value for key, value in recipe.items() if key != "parameters"})


class LearningRates:
    """Sets the learning rates of an optimizer step by step, and overrules nobody in silence.

    Args:
        recipe: has the base rate of each group.
    """

    def __init__(self, recipe: OptimizerRecipe) -> None:
        self.recipe = recipe
        self._set: list[float] = []

    def set(self, optimizer: torch.optim.Optimizer, factor: float, step: int) -> None:
        """Set the rate of each group to ``factor`` times its base, for the coming ``step``.

        Raises:
            UserError: a rate is no longer what was set for the step before.
        """
        for group, rate in zip(optimizer.param_groups, self._set, strict=False):
            if group["lr"] != rate:
                raise UserError(
                    f"a learning rate is {group['lr']} before step {step}, where training had set {rate}: something "
                    "else changes it, such as a scheduler of torch's, and would be overruled. Have a callback answer "
                    "learning_rate_factor, by which the base rate is multiplied at each step"
                )
        for group, base in zip(optimizer.param_groups, self.recipe.groups, strict=True):
            group["lr"] = base["lr"] * factor
        self._set = [group["lr"] for group in optimizer.param_groups]


def _own_options(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    remembered = remembered_parameters(optimizer)
    if remembered is None:
        return None
    moved = next(iter(inspect.signature(type(optimizer)).parameters))
    # The others are the groups', where they may have changed since.
    return {key: value for key, value in remembered.items() if key != moved and key not in optimizer.defaults}


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, object]:
    """Return the optimizer's state by parameter name, the options of its groups, and what is its class's own."""
    names = _names(model)
    moments = {names[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()}
    groups = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    # What a class adds to the state of torch's.
    own = {key: value for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}
    return {"moments": dict(sorted(moments.items())), "groups": groups, "own": own}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what :func:`optimizer_state` returned.

    Raises:
        UserError: it is of another number of groups.
    """
    kept, groups = len(state["groups"]), len(optimizer.param_groups)
    if kept != groups:
        raise UserError(f"optimizer/groups: found {kept}, expected the optimizer's {groups}")
    if state["own"]:
        # The class alone knows where it belongs; the rest, which it takes by number, is put right below.
        optimizer.load_state_dict({**optimizer.state_dict(), **copy.deepcopy(state["own"])})
    for group, options in zip(optimizer.param_groups, state["groups"], strict=True):
        for key, value in options.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    names = _names(model)
    for group in optimizer.param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            if name in state["moments"]:
                optimizer.state[parameters[name]] = {
                    key: _placed(parameters[name], key, value, group) if isinstance(value, Tensor) else value
                    for key, value in state["moments"][name].items()
                }


def clip_gradients(optimizer: torch.optim.Optimizer, model: nn.Module, limit: float | None) -> float:
    """Bound the 2-norm of the gradients of what ``optimizer`` moves by ``limit``, and return what it was."""
    in_groups = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # In the model's order, however they are grouped: it decides the last bits of the norm.
    moved = [parameter for parameter in model.parameters() if id(parameter) in in_groups]
    return nn.utils.clip_grad_norm_(moved, math.inf if limit is None else limit).item()


def placed_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a copy of what belongs to ``parameter``, its gradient or moments, where and as the parameter lies."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    # A norm is summed in the order of memory, which a file does not keep.
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _placed(parameter: Tensor, key: str, value: Tensor, group: Mapping[str, Any]) -> Tensor:
    # Steps are counted on the CPU, save where a kernel on the device counts them.
    counts_here = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value.clone() if counts_here else placed_as(parameter, value)
