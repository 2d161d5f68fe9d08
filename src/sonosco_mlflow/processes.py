"""Processes and those that they start: one hears of an interrupt, the other of its starter's end."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 0.5


def end_with_parent() -> None:
    """Have this process end, as if it were killed, soon after its parent has ended, however that was.

    Nobody is left who would take what it makes, and a successor may already be at the same work.
    """
    threading.Thread(target=_watch, args=(os.getppid(),), name="sonosco-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def run_interruptibly(
    command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None, output: int | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a process that saves its state when it is interrupted, and return how it ended.

    In a session of its own: of an interrupt from the keyboard it hears from here, once, and it is waited for.

    Args:
        command: the program and its arguments.
        folder: where it runs.
        variables: of its environment; by default this process's.
        output: ``subprocess.PIPE`` to have what it prints, or None to have it printed.

    Raises:
        KeyboardInterrupt: this process was interrupted; the other one has ended.
    """
    with subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, printed)
