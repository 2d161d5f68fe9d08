import copy
import functools
import gc
import json
import math
import pickle
import re
import shutil
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from enum import Enum, Flag, StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import read_checkpoint
from sonosco_mlflow.serialization.parameters import constructor_parameters, serializable
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.serialization.state import json_bytes, tensor_bytes
from sonosco_mlflow.text import CharacterTokenizer, SpecialToken


@serializable
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


class Access(Flag):
    READ = 1
    WRITE = 2


class Word(StrEnum):
    YES = "yes"


class Pair(NamedTuple):
    first: object
    second: object


@serializable
@dataclass
class Counted:
    """Changes in __post_init__ what it was given."""

    number: int
    more: InitVar[int] = 1
    seen: list[int] = field(default_factory=lambda: [7])
    total: int = field(init=False, default=0)

    def __post_init__(self, more: int) -> None:
        self.number *= 2
        self.total = self.number + more
        self.seen.append(more)


@serializable
class Factory:
    @classmethod
    def make(cls) -> "Factory":
        return cls()

    @staticmethod
    def twice(number: int) -> int:
        return 2 * number

    def method(self) -> None: ...


class LoudFactory(Factory): ...


@serializable
class Signed:
    def __init__(self, a: int, /, b: int = 2, *rest: int, c: int, **more: int) -> None:
        self.given = (a, b, rest, c, more)


@serializable
class Emptied:
    def __init__(self, items: list[Any], table: dict[str, list[int]]) -> None:
        self.size = len(items)
        items.clear()
        table["x"].clear()


@serializable
class Slotted:
    __slots__ = ("__weakref__", "size")

    def __init__(self, size: int) -> None:
        self.size = 2 * size


@serializable
class Metres(float):
    def __new__(cls, feet: float) -> "Metres":
        return super().__new__(cls, feet * 0.3048)


class OwnConstructor(Smoother):
    def __init__(self, factor: int) -> None:
        super().__init__(window=2 * factor)


class NoConstructor(Smoother): ...


class Ordinal(int): ...


def replaced() -> None: ...


original = replaced


def replaced() -> None: ...  # type: ignore[no-redef]


@serializable
class Endless:
    def serialized_parameters(self) -> dict[str, object]:
        return {"inner": self}


@serializable
class Keyworded:
    def __init__(self, **values: object) -> None:
        self.values = values


@serializable
@dataclass(frozen=True)
class Point2:
    x: int
    y: int


class Unmarked:
    def __init__(self, secret: int) -> None:
        self._hidden = secret


def shown(value: object) -> str:
    # A set in one order: workers of the test runner must agree on the names of tests.
    ordered = sorted(value, key=repr) if isinstance(value, set) else value
    return str(getattr(value, "__name__", repr(ordered)))[:40]


def written_and_read(value: Any, **external: object) -> Any:
    document = json.loads(json_bytes(Serializer(external).describe(value)))
    return Deserializer(trusted=[__name__]).build(document, **external)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 7, -0.5, math.inf, "text", "$float", Path("a/b"), (1, (2.0, "x")), [1, [2]], {3, 1}),
        *(frozenset({"b"}), {"a": {"b": 1}}, {1: "one", "$pairs": 2, (1, 2): None}, {"$object": "os:system"}),
        *(torch.float16, torch.device("cpu"), Colour.BLUE, SpecialToken.EOS, nn.ReLU, average, Smoother),
        *(
            Holder,
            Access.READ,
            Access.READ | Access.WRITE,
            Access(0),
            Word.YES,
            Pair(1, (2,)),
            Pair,
            range(2, 9, 3),
            b"\xff\0",
        ),
        *(np.float32(0.1), np.float64(0.1), np.int64(3), np.uint8(255), np.bool_(True), np.float16("inf"), int, dict),
        *(OrderedDict(b=1, a=2), {"b": 1, "a": 2}, {1: 1, "1": 2}, {True: 1}, {1, "a", None, (1, 2)}, 10**400),
        *(Point(1.0, ["a"]), Counted(3), Factory.make, Factory.twice, LoudFactory.make, F.relu, F.gelu),
    ],
    ids=shown,
)
def test_values_come_back(value: object) -> None:
    again = written_and_read(value)
    assert again == value
    assert type(again) is type(value)
    if not isinstance(value, set | frozenset):
        assert repr(again) == repr(value)  # the order of dicts too


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=4)
    | st.sampled_from(
        [*Colour, *SpecialToken, Access.READ, Path("a"), "$object", "$pairs", torch.int8, np.float32(0.1)]
    )
)
HASHABLE = PLAIN | st.tuples(PLAIN, PLAIN) | st.frozensets(PLAIN, max_size=3)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
        | st.builds(Smoother, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=10,
)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if type(one) is Smoother:
        return same(one.size, other.size) and one.colour is other.colour
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, set | frozenset):
        # As the same sets may hold what is equal, types apart: each has one partner.
        return one == other and Counter(map(type, one)) == Counter(map(type, other))
    return bool(one == other) and repr(one) == repr(other)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_every_value_comes_back_with_its_type_and_the_same_bytes(value: object) -> None:
    document = json_bytes(Serializer().describe(value))
    again = Deserializer(trusted=[__name__]).build(json.loads(document))
    assert same(again, value)
    assert json_bytes(Serializer().describe(again)) == document


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
        (lambda: Unmarked(3), "value.metric: .*Unmarked cannot be serialised: it is not marked.* @serializable"),
        (lambda: functools.partial(lambda: 0), r"value\.metric\.func is a lambda"),
        (lambda: torch.ones(2), r"value\.metric: a tensor is no parameter"),
        (lambda: original, "value.metric is called .*:replaced, but that name leads to something else"),
        (lambda: Factory().method, r"value\.metric is a method of an object \(Factory.method\)"),
        (lambda: [].append, r"value\.metric is a method of an object"),
        (lambda: len, "is builtins:len, which a document may not name"),
        (lambda: OwnConstructor(3), "OwnConstructor.*a constructor of its own, beside that of Smoother"),
        *((lambda value=value: value, "value.metric") for value in (1j, slice(1), bytearray(), Ordinal(1), np.ones(1))),
        *((lambda value=value: value, "value.metric") for value in (Counter(), defaultdict(int), torch.Size([1]))),
        (lambda: "\ud800", "value.metric is .*not valid Unicode"),
        (lambda: 10**5000, "value.metric is a number of 16610 bits"),
        (lambda: functools.reduce(lambda inner, _: [inner], range(5000), []), "nested more than 100 deep"),
        (lambda: _endless(), "nested more than 100 deep, or contains itself"),
        (lambda: re.compile("a"), "value.metric: re:Pattern cannot be serialised"),
    ],
)
def test_what_cannot_be_written_down_is_named_by_its_path(make: Callable[[], object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Serializer().describe(Holder({"metric": make()}))


def _endless() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


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
        with pytest.raises(
            UserError, match=r"is not trusted|is not a class or function that|does not exist|is not a class"
        ):
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


@pytest.mark.parametrize(
    "made",
    [Signed(1, c=4), Signed(1, 5, c=4), Signed(1, 5, 6, 7, c=4, d=8), Signed(1, c=4, z=1, d=2), Signed(1, 2, 3, c=0)],
    ids=lambda made: repr(made.given),
)
def test_every_kind_of_parameter_comes_back(made: Signed) -> None:
    assert written_and_read(made).given == made.given


def test_a_keyword_that_is_called_like_a_positional_parameter_is_refused() -> None:
    with pytest.raises(UserError, match=r"keywords \['a'\] are also names"):
        Signed(1, c=2, a=3)


def test_parameters_are_kept_as_they_were_given_whatever_becomes_of_them() -> None:
    items, table = [1, [2]], {"x": [3]}
    made = Emptied(items, table)
    assert (items, table) == ([], {"x": []})
    assert Serializer().describe(made)["parameters"] == {"items": [1, [2]], "table": {"x": [3]}}


def test_a_dataclass_that_changes_its_fields_is_kept_as_given() -> None:
    again = written_and_read(Counted(3, more=5))
    assert (again.number, again.total, again.seen) == (6, 11, [7, 5])
    assert written_and_read(Counted(3, 5, [1])) == Counted(3, 5, [1])

    @dataclass
    class Changing:
        x: int

        def __post_init__(self) -> None: ...

    with pytest.raises(UserError, match="not marked"):
        constructor_parameters(Changing(1))


class TakesNothing: ...


def test_a_class_that_takes_nothing_needs_no_mark() -> None:
    assert type(written_and_read(TakesNothing())) is TakesNothing


def test_classes_without_a_dictionary_and_with_new_instead_of_init() -> None:
    assert written_and_read(Slotted(4)).size == 8
    again = written_and_read(Metres(10.0))
    assert (type(again), again) == (Metres, Metres(10.0))
    with pytest.raises(UserError, match=r"Bare cannot be marked.*Add '__weakref__'"):

        @serializable
        class Bare:
            __slots__ = ("x",)

            def __init__(self, x: int) -> None:
                self.x = x


def test_what_is_kept_aside_goes_with_its_object() -> None:
    from sonosco_mlflow.serialization import parameters

    before = len(parameters._ASIDE)
    made = Slotted(1)
    assert len(parameters._ASIDE) == before + 1
    del made
    gc.collect()
    assert len(parameters._ASIDE) == before


def test_a_subclass_without_a_constructor_needs_no_mark_of_its_own() -> None:
    again = written_and_read_trusting(NoConstructor(4))
    assert (type(again), again.size) == (NoConstructor, 4)


def written_and_read_trusting(value: Any) -> Any:
    serializable(type(value))
    return written_and_read(value)


def test_copies_remember_as_well() -> None:
    for again in (copy.deepcopy(Smoother(4)), copy.copy(Smoother(4)), pickle.loads(pickle.dumps(Smoother(4)))):
        assert written_and_read(again).size == 4


def test_an_object_given_twice_is_one_object_again() -> None:
    shared, other = Smoother(1), Smoother(1)
    document = json.loads(json_bytes(Serializer().describe(Holder([shared, other, {"a": shared}, Holder(shared)]))))
    again = Deserializer().build(document).value
    assert again[0] is again[2]["a"] is again[3].value
    assert again[1] is not again[0]
    assert Serializer().describe(Holder(again)) == document
    assert "shared" not in json.dumps(Serializer().describe([Smoother(1), Smoother(1)]))


def test_tied_modules_are_tied_again(tmp_path: Path) -> None:
    block = Scaled(2)
    Serializer().serialize(Tied(block, block), tmp_path)
    again = Deserializer().deserialize(tmp_path)
    assert again.one is again.other
    assert again.one.layer.weight.equal(block.layer.weight)


def test_an_object_that_contains_itself_is_refused() -> None:
    made = Endless()
    with pytest.raises(UserError, match="inner: contains itself"):
        Serializer().describe(made)


def test_the_numbers_of_shared_objects_do_not_depend_on_the_order_of_keywords() -> None:
    one, other = Smoother(1), Smoother(2)
    first = Keyworded(a=one, b=other, c=one, d=other)
    second = Keyworded(d=other, c=one, b=other, a=one)
    assert json_bytes(Serializer().describe(first)) == json_bytes(Serializer().describe(second))


def test_sets_are_written_in_one_order() -> None:
    mixed: set[Any] = {1, "a", (1, "b"), None, Colour.RED, Point2(1, 2), 2.5}
    shuffled: set[Any] = {Point2(1, 2), 2.5, Colour.RED, (1, "b"), "a", None, 1}
    assert json_bytes(Serializer().describe(mixed)) == json_bytes(Serializer().describe(shuffled))
    assert written_and_read(mixed) == mixed


def test_partial_functions_come_back() -> None:
    again = written_and_read(functools.partial(average, [1.0, 2.0]))
    assert (again.func, again.args, again.keywords) == (average, ([1.0, 2.0],), {})
    again = written_and_read(functools.partial(torch.optim.SGD, lr=0.5, **{"$x": Smoother(3)}))
    assert (again.func, again.keywords["lr"], again.keywords["$x"].size) == (torch.optim.SGD, 0.5, 3)


class Digested:
    def __init__(self, digest: object) -> None:
        self.digest = digest


def test_an_external_object_must_have_the_digest_that_was_written() -> None:
    document = Serializer().describe(Holder(1, Digested("aaaaaaaaaaaaaaaa")))
    assert document["parameters"]["loader"] == {"$external": "loader", "digest": "aaaaaaaaaaaaaaaa"}
    same_data, other_data = Digested("aaaaaaaaaaaaaaaa"), Digested("bbbbbbbbbbbbbbbb")
    assert Deserializer().build(document, loader=same_data).loader is same_data
    with pytest.raises(
        UserError, match=r"'loader' is not .* bbbbbbbbbbbb, expected aaaaaaaaaaaa\..*allow_changed=\['loader'\]"
    ):
        Deserializer().build(document, loader=other_data)
    with pytest.raises(UserError, match="its digest is None"):
        Deserializer().build(document, loader=object())
    with pytest.raises(UserError, match="'loader'"):
        Deserializer(allow_changed=["other"]).build(document, loader=other_data)
    assert Deserializer(allow_changed=["loader"]).build(document, loader=other_data).loader is other_data
    older = {"$external": "loader"}
    assert Deserializer().build(older, loader=other_data) is other_data
    assert Serializer().describe(Holder(1, Digested(3)))["parameters"]["loader"] == {"$external": "loader"}
    with pytest.raises(UserError, match="lists of names"):
        Deserializer(allow_changed="loader")


def test_plain_values_are_never_given_anew() -> None:
    assert Serializer({"epochs": 3}).describe([3, "a"]) == [3, "a"]


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


def test_a_model_whose_type_was_changed_is_refused_and_not_rounded(tmp_path: Path) -> None:
    Serializer().serialize(Scaled(3).double(), tmp_path)
    expected = r"'layer\.\w+' was written as torch\.float64, and the Scaled that was built again has torch\.float32"
    with pytest.raises(UserError, match=expected):
        Deserializer().deserialize(tmp_path)


@serializable
class Tied(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one = one
        self.other = other


@serializable
class Remembering:
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
    counter = Remembering()
    counter.state = state
    Serializer().serialize(counter, tmp_path)
    assert Deserializer().deserialize(tmp_path).state == state


def test_an_object_without_state_is_written_and_read(tmp_path: Path) -> None:
    Serializer().serialize(Point(2.0), tmp_path)
    assert Deserializer().deserialize(tmp_path) == Point(2.0)


def test_a_uri_is_fetched_first(tmp_path: Path) -> None:
    Serializer().serialize(Point(2.0), tmp_path)
    asked = []

    def fetch(uri: str, folder: Path) -> Path:
        asked.append((uri, folder))
        shutil.copytree(tmp_path, folder / "brought")
        return folder / "brought"

    assert Deserializer(fetch=fetch).deserialize("runs:/abc/checkpoints") == Point(2.0)
    ((uri, folder),) = asked
    assert uri == "runs:/abc/checkpoints"
    assert not folder.exists()
    with pytest.raises(UserError, match="'runs:/abc' is not on this machine"):
        Deserializer().deserialize("runs:/abc")
