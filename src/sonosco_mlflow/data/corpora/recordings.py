"""What the headers of recordings say, read by several threads: soundfile leaves Python to others meanwhile."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sonosco_mlflow.data.corpora.audio import duration_of
from sonosco_mlflow.data.corpora.base import Progress
from sonosco_mlflow.data.corpora.unusable import UNREADABLE
from sonosco_mlflow.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], total: int, processes: int, progress: Progress
) -> list[Result]:
    """Return what ``function`` returns for each of the ``total`` items, in their order, ``processes`` of them at once.

    Items are taken only as they are needed, so that few of them are in memory. After the first error no other item is
    begun, and the error is raised.
    """
    results: list[Result] = []
    pending: deque[Future[Result]] = deque()

    def collect() -> None:
        results.append(pending.popleft().result())
        progress(len(results), total)

    with ThreadPoolExecutor(max_workers=processes) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * processes:
                    collect()
            while pending:
                collect()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def audio_filepath(path: Path, directory: Path) -> str:
    """Return how the manifests of the corpus in ``directory`` name a recording: inside it from there, else in full."""
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else str(path)


def read_durations(recordings: Iterable[Path], processes: int, progress: Progress) -> dict[Path, float]:
    """Return the duration of each recording in seconds, ``UNREADABLE`` where it is empty or cannot be read as audio."""
    paths = list(dict.fromkeys(recordings))
    return dict(zip(paths, in_parallel(_duration, paths, len(paths), processes, progress), strict=True))


def _duration(path: Path) -> float:
    try:
        return duration_of(path)
    except UserError:
        return UNREADABLE
