"""Work that must not hold up the training: one thread that writes to the disk, and one that delivers what was written.

They are two so that a tracking server that neither answers nor refuses keeps no state from the disk. What it refuses
for being away is tried again until it is back. Any other error ends its thread's work, not the other's, and is raised
where the training asks for it, at its next step: a store that refuses what it is sent keeps no state from the disk
either. What is left to do when the training has ended is tried again here, by the same rule (:func:`persist`).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from sonosco_mlflow.errors import UserError

T = TypeVar("T")
_OF_ITS_OWN = "sonosco-within"
Task = Callable[[], object]
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0


class OverdueError(Exception):
    """A call has not returned in its time."""


class _Lane:
    """Tasks that one thread does in their order."""

    def __init__(self) -> None:
        self.waiting: deque[Task] = deque()
        self.running = False
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    @property
    def is_settled(self) -> bool:
        """Whether nothing of it is done any more, or will be."""
        return not self.running and (self.error is not None or not self.waiting)


class Background:
    """One thread for tasks that write and one for tasks that deliver, each in order.

    Args:
        is_away: whether an error of a delivery means that the other side is away and will be back.
    """

    def __init__(self, is_away: Callable[[Exception], bool] = lambda error: False) -> None:
        self._is_away = is_away
        self._changed = threading.Condition()
        self._writes = _Lane()
        self._deliveries = _Lane()
        self._closed = False
        self._pauses = _pauses()
        self._not_before = 0.0
        self.absence: Exception | None = None
        """Why deliveries wait, or None."""

    def write(self, task: Task) -> None:
        """Have ``task`` done next; waits while another one is waiting, so that snapshots do not pile up.

        Raises:
            Exception: of the first task that failed to write.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._writes.waiting or self._writes.error is not None)
            if self._writes.error is not None:
                raise self._writes.error
            self._add(self._writes, task)

    def deliver(self, task: Task) -> None:
        """Have ``task`` done after the deliveries that were handed in before it; it must be one that can be repeated.

        It may run while something is being written: what it reads may be replaced or removed meanwhile. After a
        delivery that failed nothing more is delivered, which :meth:`check` tells.
        """
        with self._changed:
            self._add(self._deliveries, task)

    def check(self) -> None:
        """Raise what a task raised.

        Raises:
            Exception: of the first task that failed to write, or else to deliver.
        """
        for lane in (self._writes, self._deliveries):
            if lane.error is not None:
                raise lane.error

    @property
    def cannot_write(self) -> bool:
        """Whether a task has failed to write; nothing handed in is written any more."""
        return self._writes.error is not None

    def finish_writes(self) -> None:
        """Return when everything is on the disk.

        Raises:
            Exception: of the first task that failed to write.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._writes.is_settled)
            if self._writes.error is not None:
                raise self._writes.error

    def settle(self, patience: float | None = None) -> None:
        """Return when everything is delivered that can be.

        Args:
            patience: seconds to wait for the other side, or None for as long as it takes.

        Raises:
            UserError: patience came to its end.
        """
        lanes = (self._writes, self._deliveries)
        with self._changed:
            done = self._changed.wait_for(lambda: all(lane.is_settled for lane in lanes), patience)
            count = sum(len(lane.waiting) + lane.running for lane in lanes)
        if not done:
            reason = self.absence or "no answer"
            raise UserError(f"{count} deliveries have waited {patience:.0f} s: {reason}")

    def finish(self, patience: float | None = None) -> None:
        """Return when everything is delivered; as :meth:`settle`, and raises what :meth:`check` does."""
        self.settle(patience)
        self.check()

    def close(self) -> None:
        """Tell the threads to end; what they have not begun by now stays undone."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """Return when the threads of a closed Background have ended what they were at."""
        for lane in (self._writes, self._deliveries):
            if lane.thread is not None:
                lane.thread.join()

    def _add(self, lane: _Lane, task: Task) -> None:
        if self._closed:
            raise RuntimeError("this Background is closed; nothing handed in would be done")
        lane.waiting.append(task)
        if lane.thread is None:
            # A daemon: a process that leaves at once must not wait for a server.
            lane.thread = threading.Thread(target=self._work, args=(lane,), name="sonosco-background", daemon=True)
            lane.thread.start()
        self._changed.notify_all()

    def _work(self, lane: _Lane) -> None:
        while (task := self._next(lane)) is not None:
            try:
                task()
            except BaseException as error:
                # Whatever it is: a thread that died of it would leave others waiting for what it never does.
                self._after_error(error, task, lane)
            else:
                self._after_success(lane)

    def _next(self, lane: _Lane) -> Task | None:
        with self._changed:
            while not self._closed:
                pause = self._not_before - time.monotonic() if lane is self._deliveries else 0.0
                if lane.error is None and lane.waiting and pause <= 0:
                    # Taken away at once: whoever waits to hand in the next snapshot may now.
                    lane.running = True
                    self._changed.notify_all()
                    return lane.waiting.popleft()
                self._changed.wait(pause if lane.waiting and pause > 0 else None)
        return None

    def _after_success(self, lane: _Lane) -> None:
        with self._changed:
            lane.running = False
            if lane is self._deliveries:
                self.absence, self._pauses = None, _pauses()
            self._changed.notify_all()

    def _after_error(self, error: BaseException, task: Task, lane: _Lane) -> None:
        with self._changed:
            lane.running = False
            if lane is self._deliveries and isinstance(error, Exception) and self._is_away(error):
                lane.waiting.appendleft(task)
                self.absence = error
                self._not_before = time.monotonic() + next(self._pauses)
            else:
                lane.error = error
            self._changed.notify_all()


def persist(task: Task, is_away: Callable[[Exception], bool], patience: float) -> None:
    """Do ``task`` here, and again for as long as the other side is away; it must be one that can be repeated.

    Args:
        task: what is to be done.
        is_away: whether an error means that the other side is away and will be back.
        patience: seconds after the first such error in which it is tried again.

    Raises:
        Exception: what ``task`` raised last.
    """
    until = None
    for pause in _pauses():
        try:
            task()
        except Exception as error:
            now = time.monotonic()
            until = now + patience if until is None else until
            if not is_away(error) or now + pause > until:
                raise
        else:
            return
        time.sleep(pause)


def _pauses() -> Iterator[float]:
    """Yield the seconds to wait before each further try."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def within(seconds: float | None, task: Callable[[], T]) -> T:
    """Return what ``task`` returns, which is done in a thread of its own: a call that hangs, hangs there.

    Args:
        seconds: to wait for it, or None for as long as it takes.
        task: what is to be done; it goes on after its time, unless the process ends.

    Raises:
        OverdueError: it took longer.
        Exception: whatever it raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(task())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=_OF_ITS_OWN, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise OverdueError(f"no answer in {seconds:.0f} s")
    return results[0]


def is_hanging() -> bool:
    """Return whether a call of :func:`within` has not come back by now.

    It is in a daemon's thread; but where it has brought threads of a pool to hang with it, the interpreter waits for
    these as it ends.
    """
    return any(thread.name == _OF_ITS_OWN for thread in threading.enumerate())
