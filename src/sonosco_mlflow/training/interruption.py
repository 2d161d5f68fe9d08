"""Signals that stop a run, put off until its state is consistent.

An interrupt in the middle of a step would leave half of the parameters moved. While training, the first SIGINT or
SIGTERM is therefore only noted, and raised at the next safe point; when it comes again, it is raised at once, and
nothing more is saved: what was saved by then stays.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM; handled like an interrupt from the keyboard."""


class LeaveAtOnce(KeyboardInterrupt):
    """The same signal came again: whoever sent it does not want to wait for a state to be saved."""


def raise_on_termination() -> None:
    """Let SIGTERM raise :class:`Terminated` in this process, as SIGINT raises :class:`KeyboardInterrupt`."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


class Interruption:
    """What was asked for by signal, and not yet obeyed."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note the first, raise :class:`LeaveAtOnce` when it comes again.

        ``mlflow run`` turns one interrupt from the keyboard into a SIGINT and, a moment later, a SIGTERM: another
        signal than the first says nothing new.
        """
        if self.requested == number:
            raise LeaveAtOnce
        self.requested = self.requested or signal.Signals(number)

    def request(self) -> None:
        """Ask for an interrupt as SIGINT does; from any thread."""
        self.requested = self.requested or signal.SIGINT

    def raise_if_requested(self) -> None:
        """Raise what was noted: :class:`KeyboardInterrupt`, or :class:`Terminated` for SIGTERM."""
        requested, self.requested = self.requested, None
        if requested is signal.SIGINT:
            raise KeyboardInterrupt
        if requested is signal.SIGTERM:
            raise Terminated


@contextmanager
def deferred_interrupts(
    interruption: Interruption | None = None, *, obeyed: signal.Signals | None = None
) -> Iterator[Interruption]:
    """Put off signals while the block runs; the caller asks ``interruption`` at its safe points.

    Outside the main thread Python delivers no signals, and nothing is changed.

    Args:
        interruption: notes what is asked for.
        obeyed: a signal that is being obeyed by this block: when it comes now, it comes again, and is raised at once.
    """
    interruption = interruption or Interruption()
    interruption.requested = obeyed or interruption.requested
    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, interruption.note) for number in SIGNALS} if is_main else {}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        requested, interruption.requested = interruption.requested, None
    if is_main and requested != obeyed:
        # It came after the last safe point.
        interruption.requested = requested
        interruption.raise_if_requested()
