"""A run while this process writes to it: the run, its lease, its record and its console log; ended once, in one place.

A run ends as ``finished``, ``interrupted`` or ``failed``, and tells MLflow last. Whatever keeps it from that leaves a
run that is seen to have vanished, which the next command can continue. One that another process has taken over is only
let go of: nothing more is written to it.
"""

import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from signal import SIGINT

from sonosco_mlflow.console import console_log
from sonosco_mlflow.errors import UserError, describe_failure
from sonosco_mlflow.tracking.description import describe_run
from sonosco_mlflow.tracking.lease import Lease
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.recording import Recording
from sonosco_mlflow.tracking.store import find_run
from sonosco_mlflow.training.interruption import LeaveAtOnce, deferred_interrupts

PATIENCE_AT_STOP = 30.0
"""Seconds that a run which was told to stop waits for a tracking server that is away."""


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
        self.recording = Recording(run, lease, folder)
        self.is_open = is_open
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
        self.is_open = False
        message = "" if error is None else describe_failure(error)
        with self.lease, deferred_interrupts(obeyed=SIGINT):
            if self._is_lost():
                self._abandon()
                return
            try:
                self._deliver_rest(message)
            except LeaveAtOnce:
                self._end("interrupted")
                raise
            except Exception as second:
                if state == "finished":
                    self._end("failed", describe_failure(second))
                    raise
                # The first reason is the one to tell.
                print(f"MLflow lacks some of what run {self.run.id} recorded last: {second}", file=sys.stderr)
            self._end(state, message)

    def leave(self) -> None:
        """End the run without waiting for anything."""
        self.recording.background.close()
        self._resources.close()
        with self.lease:
            if not self.is_open:
                return
            self.is_open = False
            if self._is_lost():
                self._abandon()
            else:
                self._end("interrupted")

    def _is_lost(self) -> bool:
        try:
            self.lease.confirm()
        except UserError:
            return True
        except Exception:
            # Nobody can say. What is delivered asks again.
            return False
        return False

    def _abandon(self) -> None:
        self._resources.close()
        with suppress(OSError):
            self.recording.abandon()
        self.run.abandon()

    def _deliver_rest(self, message: str) -> None:
        """Deliver what waits, the console log, and what is written at the end."""
        self._resources.close()
        with suppress(OSError), self._log.open("a", encoding="utf-8") as log:
            # Where the disk is full, the run's tag has the message all the same.
            log.write(message + "\n" if message else "")
        if not self.recording.background.failed:
            self.recording.finish(PATIENCE_AT_STOP)
        self.run.log_file(self._log, "logs")
        self.recording.close()
        self._close_ledger()

    def _close_ledger(self) -> None:
        try:
            self.run.close_ledger()
        except Exception as error:
            # All that the run made is delivered; only its files' digests are not kept together.
            print(f"run {self.run.id} has no ledger, and less of it can be verified: {error}", file=sys.stderr)

    def _end(self, state: str, message: str = "") -> None:
        try:
            self.run.end(state, message)
        except Exception as error:
            if state == "finished":
                raise
            # The next command finds the run as vanished, and can continue it.
            print(f"MLflow could not be told that run {self.run.id} is {state}: {error}", file=sys.stderr)
            return
        # Last: the description is of how it ended.
        self.describe()
