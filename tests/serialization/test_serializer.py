import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import read_checkpoint
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.serialization.state import json_bytes, tensor_bytes
from sonosco_mlflow.text import CharacterTokenizer, SpecialToken


class Colour(Enum):
    RED = "r"
    BLUE = "b"


@serializable
class Smoother:
    def __init__(self, window: int = 3, *, colour: Colour = Colour.RED) -> None:
        self.size = window
        self.colour = colour


@serializable
class LoudSmoother(Smoother):
    def __init__(self, volume: float, **settings: Any) -> None:
        super().__init__(window=99, **settings)
        self.volume = volume


@serializable
class Doubling:
    """Built from something else than what it was given."""

    def __init__(self, value: int) -> None:
        self.value = 2 * value

    def serialized_parameters(self) -> dict[str, object]:
        return {"value": self.value // 2}


@serializable
@dataclass(frozen=True)
class Point:
    x: float
    tags: list[str] = field(default_factory=list)


@serializable
def average(values: list[float]) -> float:
    return sum(values) / len(values)


@serializable
class Holder:
    external_parameters = ("loader",)

    def __init__(self, value: Any, loader: object = None) -> None:
        self.value = value
        self.loader = loader


class Unmarked:
    def __init__(self, secret: int) -> None:
        self._hidden = secret


def written_and_read(value: Any, **external: object) -> Any:
    document = json.loads(json_bytes(Serializer(external).describe(value)))
    return Deserializer(trusted=[__name__]).build(document, **external)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 7, -0.5, math.inf, "text", "$float", Path("a/b"), (1, (2.0, "x")), [1, [2]], {3, 1}),
        *(frozenset({"b"}), {"a": {"b": 1}}, {1: "one", "$pairs": 2, (1, 2): None}, {"$object": "os:system"}),
        *(torch.float16, torch.device("cpu"), Colour.BLUE, SpecialToken.EOS, nn.ReLU, average, Smoother),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_values_come_back(value: object) -> None:
    again = written_and_read(value)
    assert again == value
    assert type(again) is type(value)


def test_nan_comes_back() -> None:
    assert math.isnan(written_and_read({"x": math.nan})["x"])


def test_an_object_is_rebuilt_from_what_its_constructor_was_given() -> None:
    again = written_and_read(Smoother(5, colour=Colour.BLUE))
    assert (type(again), again.size, again.colour) == (Smoother, 5, Colour.BLUE)


def test_a_subclass_keeps_its_own_parameters_and_not_its_bases() -> None:
    document = Serializer().describe(LoudSmoother(0.5, colour=Colour.BLUE))
    assert document["parameters"].keys() == {"volume", "colour"}
    again = written_and_read(LoudSmoother(0.5, colour=Colour.BLUE))
    assert (again.volume, again.size, again.colour) == (0.5, 99, Colour.BLUE)


def test_a_class_may_say_what_to_write() -> None:
    assert written_and_read(Doubling(4)).value == 8


def test_nested_objects_dataclasses_and_functions() -> None:
    again = written_and_read(Holder({"points": [Point(1.0, ["a"])], "metric": average, "kind": torch.optim.SGD}))
    assert again.value == {"points": [Point(1.0, ["a"])], "metric": average, "kind": torch.optim.SGD}


def test_a_class_of_this_package_needs_no_mark() -> None:
    assert written_and_read(CharacterTokenizer(["A", "B"])).alphabet == ("A", "B")


def test_the_same_object_gives_the_same_bytes() -> None:
    one, other = (
        json_bytes(Serializer().describe(Holder({"a": 1, "b": {3, 1, 2}, "c": Point(0.1)}))) for _ in range(2)
    )
    assert one == other


def test_external_objects_are_given_anew_wherever_they_occur() -> None:
    loader, other = object(), object()
    document = Serializer().describe(Holder([Holder(loader), Holder(None, other)], loader))
    assert document["parameters"]["loader"] == {"$external": "loader"}
    assert document["parameters"]["value"][0]["parameters"]["value"] == {"$external": "loader"}
    replacement = object()
    again = Deserializer().build(document, loader=replacement)
    assert again.loader is again.value[0].value is replacement
    with pytest.raises(UserError, match="'loader' must be given"):
        Deserializer().build(document)
    assert written_and_read([other, 1], theirs=other) == [other, 1]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lambda: 0, r"value\.metric is a lambda \(.*<lambda>\)"),
        (lambda: _local(), "value.metric is a local function or class"),
        (lambda: Unmarked(3), "value.metric: .*parameter 'secret' is not known. Mark the class with @serializable"),
        (lambda: functools.partial(average, [1.0]), r"value\.metric: .*partial"),
        (lambda: nn.Sequential(nn.ReLU()), r"value\.metric: .*Sequential cannot be serialised"),
        (lambda: torch.ones(2), r"value\.metric"),
    ],
    ids=["lambda", "local", "unmarked", "partial", "sequential", "tensor"],
)
def test_what_cannot_be_written_down_is_named_by_its_path(make: Callable[[], object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Serializer().describe(Holder({"metric": make()}))


def _local() -> object:
    def function() -> None: ...

    return function


@pytest.mark.parametrize(
    "name",
    [
        *("os:system", "builtins:eval", "torch.hub:load", "subprocess:Popen", "torch:load", "torchvision:ops"),
        *("sonosco_mlflow_evil:x", "this:s", "torch.nn.modules.module:os.system", "sonosco_mlflow.errors:Iterable"),
        *("torch.optim.optimizer:os", "sonosco_mlflow:importlib.import_module", "", ":", "a"),
    ],
)
def test_names_that_are_not_trusted_are_refused_and_nothing_is_imported(name: str) -> None:
    before = set(sys.modules)
    for document in ({"$name": name}, {"$object": name, "parameters": {}}, {"$enum": name, "name": "x"}):
        with pytest.raises(UserError, match=r"is not trusted|is not a class or function that|does not exist"):
            Deserializer().build(document)
    assert not {module for module in set(sys.modules) - before if not module.startswith(("torch", "sonosco_mlflow"))}


def test_a_module_is_trusted_by_name_with_what_lies_under_it_only() -> None:
    document = {"$name": "json.decoder:JSONDecoder"}
    with pytest.raises(UserError, match=r"pass trusted=\['json.decoder'\]"):
        Deserializer().build(document)
    with pytest.raises(UserError, match="not trusted"):
        Deserializer(trusted=["jso"]).build(document)
    assert Deserializer(trusted=["json"]).build(document) is json.JSONDecoder


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ({"$object": "sonosco_mlflow.text:CharacterTokenizer", "parameters": {"alphabett": []}}, "cannot be built"),
        ({"$object": "sonosco_mlflow.text:NoSuchThing", "parameters": {}}, "does not exist"),
        ({"$object": "torch.nn.functional:relu", "parameters": {}}, "is not a"),
        ({"$dtype": "nn"}, "is not a torch dtype"),
    ],
)
def test_documents_that_do_not_fit_are_refused(document: object, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Deserializer().build(document)


def test_a_starred_parameter_is_refused_where_it_is_used() -> None:
    @serializable
    class Starred:
        def __init__(self, *layers: int) -> None:
            self.layers = layers

    assert Starred().layers == ()
    with pytest.raises(UserError, match=r"takes no \*layers"):
        Starred(1, 2)


# ------------------------------------------------------------------ with state, on the disk


@serializable
class Scaled(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)


def test_an_object_and_its_state_are_written_and_read(tmp_path: Path) -> None:
    model = Scaled(3)
    path = Serializer().serialize(model, tmp_path, step=12, digests={"data": "00"})
    assert path == tmp_path / "step-00000012"
    assert read_checkpoint(path).digests == {"data": "00"}
    for place in (path, tmp_path, str(tmp_path)):
        again = Deserializer().deserialize(place)
        assert isinstance(again, Scaled)
        assert tensor_bytes(again.state_dict()) == tensor_bytes(model.state_dict())


@serializable
class Counter:
    def __init__(self) -> None:
        self.state: dict[str, object] = {}

    def state_dict(self) -> dict[str, object]:
        return self.state

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.state = state


@pytest.mark.parametrize(
    "state", [{}, {"n": 1}, {"state": {"n": 1}}, {"a": {"x": 1}, "b": {}}, {"a/b": {"x": 1}}, {"state": 3}], ids=repr
)
def test_a_state_of_any_shape_comes_back(state: dict[str, object], tmp_path: Path) -> None:
    counter = Counter()
    counter.state = state
    Serializer().serialize(counter, tmp_path)
    assert Deserializer().deserialize(tmp_path).state == state


def test_an_object_without_state_is_written_and_read(tmp_path: Path) -> None:
    Serializer().serialize(Point(2.0), tmp_path)
    assert Deserializer().deserialize(tmp_path) == Point(2.0)


def test_a_uri_is_fetched_first(tmp_path: Path) -> None:
    Serializer().serialize(Point(2.0), tmp_path)
    asked = []

    def fetch(uri: str) -> Path:
        asked.append(uri)
        return tmp_path

    assert Deserializer(fetch=fetch).deserialize("runs:/abc/checkpoints") == Point(2.0)
    assert asked == ["runs:/abc/checkpoints"]
    with pytest.raises(UserError, match="'runs:/abc' is not on this machine"):
        Deserializer().deserialize("runs:/abc")
