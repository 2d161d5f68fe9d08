"""State as data: a tree of plain values and tensors, as deterministic JSON and safetensors bytes.

Anything with state offers ``state_dict()`` and ``load_state_dict()``. The leaves of a state tree are tensors, ints,
floats, strings, bools and None; its nodes are lists and dicts with string or integer keys. Equal trees give the same
bytes, whatever the order of their keys, and reading the bytes gives the same tree: NaN, infinities, integer keys and
tied tensors included. Two things come back plainer than they went: an OrderedDict (torch's) as a dict, and numbers and
strings of numpy's that are Python's too (``np.float64``) as Python's.

>>> documents, tensors = split_tree({"lr": float("nan"), "moments": {0: torch.zeros(2)}})
>>> documents["lr"], sorted(tensors)
({'$float': 'nan'}, ['moments/[0]'])
"""

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Protocol, cast, runtime_checkable

import safetensors.torch
import torch
from torch import Tensor

from sonosco_mlflow.serialization.documents import DEEPEST, is_readable, is_text

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Tree = object  # None | bool | int | float | str | Tensor | list[Tree] | dict[str | int, Tree]


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> dict[str, object]:
        """Return the whole state as a tree."""
        ...

    def load_state_dict(self, state: dict[str, object]) -> object:
        """Become what :meth:`state_dict` described."""
        ...


def encode_float(value: float) -> Json:
    """Return ``value`` as JSON: itself where it is finite, else tagged (JSON has no NaN and no infinities)."""
    return value if math.isfinite(value) else {"$float": repr(float(value))}


def split_tree(tree: Tree, copy: bool = False) -> tuple[Json, dict[str, Tensor]]:
    """Part a state tree into a JSON document and its tensors by path.

    Args:
        tree: the state.
        copy: give every tensor as a contiguous copy of its own on the CPU, which shares memory with nothing: what
            happens to the original later does not show. Tied tensors are copied once. Without it, a tensor that is
            contiguous on the CPU already is given as it is, detached.

    Raises:
        TypeError: a leaf is not plain data, or a key neither text nor integer; the message gives its path.
        ValueError: a string is not valid Unicode, a number too long, or the tree too deep; the message gives its path.
    """
    parting = _Parting(copy)
    return parting.document(tree, ""), parting.tensors


class _Parting:
    """One tree being parted."""

    def __init__(self, copy: bool) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._copy = copy
        self._names_by_view: dict[tuple[object, ...], str] = {}
        self._depth = 0

    def document(self, node: Tree, path: str) -> Json:
        match node:
            case None | bool():
                return node
            case Tensor():
                return {"$tensor": self._place(node, path)}
            case Enum():
                raise TypeError(f"the state at '{path[1:]}' is {node!r}; write its name or value instead")
            case int():
                if not is_readable(node):
                    raise ValueError(f"the state at '{path[1:]}' is a number of {node.bit_length()} bits, too long")
                return int(node)
            case float():
                return encode_float(float(node))
            case str():
                return _text(str(node), path)
        if self._depth == DEEPEST:
            raise ValueError(f"the state at '{path[1:200]}...' is more than {DEEPEST} deep, or contains itself")
        self._depth += 1
        try:
            return self._inner_node(node, path)
        finally:
            self._depth -= 1

    def _inner_node(self, node: Tree, path: str) -> Json:
        if type(node) is list:
            return [self.document(child, f"{path}/{i}") for i, child in enumerate(node)]
        if type(node) in (dict, OrderedDict):
            return self._mapping(cast(dict[object, Tree], node), path)
        remedy = "convert it with .item()" if hasattr(node, "item") else "convert it"
        raise TypeError(
            f"the state at '{path[1:]}' is a {type(node).__qualname__}; state may hold tensors, numbers, "
            f"strings, bools, None, lists and dicts only: {remedy}"
        )

    def _mapping(self, node: dict[object, Tree], path: str) -> Json:
        steps = {key: _path_step(key, path) for key in node}
        # In one order, whatever that of insertion: the names of tied tensors depend on it too.
        children = {
            key: self.document(node[key], f"{path}/{steps[key]}") for key in sorted(steps, key=steps.__getitem__)
        }
        if any(isinstance(key, int) or (isinstance(key, str) and key.startswith("$")) for key in children):
            return {"$pairs": [[cast(int | str, key), child] for key, child in children.items()]}
        return cast(dict[str, Json], children)

    def _place(self, tensor: Tensor, path: str) -> str:
        name = path[1:]
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise TypeError(f"the state at '{name}' is a sparse, quantized or empty (meta) tensor; convert it")
        if tensor.dtype is torch.complex128:
            raise TypeError(f"the state at '{name}' is complex128, which safetensors lacks; use torch.view_as_real")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        # safetensors refuses tensors that share memory; tied ones are stored once and named twice.
        view = (
            tensor.device,
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel():
            name = self._names_by_view.setdefault(view, name)
        if name not in self.tensors:
            self.tensors[name] = _owned(tensor) if self._copy else tensor.to("cpu").contiguous()
        return name


def _owned(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        # From another device it is a copy already.
        return tensor.to("cpu").contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def _text(text: str, path: str) -> str:
    if not is_text(text):
        raise ValueError(f"the state at '{path[1:]}' holds {text!r}, which is not valid Unicode")
    return text


def _path_step(key: object, path: str) -> str:
    # Keys that would read alike as a path (1 and "1", "a/b" and a nested b) must not name the same tensor.
    if type(key) is int:
        if not is_readable(key):
            raise ValueError(f"the state at '{path[1:]}' has a key of {key.bit_length()} bits, too long")
        return f"[{key}]"
    if type(key) is str:
        return _text(key, path).replace("~", "~0").replace("/", "~1").replace("[", "~2")
    raise TypeError(f"the state at '{path[1:]}' has a key {key!r}; keys may be strings and integers only")


def join_tree(document: Json, tensors: Mapping[str, Tensor]) -> Tree:
    """Put back together what :func:`split_tree` parted.

    Raises:
        ValueError: ``document`` is none of :func:`split_tree`'s, or names a tensor that is not among ``tensors``.
    """
    try:
        return _joined(document, tensors)
    except RecursionError as error:
        raise ValueError("the state is nested too deeply to be read") from error


def _joined(document: Json, tensors: Mapping[str, Tensor]) -> Tree:
    match document:
        case list():
            return [_joined(child, tensors) for child in document]
        case {"$float": "nan" | "inf" | "-inf" as text, **rest} if not rest:
            return float(text)
        case {"$tensor": str(name), **rest} if not rest:
            if name not in tensors:
                raise ValueError(f"the state names a tensor '{name}', which is not there")
            return tensors[name]
        case {"$pairs": list(pairs), **rest} if not rest:
            return _joined_pairs(pairs, tensors)
        case dict():
            wrong = [key for key in document if not isinstance(key, str) or key.startswith("$")]
            if wrong:
                raise ValueError(
                    f"the state holds {wrong[0]!r}, which is no tag of this version or does not fit its value"
                )
            return {key: _joined(child, tensors) for key, child in document.items()}
        case _:
            return document


def _joined_pairs(pairs: list[Json], tensors: Mapping[str, Tensor]) -> Tree:
    joined: dict[int | str, Tree] = {}
    for pair in pairs:
        match pair:
            case [bool(), _]:
                raise ValueError("the state has a truth value as a key")
            case [int() | str() as key, child] if key not in joined:
                joined[key] = _joined(child, tensors)
            case _:
                raise ValueError("the state's '$pairs' are not pairs of a key, which occurs once, and a value")
    return joined


def json_bytes(document: Json) -> bytes:
    """Return the one canonical form of ``document``: sorted keys, UTF-8, floats by ``repr``, a newline at the end."""
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return ``tensors`` as a safetensors file; equal tensors give equal bytes.

    Those that share memory with others, or are not contiguous, are copied first; all others are written as they are.
    """
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    shared = {address for address, count in Counter(storages).items() if count > 1}
    ready = {
        name: _owned(tensor.detach()) if address in shared or not tensor.is_contiguous() else tensor.detach()
        for (name, tensor), address in zip(tensors.items(), storages, strict=True)
    }
    return safetensors.torch.save(dict(sorted(ready.items())))
