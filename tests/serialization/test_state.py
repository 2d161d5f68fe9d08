import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from sonosco_mlflow.serialization.state import Stateful, join_tree, json_bytes, split_tree, tensor_bytes
from sonosco_mlflow.training.callbacks import History


def through_bytes(tree: object) -> Any:
    import safetensors.torch

    document, tensors = split_tree(tree)
    return join_tree(json.loads(json_bytes(document)), safetensors.torch.load(tensor_bytes(tensors)))


def same(one: Any, other: Any) -> bool:
    """Equal in type and value, to the bit."""
    if type(one) is not type(other):
        return False
    match one:
        case Tensor():
            return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)
        case dict():
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        case list():
            return len(one) == len(other) and all(map(same, one, other))
        case float():
            return (math.isnan(one) and math.isnan(other)) or (one, math.copysign(1, one)) == (
                other,
                math.copysign(1, other),
            )
    return bool(one == other)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


STORED = [
    *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
]


def tensor_of_bits(dtype: torch.dtype, shape: list[int], seed: int, form: str) -> Tensor:
    """Any bits at all: NaN of every payload, infinities, -0.0 and subnormal numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
    tensor = bits.view(dtype).reshape(shape)
    match form:
        case "turned":
            return tensor.transpose(0, -1) if shape else tensor
        case "expanded":
            return tensor.unsqueeze(0).expand(2, *shape)
        case "sliced":
            return tensor[1:] if shape else tensor
    return tensor


TENSORS = st.builds(
    tensor_of_bits,
    st.sampled_from(STORED),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 9),
    st.sampled_from(["plain", "turned", "expanded", "sliced"]),
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TENSORS
KEYS = (
    st.text(max_size=5)
    | st.integers(-5, 5)
    | st.integers()
    | st.sampled_from(["$tensor", "$pairs", "$float", "a/b", "0", ""])
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(KEYS, TREES, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_tree_comes_back_byte_for_byte(tree: dict[Any, Any]) -> None:
    assert same(through_bytes(tree), tree)


def test_nan_infinities_and_integer_keys_come_back() -> None:
    tree = {
        "best": -math.inf,
        "now": math.nan,
        "scores": {3: 0.1, -1: math.inf},
        "zero": -0.0,
        "t": torch.tensor(math.nan),
    }
    assert same(through_bytes(tree), tree)


def test_the_order_of_keys_does_not_change_the_bytes() -> None:
    one = {"a": 1, "b": {"x": torch.ones(2), "y": torch.zeros(2)}}
    other = {"b": {"y": torch.zeros(2), "x": torch.ones(2)}, "a": 1}
    (document, tensors), (other_document, other_tensors) = split_tree(one), split_tree(other)
    assert json_bytes(document) == json_bytes(other_document)
    assert tensor_bytes(tensors) == tensor_bytes(other_tensors)


def test_tied_tensors_are_stored_once_and_named_twice() -> None:
    model = nn.Module()
    model.encoder = nn.Linear(4, 4, bias=False)
    model.decoder = nn.Linear(4, 4, bias=False)
    model.decoder.weight = model.encoder.weight
    document, tensors = split_tree(dict(model.state_dict()))
    assert document == {
        "encoder.weight": {"$tensor": "decoder.weight"},
        "decoder.weight": {"$tensor": "decoder.weight"},
    }
    assert list(tensors) == ["decoder.weight"]
    state = dict(model.state_dict())
    again = split_tree(dict(reversed(state.items())))
    assert (again[0], list(again[1])) == (document, list(tensors))
    assert same(through_bytes(dict(model.state_dict())), dict(model.state_dict()))


def test_views_that_overlap_without_being_equal_are_kept_apart() -> None:
    base = torch.arange(6.0)
    square = torch.arange(4.0).reshape(2, 2)
    tree = {"base": base, "head": base[:3], "square": square, "turned": square.T, "whole": square.int()}
    assert same(through_bytes(tree), tree)


def test_paths_that_read_alike_are_kept_apart() -> None:
    tree = {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1), "": {"a": {"b": torch.full((1,), 2.0)}}}
    assert same(through_bytes(tree), tree)
    tree = {"k": {1: torch.zeros(1), "1": torch.ones(1), "[1]": torch.full((1,), 2.0), "~2": torch.full((1,), 3.0)}}
    assert same(through_bytes(tree), tree)


@given(st.dictionaries(KEYS, TREES, max_size=4), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_bytes_do_not_depend_on_the_order_of_keys(tree: dict[Any, Any], random: Any) -> None:
    def shuffled(node: Any) -> Any:
        if isinstance(node, list):
            return [shuffled(child) for child in node]
        if not isinstance(node, dict):
            return node
        keys = list(node)
        random.shuffle(keys)
        return {key: shuffled(node[key]) for key in keys}

    (document, tensors), (other, others) = split_tree(tree), split_tree(shuffled(tree))
    assert json_bytes(document) == json_bytes(other)
    assert tensor_bytes(tensors) == tensor_bytes(others)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_views_of_one_memory_come_back_as_they_were(data: st.DataObject) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    names = st.sampled_from(["base", "turned", "row", "column", "again", "bits", "empty", "flat"])
    views = {
        "base": base,
        "turned": base.T,
        "row": base[1],
        "column": base[:, 2],
        "again": base.view(4, 6),
        "bits": base.view(torch.int32),
        "empty": base[:0],
        "flat": base.view(-1),
    }
    tree = {name: views[name] for name in data.draw(st.sets(names))}
    assert same(through_bytes(tree), tree)
    for copied in (True, False):
        tensors = split_tree(tree, copy=copied)[1]
        assert len(tensors) == len(tree.keys()) - ({"base", "again"} <= tree.keys())


def test_conjugate_and_negative_views_are_written_as_what_they_show() -> None:
    number = torch.tensor([1 + 2j], dtype=torch.complex64)
    tree = {"conjugate": number.conj(), "negative": number.conj().imag}
    again = through_bytes(tree)
    assert again["conjugate"].tolist() == [1 - 2j]
    assert again["negative"].tolist() == [-2.0]


def test_a_copied_tree_shows_nothing_of_what_happens_later() -> None:
    weight, expanded = torch.zeros(2, 3), torch.zeros(1).expand(4)
    tree = {
        "a": weight,
        "tied": weight,
        "view": weight[0],
        "turned": weight.T,
        "expanded": expanded,
        "scalar": weight[0, 0],
    }
    document, tensors = split_tree(tree, copy=True)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(addresses) == len(tensors) == 5
    assert addresses.isdisjoint({weight.untyped_storage().data_ptr(), expanded.untyped_storage().data_ptr()})
    before = tensor_bytes(tensors)
    weight.fill_(7)
    expanded[:1].fill_(7)
    assert tensor_bytes(tensors) == before
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())
    assert split_tree({"a": weight})[1]["a"].data_ptr() == weight.data_ptr()
    assert document == split_tree(tree)[0]


def test_owned_tensors_are_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = split_tree({"a": torch.ones(3), "b": torch.ones(2, 2).T, "c": torch.tensor(1)}, copy=True)[1]
    shared = {"a": tensors["a"], "part": tensors["a"][1:]}
    expected = tensor_bytes(tensors), tensor_bytes(shared)
    copies = []
    original = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda tensor, **how: copies.append(1) or original(tensor, **how))
    assert tensor_bytes(tensors) == expected[0]
    assert copies == []
    assert tensor_bytes(shared) == expected[1]
    assert copies == [1, 1]


def test_numbers_of_numpy_that_are_pythons_too_come_back_as_pythons() -> None:
    tree = {"mean": np.float64(0.1), "none": np.float64("nan"), "least": np.float64("-inf"), "name": np.str_("x")}
    assert same(through_bytes(tree), {"mean": 0.1, "none": math.nan, "least": -math.inf, "name": "x"})
    assert same(through_bytes(OrderedDict(b=1, a=2)), {"a": 2, "b": 1})


class Phase(IntEnum):
    WARM = 1


@pytest.mark.parametrize(
    "leaf",
    [
        *((1, 2), {1}, object(), b"bytes", {"key": {(1, 2): 3}}, 1j, np.float32(1), np.int64(1), np.bool_(True)),
        *(Phase.WARM, Counter("a"), defaultdict(int), torch.Size([1]), {True: 1}, {Phase.WARM: 1}, {None: 1}, {0.5: 1}),
        *(torch.ones(1, dtype=torch.complex128), torch.ones(1, device="meta"), torch.ones(1).to_sparse(), np.ones(1)),
        {np.str_("a"): 1},
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_what_is_not_plain_data_is_refused_with_its_path(leaf: object) -> None:
    with pytest.raises(TypeError, match="state at 'callbacks/mine"):
        split_tree({"callbacks": {"mine": leaf}})


def test_the_refusal_of_a_number_of_numpy_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"convert it with \.item\(\)"):
        split_tree({"a": np.float32(1)})


def endless() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        ("\ud800", "'a' holds .*not valid Unicode"),
        ({"\udfff": 1}, "'a' holds .*not valid Unicode"),
        (1 << 20_000, "'a' is a number of 20001 bits"),
        ({1 << 20_000: 1}, "'a' has a key of 20001 bits"),
        (endless(), "more than 100 deep, or contains itself"),
    ],
    ids=["text", "key", "number", "number as key", "endless"],
)
def test_what_could_not_be_read_again_is_refused_with_its_path(leaf: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        split_tree({"a": leaf})


def test_the_longest_number_and_the_deepest_tree_come_back() -> None:
    deepest: list[Any] = []
    for _ in range(98):
        deepest = [deepest]
    tree = {"number": -(2**13_999), "tree": deepest}
    assert same(through_bytes(tree), tree)


def deep(make: Callable[[Any], Any]) -> Any:
    document: Any = []
    for _ in range(100_000):
        document = make(document)
    return document


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ({"$tensor": "missing"}, "names a tensor 'missing'"),
        *(({"$tensor": wrong}, r"'\$tensor'") for wrong in (3, None, [], {})),
        *(({"$float": wrong}, r"'\$float'") for wrong in ("abc", "1.0", "Infinity", 3, None, ["nan"])),
        *(({"$pairs": wrong}, r"\$pairs") for wrong in (3, None, {}, "ab")),
        *(({"$pairs": [wrong]}, r"'\$pairs' are not pairs") for wrong in (3, [], [1], [1, 2, 3], "ab", {}, [[], 1])),
        *(({"$pairs": [wrong]}, "pairs") for wrong in ([None, 1], [1.5, 1], [{"$float": "nan"}, 1])),
        ({"$pairs": [[True, 1]]}, "truth value"),
        ({"$pairs": [[1, 1], [1, 2]]}, "occurs once"),
        ({"$float": "nan", "more": 1}, r"'\$float'"),
        ({"a": [{"$unknown": 1}]}, r"'\$unknown', which is no tag"),
        ({1: 2}, "holds 1"),
        (deep(lambda inner: [inner]), "too deep"),
        (deep(lambda inner: {"a": inner}), "too deep"),
        (deep(lambda inner: {"$pairs": [["a", inner]]}), "too deep"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, str) else "",
)
def test_a_document_that_is_no_state_is_a_value_error(document: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        join_tree(document, {"here": torch.ones(1)})


def test_anything_that_gives_and_takes_state_is_stateful() -> None:
    assert isinstance(History(), Stateful)
    assert isinstance(nn.Linear(1, 1), Stateful)
    assert not isinstance(object(), Stateful)
