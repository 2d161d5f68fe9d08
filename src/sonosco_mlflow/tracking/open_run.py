"""A run while this process writes to it: the run, its lease, its record and its console log; ended once, in one place.

A run ends as ``finished``, ``interrupted`` or ``failed``, and tells MLflow last. Whatever keeps it from that leaves a
run that is seen to have vanished, which the next command can continue. One that another process has taken over is only
let go of: nothing more is written to it. The store is only ever asked in a thread of its own, so that one that hangs
keeps no process that wants to end.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from signal import SIGINT

from sonosco_mlflow.background import OverdueError, within
from sonosco_mlflow.console import console_log
from sonosco_mlflow.errors import describe_failure
from sonosco_mlflow.tracking.description import describe_run
from sonosco_mlflow.tracking.lease import Lease
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.recording import Recording
from sonosco_mlflow.tracking.store import find_run
from sonosco_mlflow.training.interruption import LeaveAtOnce, deferred_interrupts

PATIENCE_AT_STOP = 30.0
"""Seconds that a run which was told to stop waits for a tracking server that is away."""
LONGEST_STOP = 60.0
"""Seconds after which it stops all the same: a server may also be there, and not answer."""
PATIENCE_AT_LEAVE = 2.0
"""Seconds in which a server may still be told by a process that is to leave at once."""


class OpenRun:
    """What a process has in its hands of a run.

    Args:
        run: the run.
        lease: this process's right to train it.
        folder: the run's own files.
        is_open: whether it is written to from now on; one that is to go on is not, until that has proven right.

    Attributes:
        recording: its journal, TensorBoard and checkpoints.
    """

    def __init__(self, run: TrackedRun, lease: Lease, folder: Path, *, is_open: bool) -> None:
        self.run = run
        self.lease = lease
        self.recording = Recording(run, lease, folder, is_current=is_open)
        self.is_open = is_open
        self._ending = threading.Lock()
        self._has_ended = False
        self._resources = ExitStack()
        segment = run.segment if is_open else run.segment + 1
        # The log of an earlier segment may lie on another machine.
        self._log = folder / ("console.log" if segment == 1 else f"console-{segment}.log")
        self._resources.enter_context(console_log(self._log))

    def describe(self) -> None:
        """Say in the run's description what it now is; for a reader only, so that what fails here fails no run."""
        with suppress(Exception):
            self.run.describe(describe_run(find_run(self.run.id)))

    def close(self, state: str, error: Exception | None = None) -> None:
        """Deliver what waits and end the run; one that is not open is let go of as it is.

        Args:
            state: ``finished``, ``interrupted`` or ``failed``.
            error: why it failed.

        Raises:
            Exception: a run cannot be called finished, because something of it could not be delivered.
            LeaveAtOnce: an interrupt from the keyboard meanwhile; the run is then interrupted.
        """
        if not self.is_open:
            self._resources.close()
            self.lease.release()
            return
        message = "" if error is None else describe_failure(error)
        try:
            with deferred_interrupts(obeyed=SIGINT):
                self.is_open = False
                self._resources.close()
                # A run that is complete is worth waiting for; one that stops has its state on the disk.
                within(None if state == "finished" else LONGEST_STOP, partial(self._conclude, state, message))
        except LeaveAtOnce:
            self._leave(partial(self._end, "interrupted"))
            raise
        except OverdueError as hanging:
            print(f"run {self.run.id} is left as it is, and can be continued: {hanging}", file=sys.stderr)
        finally:
            # Whatever became of it: what MLflow holds for active when the process ends, it calls finished.
            self.run.deactivate()

    def leave(self) -> None:
        """End the run without waiting for anything: what MLflow does not take at once, it is not told."""
        was_open, self.is_open = self.is_open, False
        self._leave(partial(self._end, "interrupted") if was_open else self.lease.release)

    def _leave(self, tell: Callable[[], None]) -> None:
        self._resources.close()
        self.run.deactivate(patience=0.0)
        self.recording.stop()
        with suppress(OverdueError):
            within(PATIENCE_AT_LEAVE, tell)

    def _conclude(self, state: str, message: str) -> None:
        try:
            self._deliver_rest(state, message)
        except Exception as second:
            if state == "finished":
                self._end("failed", describe_failure(second))
                raise
            # The first reason is the one to tell.
            print(f"MLflow lacks some of what run {self.run.id} recorded last: {second}", file=sys.stderr)
        self._end(state, message)

    def _deliver_rest(self, state: str, message: str) -> None:
        """Deliver what waits, the console log, and what is written at the end."""
        with suppress(OSError), self._log.open("a", encoding="utf-8") as log:
            # Where the disk is full, the run's tag has the message all the same.
            log.write(message + "\n" if message else "")
        try:
            self.lease.check()
            self.recording.background.settle(PATIENCE_AT_STOP)
            if state == "finished":
                self.recording.background.check()
            # While it waited, another process may have come.
            self.lease.confirm()
            self.run.log_file(self._log, "logs")
        finally:
            self.recording.close()
        self.recording.deliver_end()
        self._close_ledger()

    def _close_ledger(self) -> None:
        try:
            self.run.close_ledger()
        except Exception as error:
            # All that the run made is delivered; only its files' digests are not kept together.
            print(f"run {self.run.id} has no ledger, and less of it can be verified: {error}", file=sys.stderr)

    def _end(self, state: str, message: str = "") -> None:
        """Tell MLflow how the run ended, once, if it is this process's still."""
        with self._ending, self.lease:
            if self._has_ended:
                return
            self._has_ended = True
            try:
                self.lease.confirm()
                self.run.end(state, message)
            except Exception as error:
                if state == "finished":
                    raise
                # The next command finds the run as vanished, and can continue it.
                print(f"MLflow could not be told that run {self.run.id} is {state}: {error}", file=sys.stderr)
                return
            # Last: the description is of how it ended.
            self.describe()
