from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.serialization.state import json_bytes, split_tree, tensor_bytes
from sonosco_mlflow.training.optimizer import OptimizerRecipe, load_optimizer_state, optimizer_state


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.5}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def test_a_recipe_names_what_each_group_moves() -> None:
    model = new_model()
    recipe = OptimizerRecipe.of(two_groups(model), model)
    assert recipe.kind is torch.optim.AdamW
    assert [group["parameters"] for group in recipe.groups] == [["0.weight", "2.weight"], ["0.bias", "2.bias"]]
    assert [(group["lr"], group["weight_decay"]) for group in recipe.groups] == [(0.01, 0.1), (0.5, 0.01)]


@pytest.mark.parametrize(
    "build",
    [
        two_groups,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: torch.optim.RMSprop(model.parameters(), lr=0.1),
        lambda model: torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True),
        lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
        lambda model: Bounded(model.parameters(), limit=1e-3),
    ],
    ids=["AdamW", "SGD", "RMSprop", "Adam", "Adagrad", "own state"],
)
def test_an_optimizer_written_down_and_built_again_goes_on_alike(build) -> None:
    model = new_model()
    optimizer = build(model)
    step(model, optimizer)
    document = Serializer().describe(OptimizerRecipe.of(optimizer, model))
    state = split_tree(optimizer_state(optimizer, model))

    other = new_model()
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    rebuilt = Deserializer().build(document).build(other)
    load_optimizer_state(rebuilt, other, optimizer_state(optimizer, model))

    again = split_tree(optimizer_state(rebuilt, other))
    assert json_bytes(again[0]) == json_bytes(state[0])
    assert tensor_bytes(again[1]) == tensor_bytes(state[1])
    for _ in range(3):
        step(model, optimizer)
        step(other, rebuilt)
    assert tensor_bytes(model.state_dict()) == tensor_bytes(other.state_dict())


@serializable
class Bounded(torch.optim.SGD):
    """Has an option that is no group's, and a state that is no parameter's, as a program's own optimizer may."""

    def __init__(self, weights: Any, lr: float = 0.1, limit: float = 1.0, *, bounds: Sequence[float] = ()) -> None:
        super().__init__(weights, lr=lr)
        self.limit = limit
        self.bounds = bounds
        self.steps = torch.zeros(1)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.clamp_(-self.limit, self.limit).div_(self.steps)
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        super().load_state_dict({key: value for key, value in state.items() if key != "steps"})


def test_an_optimizer_is_built_with_the_options_that_are_no_groups() -> None:
    model = new_model()
    optimizer = Bounded(model.parameters(), lr=0.5, limit=7.0, bounds=(1.0, 2.0))
    optimizer.param_groups[0]["lr"] = 0.25
    recipe = OptimizerRecipe.of(optimizer, model)
    assert recipe.options == {"limit": 7.0, "bounds": (1.0, 2.0)}
    rebuilt: Any = Deserializer().build(Serializer().describe(recipe)).build(new_model())
    assert (rebuilt.limit, rebuilt.bounds, rebuilt.param_groups[0]["lr"]) == (7.0, (1.0, 2.0), 0.25)


def test_a_recipe_of_before_there_were_options_is_built() -> None:
    model = new_model()
    document = Serializer().describe(OptimizerRecipe.of(two_groups(model), model))
    del document["parameters"]["options"]
    assert len(Deserializer().build(document).build(model).param_groups) == 2


def test_a_loaded_state_shares_no_memory_with_its_source() -> None:
    model = new_model()
    optimizer = two_groups(model)
    step(model, optimizer)
    state = optimizer_state(optimizer, model)
    load_optimizer_state(optimizer, model, state)
    before = tensor_bytes(split_tree(state)[1])
    step(model, optimizer)
    assert tensor_bytes(split_tree(state)[1]) == before


def test_a_foreign_tensor_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(5, 2))], lr=0.1)
    with pytest.raises(UserError, match=r"not parameters of the model \(shapes \[\(5, 2\)\]\)"):
        OptimizerRecipe.of(optimizer, new_model())


def test_a_missing_parameter_is_refused() -> None:
    model = new_model()
    recipe = OptimizerRecipe.of(two_groups(model), model)
    with pytest.raises(UserError, match=r"no parameter '2\.weight'"):
        recipe.build(nn.Sequential(nn.Linear(3, 4)))


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["counted on the CPU", "counted there"])
def test_a_state_lies_on_another_device_as_torch_has_it_there(options: dict[str, bool]) -> None:
    model = nn.ParameterDict({"scale": torch.tensor(1.0), "weight": torch.ones(2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    (model["scale"] * model["weight"].sum()).backward()
    optimizer.step()
    # It stands in for a GPU: tensors have a device there, and no content.
    there = nn.ParameterDict({"scale": torch.tensor(1.0), "weight": torch.ones(2)}).to("meta")
    expected = torch.optim.AdamW(there.parameters(), lr=0.1)
    expected.load_state_dict(optimizer.state_dict())
    found = torch.optim.AdamW(there.parameters(), lr=0.1)
    state = optimizer_state(optimizer, model)
    for group in (*expected.param_groups, *state["groups"]):  # type: ignore[misc]
        group.update(options)
    if options:
        expected.load_state_dict(
            {**optimizer.state_dict(), "param_groups": [{**optimizer.state_dict()["param_groups"][0], **options}]}
        )
    load_optimizer_state(found, there, state)
    for parameter in there.parameters():
        devices = {key: value.device for key, value in expected.state[parameter].items()}
        assert {key: value.device for key, value in found.state[parameter].items()} == devices
