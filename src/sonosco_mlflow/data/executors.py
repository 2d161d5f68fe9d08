"""Where many small tasks are done: in processes of this machine, or on a cluster of dask's.

Whoever has tasks says what is to be done with one, and gets the results in the order of the tasks, whoever did them.

>>> list(Processes(2).map(abs, [-1, 2, -3]))  # doctest: +SKIP
[1, 2, 3]
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeVar

import torch

from sonosco_mlflow.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_WAITING_FOR_EACH_CORE = 4


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
        """Yield the results; see :class:`Executor`."""
        with multiprocessing.get_context("fork").Pool(min(self.count, max(len(tasks), 1)), _start_worker) as pool:
            yield from pool.imap(function, tasks)


class Cluster:
    """A cluster of ``dask.distributed``, whose workers see this machine's files under the same paths.

    Args:
        address: of its scheduler (``tcp://host:8786``).
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield the results; see :class:`Executor`. Only so many tasks are out at once as keep the workers busy.

        Raises:
            UserError: ``dask.distributed`` is not installed, or no scheduler answers.
        """
        try:
            distributed = import_module("distributed")
        except ImportError as error:
            raise UserError(
                f"data.cluster: found '{self.address}', but dask.distributed is not installed; install "
                "'sonosco-mlflow[cluster]'"
            ) from error
        try:
            client = distributed.Client(self.address, set_as_default=False, timeout=10)
        except (OSError, ValueError) as error:
            raise UserError(f"data.cluster: no scheduler of dask's answers at '{self.address}' ({error})") from error
        with client:
            most = _WAITING_FOR_EACH_CORE * max(sum(client.ncores().values()), 1)
            waiting: deque[Any] = deque()
            for task in tasks:
                # Not pure: dask would take equal tasks for one, and remember results.
                waiting.append(client.submit(_on_one_thread, function, task, pure=False))
                if len(waiting) >= most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def _start_worker() -> None:
    # The pool ends its workers by it: one that does something else with it may be waited for without end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _on_one_thread(function: Callable[[Task], Result], task: Task) -> Result:
    torch.set_num_threads(1)
    return function(task)
