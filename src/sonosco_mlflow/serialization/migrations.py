"""Older checkpoints, made into what the current version would have written.

Each step takes objects and state of one schema to the next; reading applies those that are needed. A checkpoint of
every schema is kept with the tests and must load for ever.

1. first.
2. A trainer's state holds its last validation, and the state of Python's generator as a tensor; a ModelCheckpoint no
   longer says where it writes, nor what it removed.
3. A trainer's state holds what was done to the model's parameters after it was made, and what an optimizer's class adds
   to its state; the curves of a History are tensors; a TensorBoard no longer says where it writes.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

SCHEMA = 3

_CHECKPOINT_CALLBACK = "sonosco_mlflow.training.callbacks.model_checkpoint:ModelCheckpoint"
_BOARD_CALLBACK = "sonosco_mlflow.tracking.tensorboard:TensorBoard"


def _from_1(objects: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    trainer = state.get("trainer", {})
    if "progress" in trainer:
        callbacks = {name: dict(kept) for name, kept in trainer["callbacks"].items()}
        for name, kept in callbacks.items():
            if name.startswith("ModelCheckpoint"):
                kept.pop("dropped", None)
        python = trainer["generators"]["python"]
        generators = {**trainer["generators"], "python": {**python, "internal": torch.tensor(python["internal"])}}
        changed = {"callbacks": callbacks, "generators": generators, "validation": None}
        state = {**state, "trainer": {**trainer, **changed}}
    return _without_directory(objects, _CHECKPOINT_CALLBACK), state


def _from_2(objects: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    trainer = state.get("trainer", {})
    if "progress" in trainer:
        callbacks = {
            name: _as_tensors(kept) if re.fullmatch(r"History(-\d+)?", name) else kept
            for name, kept in trainer["callbacks"].items()
        }
        # What was done to the parameters is not known: they stay as the trainer has them.
        changed = {"callbacks": callbacks, "parameters": None}
        state = {**state, "trainer": {**trainer, **changed}, "optimizer": {**state["optimizer"], "own": {}}}
    return _without_directory(objects, _BOARD_CALLBACK), state


def _as_tensors(curves: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "steps": torch.tensor(curve["steps"], dtype=torch.int64),
            "values": torch.tensor(curve["values"], dtype=torch.float64),
        }
        for name, curve in curves.items()
    }


def _without_directory(document: Any, name: str) -> Any:
    if isinstance(document, list):
        return [_without_directory(item, name) for item in document]
    if not isinstance(document, dict):
        return document
    document = {key: _without_directory(item, name) for key, item in document.items()}
    if document.get("$object") == name:
        document["parameters"].pop("directory", None)
    return document


MIGRATIONS: dict[int, Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]] = {1: _from_1, 2: _from_2}
