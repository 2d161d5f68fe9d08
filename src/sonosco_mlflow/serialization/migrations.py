"""Older checkpoints, made into what the current version would have written.

Each step takes objects and state of one schema to the next; reading applies those that are needed. A checkpoint of
every schema is kept with the tests and must load for ever.

1. first.
2. A trainer's state holds its last validation, and the state of Python's generator as a tensor; a ModelCheckpoint no
   longer says where it writes, nor what it removed.
"""

from collections.abc import Callable
from typing import Any

import torch

SCHEMA = 2

_CHECKPOINT_CALLBACK = "sonosco_mlflow.training.callbacks.model_checkpoint:ModelCheckpoint"


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
    return _without_directories(objects), state


def _without_directories(document: Any) -> Any:
    if isinstance(document, list):
        return [_without_directories(item) for item in document]
    if not isinstance(document, dict):
        return document
    document = {key: _without_directories(item) for key, item in document.items()}
    if document.get("$object") == _CHECKPOINT_CALLBACK:
        document["parameters"].pop("directory", None)
    return document


MIGRATIONS: dict[int, Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]] = {1: _from_1}
