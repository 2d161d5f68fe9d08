"""A trainer's description as what a state belongs to: the one that goes on must be made as the one that was saved.

Settings and code may be equal where the trainers are not: a program may take a learning rate from its command line.

>>> leaves({"$object": "torch.nn:Linear", "parameters": {"in_features": 4, "bias": True}})
{'': '"torch.nn:Linear"', 'in_features': '4', 'bias': 'true'}
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Set
from typing import Any

from sonosco_mlflow.serialization.parameters import qualified_name
from sonosco_mlflow.training.callbacks.averages import CheckpointAverage
from sonosco_mlflow.training.callbacks.model_checkpoint import ModelCheckpoint


def leaves(objects: Any) -> dict[str, str]:
    """Return what decides a state's way of a :class:`Serializer`'s document, each value as JSON under a dotted name.

    The number of epochs is not among it, nor when a state is saved, unless checkpoints are averaged: neither changes a
    bit of the states on the way. Nor is what is given anew, such as loaders, which have digests of their own.
    """
    idle = set() if _holds(objects, CheckpointAverage) else {qualified_name(ModelCheckpoint)}
    found = dict(_leaves(objects, "", idle))
    found.pop("epochs", None)
    return found


def compared(recorded: Any, present: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Return the leaves of both documents, without what a later version has added to the present one."""
    before, now = leaves(recorded), leaves(present)
    return before, {name: value for name, value in now.items() if name in before}


def digest(values: Mapping[str, str]) -> str:
    """Return the hexadecimal sha256 of leaves."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def difference(recorded: Mapping[str, str], present: Mapping[str, str]) -> str:
    """Say which values of two descriptions differ."""
    changed = [name for name in recorded if present.get(name) != recorded[name]]
    told = [f"{name or 'its class'} was {recorded[name]}, is {present.get(name, 'nothing')}" for name in changed]
    return "; ".join(told[:5]) + (f"; ... ({len(told)} in all)" if len(told) > 5 else "")


def _holds(document: Any, kind: type) -> bool:
    callbacks = document.get("parameters", {}).get("callbacks", []) if isinstance(document, dict) else []
    return any(isinstance(found, dict) and found.get("$object") == qualified_name(kind) for found in callbacks)


def _leaves(document: Any, name: str, idle: Set[str]) -> Iterator[tuple[str, str]]:
    """Yield the leaves of ``document``, which has that ``name``; of objects of ``idle`` classes, the class alone."""
    match document:
        case {"$object": kind, **rest}:
            yield name, json.dumps(kind)
            if kind not in idle:
                yield from _leaves(rest.get("parameters", {}), name, idle)
        case {"$external": _}:
            return
        case {"$pairs": [*pairs]}:
            for key, value in pairs:
                yield from _leaves(value, _below(name, key), idle)
        case {"$tuple": [*items]} | [*items]:
            yield _below(name, "length"), str(len(items))
            for number, item in enumerate(items):
                yield from _leaves(item, _below(name, number), idle)
        case dict():
            for key, value in document.items():
                yield from _leaves(value, _below(name, key), idle)
        case _:
            yield name, json.dumps(document)


def _below(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)
