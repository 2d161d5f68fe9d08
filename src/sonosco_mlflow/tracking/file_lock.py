"""Locks between the processes of one machine, each for a block of code that changes something on its disk."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sonosco_mlflow.processes import end_with_parent


@contextmanager
def locked(path: Path, waits: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock between processes; ``waits`` is called once if another one has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def stage_of_dvc(name: str, workspace: Path, waits: Callable[[], object]) -> Iterator[None]:
    """Have a data stage end with the DVC that has started it, and wait until no other process is at the same one.

    DVC's own lock goes with a DVC that is killed alone, whose stage would go on; and DVC, called again, removes what
    the stage is filling.

    Args:
        name: of the stage.
        workspace: where DVC runs it.
        waits: called once if it has to wait.
    """
    end_with_parent()
    with locked(workspace / ".sonosco" / "locks" / f"{name}.lock", waits):
        yield
