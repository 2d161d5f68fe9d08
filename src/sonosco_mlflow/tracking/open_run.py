"""A run while this process writes to it: the run, its lease, its record and its console log; ended once, in one place.

A run ends as ``finished``, ``interrupted`` or ``failed``, and tells MLflow last. Whatever keeps it from that leaves a
run that is seen to have vanished, which the next command can continue. One that another process has taken over is only
let go of: nothing more is written to it. The store is only ever asked in a thread of its own, so that one that hangs
keeps no process that wants to end.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from signal import SIGINT

from sonosco_mlflow.background import OverdueError, persist, within
from sonosco_mlflow.console import console_log, say
from sonosco_mlflow.tracking.description import describe_run
from sonosco_mlflow.tracking.lease import Lease
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.recording import Recording
from sonosco_mlflow.tracking.secrecy import describe_without_secrets, without_secrets
from sonosco_mlflow.tracking.store import find_run, is_away
from sonosco_mlflow.training.interruption import LeaveAtOnce, deferred_interrupts

PATIENCE_AT_END = 600.0
"""Seconds that a run waits at its end for a tracking server that is away."""
PATIENCE_AT_STOP = 30.0
"""Seconds that a run which was told to stop waits for a tracking server that is away."""
LONGEST_STOP = 60.0
"""Seconds after which it stops all the same: a server may also be there, and not answer."""
PATIENCE_AT_LEAVE = 2.0
"""Seconds in which a server may still be told by a process that is to leave at once."""


class _Phase(Enum):
    CLOSED = "not opened yet"
    OPEN = "open"
    ENDED = "ended, or about to"


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
        self._phase = _Phase.OPEN if is_open else _Phase.CLOSED
        self._lock = threading.Lock()
        # Set when whoever ends the run has done so, or has given it up.
        self._over = threading.Event()
        self._concluding = threading.Lock()
        self._telling = threading.Lock()
        self._told = False
        self._leaving = False
        self._resources = ExitStack()
        segment = run.segment if is_open else run.segment + 1
        # The log of an earlier segment may lie on another machine.
        self._log = folder / ("console.log" if segment == 1 else f"console-{segment}.log")
        self._resources.enter_context(console_log(self._log, without_secrets))

    @property
    def is_open(self) -> bool:
        """Whether the run is written to."""
        return self._phase is _Phase.OPEN

    def open(self) -> None:
        """Write to the run from now on: it has proven to be the one that is to go on."""
        self._phase = _Phase.OPEN

    def describe(self) -> None:
        """Say in the run's description what it now is; for a reader only, so that what fails here fails no run."""
        with suppress(Exception):
            self.run.describe(describe_run(find_run(self.run.id)))

    def complete(self, task: Callable[[], object]) -> None:
        """Deliver everything that waits, and then do ``task``, which writes to the store and can be repeated.

        Raises:
            UserError: another process has taken the run over, or the server stayed away from what waited.
            Exception: what went wrong; a server that is away is waited for before.
        """
        self.recording.finish(PATIENCE_AT_END)
        self._write(task, PATIENCE_AT_END)

    def close(self, state: str, error: Exception | None = None) -> None:
        """Deliver what waits and end the run; one that is not open is let go of as it is.

        Args:
            state: ``finished``, ``interrupted`` or ``failed``.
            error: why it failed.

        Raises:
            Exception: a run cannot be called finished, because something of it could not be delivered.
            LeaveAtOnce: an interrupt from the keyboard meanwhile; the run is then interrupted.
        """
        with self._lock:
            before, self._phase = self._phase, _Phase.ENDED
        if before is not _Phase.OPEN:
            self._let_go(before)
            return
        message = "" if error is None else describe_without_secrets(error)
        is_finished = state == "finished"
        try:
            # Of an interrupt this is the obeying: the next one is not to wait for it.
            with deferred_interrupts(obeyed=SIGINT if state == "interrupted" else None):
                self._close_resources()
                # A run that is complete is worth waiting for; one that stops has its state on the disk.
                patience = PATIENCE_AT_END + LONGEST_STOP if is_finished else LONGEST_STOP
                within(patience, partial(self._conclude, state, message))
        except LeaveAtOnce:
            self._leave(partial(self._tell, "interrupted"))
            raise
        except OverdueError as hanging:
            say(f"run {self.run.id} is left as it is, and can be continued: {hanging}")
            if is_finished:
                raise
        finally:
            # Whatever became of it: what MLflow holds for active when the process ends, it calls finished.
            self.run.deactivate()
            self._over.set()

    def leave(self) -> None:
        """End the run without waiting for anything: what MLflow does not take at once, it is not told."""
        with self._lock:
            before, self._phase = self._phase, _Phase.ENDED
        if before is _Phase.ENDED:
            return
        try:
            self._leave(partial(self._tell, "interrupted") if before is _Phase.OPEN else lambda: None)
        finally:
            self._over.set()

    def _let_go(self, before: "_Phase") -> None:
        """Do what is left to do for one that closes a run that was never opened, or is being closed already."""
        if before is _Phase.ENDED:
            # By another thread, or by this one before.
            self._over.wait()
            return
        try:
            self._close_resources()
            with suppress(OverdueError):
                within(LONGEST_STOP, self.lease.release)
        finally:
            self._over.set()

    def _leave(self, tell: Callable[[], None]) -> None:
        self._leaving = True
        self._close_resources()
        self.run.deactivate(patience=0.0)
        self.recording.stop()

        def tell_and_release() -> None:
            tell()
            # What was begun may still write: until it is done, nobody else is to.
            self.recording.close()
            with self._concluding:
                self.lease.release()

        with suppress(OverdueError):
            within(PATIENCE_AT_LEAVE, tell_and_release)

    def _close_resources(self) -> None:
        # Where the disk is full, the end of the console log is missing, and nothing else.
        with suppress(OSError):
            self._resources.close()

    def _conclude(self, state: str, message: str) -> None:
        with self._concluding, self.lease:
            try:
                self._deliver_rest(state, message)
            except Exception as second:
                if state == "finished":
                    self._tell("failed", describe_without_secrets(second))
                    raise
                # The first reason is the one to tell.
                say(f"MLflow lacks some of what run {self.run.id} recorded last: {second}")
            self._tell(state, message)

    def _deliver_rest(self, state: str, message: str) -> None:
        """Deliver what waits, the console log, and what is written at the end."""
        with suppress(OSError), self._log.open("a", encoding="utf-8") as log:
            # Where the disk is full, the run's tag has the message all the same.
            log.write(message + "\n" if message else "")
        patience = _patience_at_end_of(state)
        try:
            self.lease.check()
            self.recording.background.settle(max(patience, PATIENCE_AT_STOP))
            if state == "finished":
                self.recording.background.check()
            self._write(lambda: self.run.log_file(self._log, "logs"), patience)
        finally:
            self.recording.close()
        self._write(self.recording.deliver_end, patience)
        self._write(self._close_ledger, patience)

    def _write(self, task: Callable[[], object], patience: float) -> None:
        """Do ``task``, which writes to the run, if it is this process's still; a store that is away has its time."""

        def confirmed() -> None:
            # While it waited, another process may have come.
            self.lease.confirm()
            task()

        persist(confirmed, lambda error: is_away(error) and not self._leaving, patience)

    def _close_ledger(self) -> None:
        try:
            self.run.close_ledger()
        except Exception as error:
            if is_away(error):
                raise
            # All that the run made is delivered; only its files' digests are not kept together.
            say(f"run {self.run.id} has no ledger, and less of it can be verified: {error}")

    def _tell(self, state: str, message: str = "") -> None:
        """Tell MLflow how the run ended, once, if it is this process's still."""
        with self._telling:
            if self._told:
                return
            self._told = True
            try:
                self._write(lambda: self.run.end(state, message), _patience_at_end_of(state))
            except Exception as error:
                if state == "finished":
                    raise
                # The next command finds the run as vanished, and can continue it.
                say(f"MLflow could not be told that run {self.run.id} is {state}: {error}")
                return
            # Last: the description is of how it ended.
            self.describe()


def _patience_at_end_of(state: str) -> float:
    """Return the seconds that a store which is away is asked again: a run that stops has its state on the disk."""
    return PATIENCE_AT_END if state == "finished" else 0.0
