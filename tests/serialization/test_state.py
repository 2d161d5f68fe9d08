import json
import math
from typing import Any

import hypothesis.strategies as st
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


TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(
        [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 9),
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TENSORS
KEYS = st.text(max_size=5) | st.integers(-5, 5) | st.sampled_from(["$tensor", "$pairs", "$float", "a/b", "0", ""])
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
        "encoder.weight": {"$tensor": "encoder.weight"},
        "decoder.weight": {"$tensor": "encoder.weight"},
    }
    assert list(tensors) == ["encoder.weight"]
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


@pytest.mark.parametrize("leaf", [(1, 2), {1}, object(), b"bytes", {"key": {(1, 2): 3}}])
def test_what_is_not_plain_data_is_refused_with_its_path(leaf: object) -> None:
    with pytest.raises(TypeError, match="state at 'callbacks/mine"):
        split_tree({"callbacks": {"mine": leaf}})


def test_anything_that_gives_and_takes_state_is_stateful() -> None:
    assert isinstance(History(), Stateful)
    assert isinstance(nn.Linear(1, 1), Stateful)
    assert not isinstance(object(), Stateful)
