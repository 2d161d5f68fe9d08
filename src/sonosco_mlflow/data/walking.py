"""The files below a folder, those in linked folders too: speakers and disks are often linked into one tree.

>>> files_below(Path("recordings"))  # doctest: +SKIP
[PosixPath('recordings/anna/1.wav'), PosixPath('recordings/bo/1.wav')]
"""

from collections.abc import Iterator
from pathlib import Path


def files_below(folder: Path) -> list[Path]:
    """Return the files below ``folder``, sorted; a link to a folder that it lies in itself is not followed."""
    return sorted(_files_below(folder, frozenset({folder.resolve()})))


def _files_below(folder: Path, around: frozenset[Path]) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            place = path.resolve()
            if place not in around:
                yield from _files_below(path, around | {place})
        elif path.is_file():
            yield path
