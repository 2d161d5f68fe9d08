"""What a process that loads batches does beside loading them: signals, its parent's end, shared memory."""

import multiprocessing
import os
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from sonosco_mlflow.errors import UserError

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_BETWEEN_LOOKS = 2.0
_SHARED_MEMORY = "/dev/shm"


def leave_signals_to_main(worker: int) -> None:
    """Let a worker go on when the whole process group is told to stop: the main process finishes its step first.

    To torch a worker that a signal ends is an error, which it raises in the middle of a step. The main process alone
    may end a worker by SIGTERM, as torch does with those that hang. Torch's workers look whether their parent still is
    the one that they began with, and so never miss one that was killed before they had begun: here they end too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    main = multiprocessing.parent_process()
    assert main is not None
    threading.Thread(target=_end_with, args=[main.pid], daemon=True).start()


def _end_with(main: int) -> None:
    told = None
    while os.getppid() == main and (told is None or told.si_pid != main):
        told = signal.sigtimedwait([signal.SIGTERM], _SECONDS_BETWEEN_LOOKS)
    os._exit(0)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Deliver signals after the block; processes that are forked in it inherit that they wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def one_ahead(batches: Iterator[T]) -> Iterator[T]:
    """Yield ``batches``, and fetch the next one from its worker while the one before is in use.

    It takes a few questions and answers between the processes, each of which waits for its turn on a processor.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def share(tensor: Tensor) -> None:
    """Move ``tensor`` to shared memory, in which a worker hands it over.

    Torch would do it while it sends it, in a thread whose failure nobody hears of: the main process waits for ever.

    Raises:
        UserError: there is no room for it.
    """
    try:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        room = shutil.disk_usage(_SHARED_MEMORY)
        raise UserError(
            f"data.workers: a batch of {tensor.nbytes / 1e6:.1f} MB does not go into {_SHARED_MEMORY}, where "
            f"{room.free / 1e6:.1f} of {room.total / 1e6:.1f} MB are free ({error}). Each worker keeps up to two "
            f"batches there, and training one: make {_SHARED_MEMORY} larger (`docker run --shm-size=2g`), set fewer "
            "data.workers or a smaller data.frames_per_batch, or set data.workers to 0, which needs none of it"
        ) from error


@contextmanager
def open_files_explained(workers: int) -> Iterator[None]:
    """Say what to do where the main process may open no more files: each batch of a worker's that it keeps is one.

    Raises:
        UserError: torch says so in the block.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Too many open files"):
            raise
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UserError(
            f"data.workers is {workers}, and this process may have {soft} files open, which it has: a batch of a "
            "worker's is one of them as long as it is kept. Keep fewer batches at once, allow more files "
            f"(`ulimit -n {hard}` before the start), or set data.workers to 0"
        ) from error
