"""Work that must not hold up the training: one thread that writes to the disk, and delivers what was written.

Writing comes before what waits to be delivered: a tracking server that refuses must not keep state from the disk. What
it refuses for being away is tried again until it is back. Any other error is raised where the training asks for it, at
its next step.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from sonosco_mlflow.errors import UserError

Task = Callable[[], object]
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0


class Background:
    """One thread for tasks in order: those that write, before those that deliver.

    Args:
        is_away: whether an error of a delivery means that the other side is away and will be back.
    """

    def __init__(self, is_away: Callable[[Exception], bool] = lambda error: False) -> None:
        self._is_away = is_away
        self._changed = threading.Condition()
        self._writes: deque[Task] = deque()
        self._deliveries: deque[Task] = deque()
        self._running = False
        self._closed = False
        self._error: BaseException | None = None
        self._pause = FIRST_PAUSE
        self._not_before = 0.0
        self._thread: threading.Thread | None = None
        self.absence: Exception | None = None
        """Why deliveries wait, or None."""

    def write(self, task: Task) -> None:
        """Have ``task`` done next; waits while another one is waiting, so that snapshots do not pile up."""
        self.check()
        with self._changed:
            self._start()
            self._changed.wait_for(lambda: not self._writes or self._error is not None)
            self._writes.append(task)
            self._changed.notify_all()

    def deliver(self, task: Task) -> None:
        """Have ``task`` done after what was handed in before it; it must be one that can be repeated."""
        self.check()
        with self._changed:
            self._start()
            self._deliveries.append(task)
            self._changed.notify_all()

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
            self._changed.wait_for(lambda: self._error is not None or not (self._writes or self._running))
        self.check()

    def finish(self, patience: float | None = None) -> None:
        """Return when everything is delivered.

        Args:
            patience: seconds to wait for the other side, or None for as long as it takes.

        Raises:
            UserError: patience came to its end.
            Exception: of the first task that failed.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._error is not None or not (self._writes or self._deliveries or self._running), patience
            )
        self.check()
        if not done:
            raise UserError(f"{len(self._deliveries)} deliveries have waited {patience:.0f} s: {self.absence}")

    def close(self) -> None:
        """End the thread; what is not done by now stays undone."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError("this Background is closed; nothing handed in would be done")
        if self._thread is None:
            # A daemon: a process that leaves at once must not wait for a server.
            self._thread = threading.Thread(target=self._work, name="sonosco-background", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            task, delivers = taken
            try:
                task()
            except BaseException as error:
                # Whatever it is: a thread that died of it would leave others waiting for what it never does.
                self._after_error(error, task, delivers)
            else:
                self._after_success(delivers)

    def _next(self) -> tuple[Task, bool] | None:
        with self._changed:
            while not self._closed:
                if self._error is None and self._writes:
                    # Taken away at once: whoever waits to hand in the next snapshot may now.
                    task = self._writes.popleft()
                    self._running = True
                    self._changed.notify_all()
                    return task, False
                wait = self._not_before - time.monotonic()
                if self._error is None and self._deliveries and wait <= 0:
                    self._running = True
                    return self._deliveries.popleft(), True
                self._changed.wait(wait if self._deliveries and wait > 0 else None)
        return None

    def _after_success(self, delivered: bool) -> None:
        with self._changed:
            self._running = False
            if delivered:
                self.absence, self._pause = None, FIRST_PAUSE
            self._changed.notify_all()

    def _after_error(self, error: BaseException, task: Task, delivers: bool) -> None:
        with self._changed:
            self._running = False
            if delivers and isinstance(error, Exception) and self._is_away(error):
                self._deliveries.appendleft(task)
                self.absence = error
                self._not_before = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
            else:
                self._error = error
            self._changed.notify_all()
