"""State as data: a tree of plain values and tensors, as deterministic JSON and safetensors bytes.

Anything with state offers ``state_dict()`` and ``load_state_dict()``. The leaves of a state tree are tensors, ints,
floats, strings, bools and None; its nodes are lists and dicts with string or integer keys. The same tree always gives
the same bytes, and reading the bytes gives the same tree: NaN, infinities, integer keys and tied tensors included.

>>> documents, tensors = split_tree({"lr": float("nan"), "moments": {0: torch.zeros(2)}})
>>> documents["lr"], sorted(tensors)
({'$float': 'nan'}, ['moments/[0]'])
"""

import json
import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import safetensors.torch
import torch
from torch import Tensor

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
    return value if math.isfinite(value) else {"$float": repr(value)}


def split_tree(tree: Tree) -> tuple[Json, dict[str, Tensor]]:
    """Part a state tree into a JSON document and its tensors by path.

    Raises:
        TypeError: a leaf is not plain data; the message gives its path.
    """
    tensors: dict[str, Tensor] = {}
    names_by_storage: dict[tuple[object, ...], str] = {}

    def visit(node: Tree, path: str) -> Json:
        match node:
            case None | bool() | int() | str():
                return node
            case float():
                return encode_float(node)
            case Tensor():
                return {"$tensor": place(node, path)}
            case list():
                return [visit(child, f"{path}/{i}") for i, child in enumerate(node)]
            case dict():
                children = {key: visit(child, f"{path}/{_path_step(key, path)}") for key, child in node.items()}
                if any(isinstance(key, int) or key.startswith("$") for key in children):
                    pairs: list[Json] = [[key, child] for key, child in children.items()]
                    return {"$pairs": pairs}
                return children
            case _:
                raise TypeError(
                    f"the state at '{path[1:]}' is a {type(node).__qualname__}; state may hold tensors, numbers, "
                    "strings, bools, None, lists and dicts only"
                )

    def place(tensor: Tensor, path: str) -> str:
        name = path[1:]
        tensor = tensor.detach()
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
            name = names_by_storage.setdefault(view, name)
        tensors[name] = tensor.to("cpu").contiguous()
        return name

    return visit(tree, ""), tensors


def _path_step(key: object, path: str) -> str:
    # Keys that would read alike as a path (1 and "1", "a/b" and a nested b) must not name the same tensor.
    match key:
        case int():
            return f"[{key}]"
        case str():
            return key.replace("~", "~0").replace("/", "~1").replace("[", "~2")
    raise TypeError(f"the state at '{path[1:]}' has a key {key!r}; keys may be strings and integers only")


def join_tree(document: Json, tensors: Mapping[str, Tensor]) -> Tree:
    """Put back together what :func:`split_tree` parted."""
    match document:
        case list():
            return [join_tree(child, tensors) for child in document]
        case {"$float": str(text), **rest} if not rest:
            return float(text)
        case {"$tensor": str(name), **rest} if not rest:
            return tensors[name]
        case {"$pairs": list(pairs), **rest} if not rest:
            return {pair[0]: join_tree(pair[1], tensors) for pair in pairs}  # type: ignore[index]
        case dict():
            return {key: join_tree(child, tensors) for key, child in document.items()}
        case _:
            return document


def json_bytes(document: Json) -> bytes:
    """Return the one canonical form of ``document``: sorted keys, UTF-8, floats by ``repr``, a newline at the end."""
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return ``tensors`` as a safetensors file; equal tensors give equal bytes."""
    # Tensors that overlap without being the same view are parted: safetensors would refuse them.
    owned = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return safetensors.torch.save(dict(sorted(owned.items())))
