"""Faults at a seam: the N-th operation kills the process, fails, or is cut short.

There are two seams. ``disk`` is :mod:`sonosco_mlflow.serialization.durable`, the one module that writes durably, whose
``os`` is replaced. ``store`` is MLflow's client and its artifact repository, in the process that calls them.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from sonosco_mlflow.serialization import durable

DISK = ("open", "write", "fsync", "close", "replace", "unlink", "rmdir", "mkdir")
CLIENT = ("log_batch", "log_metric", "set_tag", "delete_tag", "set_terminated", "update_run", "log_inputs")
ARTIFACTS = ("log_artifact", "delete_artifacts")


@dataclass(frozen=True)
class Fault:
    """What happens at the ``number``-th operation (from 1) of those named.

    Attributes:
        kind: ``kill`` before it; ``tear``: write the first half, then kill; ``fail`` with ``error``; ``short``: every
            write takes half of what it is given.
        operations: which of the seam's operations count; all by default.
        lasts: whether every later one fails as well, as on a full disk.
    """

    kind: str
    number: int = 1
    seam: str = "disk"
    operations: tuple[str, ...] = ()
    error: int = 0
    lasts: bool = False


class Saboteur:
    """Counts the operations of one seam, notes each in a file, and commits the fault."""

    def __init__(self, seam: str, fault: Fault | None, log: Path) -> None:
        self.fault = fault if fault is not None and fault.seam == seam else None
        self._count = 0
        self._opened: dict[str, str] = {}
        self._lock = threading.Lock()
        # Unbuffered: the last line names the operation at which the process died.
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def operate(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with self._lock:
            subject = str(arguments[0]) if arguments else ""
            os.write(self._log, f"{name} {self._opened.get(subject, subject)}\n".encode())
            fault = self.fault
            if fault is None or (fault.operations and name not in fault.operations):
                is_due = False
            else:
                self._count += 1
                is_due = self._count == fault.number or (fault.lasts and self._count > fault.number)
        if fault is not None and fault.kind == "short" and name == "write":
            descriptor, content = arguments
            return function(descriptor, content[: max(1, len(content) // 2)])
        if not is_due:
            result = function(*arguments, **options)
            if name == "open":
                self._opened[str(result)] = subject
            return result
        assert fault is not None
        if fault.kind == "fail":
            # As the system does it: an operation on a descriptor knows no name.
            name_of = [str(arguments[0])] if isinstance(arguments[0], str | os.PathLike) else []
            raise OSError(fault.error, os.strerror(fault.error), *name_of)
        if fault.kind == "tear" and name == "write":
            function(arguments[0], arguments[1][: len(arguments[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


class SabotagedOs:
    """Stands for the module ``os``."""

    def __init__(self, saboteur: Saboteur) -> None:
        self._saboteur = saboteur

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in DISK:
            return function
        return lambda *arguments, **options: self._saboteur.operate(name, function, *arguments, **options)


def install(fault: Fault | None, disk_log: Path, store_log: Path) -> None:
    """Put both seams of this process under observation, and ``fault`` into the one that it is for."""
    durable.os = SabotagedOs(Saboteur("disk", fault, disk_log))  # type: ignore[assignment]
    store = Saboteur("store", fault, store_log)
    for owner, names in ((mlflow.MlflowClient, CLIENT), (LocalArtifactRepository, ARTIFACTS)):
        for name in names:
            _watch(store, owner, name)


def _watch(saboteur: Saboteur, owner: type, name: str) -> None:
    original = getattr(owner, name)

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        # The first argument of the client's methods is the run's id, which says less than what follows.
        return saboteur.operate(name, lambda *_: original(self, *arguments, **options), *arguments[1:2])

    setattr(owner, name, watched)
