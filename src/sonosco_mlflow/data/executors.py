"""Where many small tasks are done: in processes of this machine, or on a cluster of dask's.

Whoever has tasks says what is to be done with one, and gets the results in the order of the tasks, whoever did them.

>>> list(Processes(2).map(abs, [-1, 2, -3]))  # doctest: +SKIP
[1, 2, 3]
"""

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from typing import Protocol, TypeVar

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.processes import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")

# Tasks that are out for each worker: so many keep it busy.
_WAITING_FOR_EACH = 4
_SECONDS_FOR_A_WORKER = 60


class Executor(Protocol):
    """Something that does tasks."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield what ``function`` makes of each of ``tasks``, in their order.

        Function, tasks and results must be picklable. An error of the function's is raised here; tasks that have not
        been begun are dropped when it is, or when the iterator is left.
        """
        ...


class Processes:
    """Processes of this machine, each with one thread.

    Args:
        count: how many.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield the results; see :class:`Executor`.

        Raises:
            UserError: one of the processes was killed, as the system does where memory runs out.
        """
        count = min(self.count, max(len(tasks), 1))
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start_worker)
        try:
            yield from _results(lambda task: pool.submit(function, task).result, tasks, _WAITING_FOR_EACH * count)
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {count} processes was killed while it worked, most likely because the memory was full; set "
                "data.processes (--processes) lower, or close other programs, and begin again"
            ) from error
        finally:
            # What is under way is a few tasks. An iterator that is not asked for more than it has ends here, too.
            pool.shutdown(cancel_futures=True)


class Cluster:
    """A cluster of ``dask.distributed``, whose workers see this machine's files under the same paths.

    Args:
        address: of its scheduler (``tcp://host:8786``).
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield the results; see :class:`Executor`.

        Raises:
            UserError: ``dask.distributed`` is not installed, no scheduler answers, or it has no worker.
        """
        try:
            distributed = import_module("distributed")
        except ImportError as error:
            raise UserError(
                f"data.cluster: found '{self.address}', but dask.distributed is not installed: `uv pip install "
                "distributed`, or the extra 'cluster'"
            ) from error
        try:
            client = distributed.Client(self.address, set_as_default=False, timeout=10)
        except (OSError, ValueError) as error:
            raise UserError(f"data.cluster: no scheduler of dask's answers at '{self.address}' ({error})") from error
        with client:
            try:
                client.wait_for_workers(1, timeout=_SECONDS_FOR_A_WORKER)
            except TimeoutError as error:
                raise UserError(
                    f"data.cluster: the scheduler at '{self.address}' has no worker; start one with `dask worker "
                    f"{self.address}`"
                ) from error
            most = _WAITING_FOR_EACH * max(sum(client.ncores().values()), 1)
            # Not pure: dask would take equal tasks for one, and remember results.
            yield from _results(
                lambda task: client.submit(_on_one_thread, function, task, pure=False).result, tasks, most
            )


def _results(submit: Callable[[Task], Callable[[], Result]], tasks: Sequence[Task], most: int) -> Iterator[Result]:
    """Yield the tasks' results in their order; ``submit`` has one begun, and returns what waits for its result.

    No more than ``most`` are out at once, done or not: were the workers quicker than who takes the results, these would
    fill the memory.
    """
    waiting: deque[Callable[[], Result]] = deque()
    for task in tasks:
        waiting.append(submit(task))
        if len(waiting) >= most:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _start_worker() -> None:
    # An interrupt is for the parent, which then ends its workers; where it has been killed it cannot.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    # It takes seconds to import, and tasks that need it have had it imported in the parent.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _on_one_thread(function: Callable[[Task], Result], task: Task) -> Result:
    import torch

    torch.set_num_threads(1)
    return function(task)
