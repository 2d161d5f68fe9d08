"""Work that must not hold up the training: one thread that writes to the disk, and one that delivers what was written.

They are two so that a tracking server that neither answers nor refuses keeps no state from the disk. What it refuses
for being away is tried again until it is back. Any other error is raised where the training asks for it, at its next
step.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from sonosco_mlflow.errors import UserError

Task = Callable[[], object]
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0


class _Lane:
    """Tasks that one thread does in their order."""

    def __init__(self) -> None:
        self.waiting: deque[Task] = deque()
        self.running = False
        self.thread: threading.Thread | None = None

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running)


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
        self._error: BaseException | None = None
        self._pause = FIRST_PAUSE
        self._not_before = 0.0
        self.absence: Exception | None = None
        """Why deliveries wait, or None."""

    def write(self, task: Task) -> None:
        """Have ``task`` done next; waits while another one is waiting, so that snapshots do not pile up."""
        self.check()
        with self._changed:
            self._changed.wait_for(lambda: not self._writes.waiting or self._error is not None)
            self._add(self._writes, task)

    def deliver(self, task: Task) -> None:
        """Have ``task`` done after the deliveries that were handed in before it; it must be one that can be repeated.

        It may run while something is being written: what it reads may be replaced or removed meanwhile.
        """
        self.check()
        with self._changed:
            self._add(self._deliveries, task)

    def check(self) -> None:
        """Raise what a task raised.

        Raises:
            Exception: of the first task that failed. Nothing is done after it.
        """
        if self._error is not None:
            raise self._error

    @property
    def failed(self) -> bool:
        """Whether a task has failed; nothing handed in is done any more."""
        return self._error is not None

    def finish_writes(self) -> None:
        """Return when everything is on the disk.

        Raises:
            Exception: of the first task that failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._writes.is_idle)
        self.check()

    def finish(self, patience: float | None = None) -> None:
        """Return when everything is delivered.

        Args:
            patience: seconds to wait for the other side, or None for as long as it takes.

        Raises:
            UserError: patience came to its end.
            Exception: of the first task that failed.
        """
        lanes = (self._writes, self._deliveries)
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._error is not None or all(lane.is_idle for lane in lanes), patience
            )
            count = sum(len(lane.waiting) + lane.running for lane in lanes)
        self.check()
        if not done:
            reason = self.absence or "no answer"
            raise UserError(f"{count} deliveries have waited {patience:.0f} s: {reason}")

    def close(self) -> None:
        """End the threads; what is not done by now stays undone."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

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
                if self._error is None and lane.waiting and pause <= 0:
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
                self.absence, self._pause = None, FIRST_PAUSE
            self._changed.notify_all()

    def _after_error(self, error: BaseException, task: Task, lane: _Lane) -> None:
        with self._changed:
            lane.running = False
            if lane is self._deliveries and isinstance(error, Exception) and self._is_away(error):
                lane.waiting.appendleft(task)
                self.absence = error
                self._not_before = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
            else:
                self._error = error
            self._changed.notify_all()
