"""All that can be found wrong with manifests: their rows first, then their recordings."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sonosco_mlflow.data.manifest_tools.findings import Finding
from sonosco_mlflow.data.manifest_tools.recordings import Expected, check_recordings
from sonosco_mlflow.data.manifest_tools.rows import check_rows
from sonosco_mlflow.vocabulary import read_tokenizer


def findings_of(
    paths: Sequence[Path],
    vocabulary: Path | None,
    expected: Expected | None,
    processes: int,
    progress: Callable[[int, int], None],
) -> Iterator[Finding]:
    """Yield what is wrong with manifests, and never stop at the first.

    Args:
        paths: the manifests; the splits of one corpus, where there are several.
        vocabulary: a file whose characters the texts may hold; None allows any.
        expected: of each recording; None opens none.
        processes: how many open recordings at once.
        progress: called with (recordings looked at, all).

    Raises:
        UserError: there is no such manifest or vocabulary.
    """
    yield from check_rows(paths, read_tokenizer(vocabulary).characters if vocabulary else None)
    if expected is not None:
        yield from check_recordings(paths, expected, processes, progress)
