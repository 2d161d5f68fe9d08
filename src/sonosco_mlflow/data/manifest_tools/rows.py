"""The rows of manifests as they stand there, wrong ones too, and what can be said of them without their recordings."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from sonosco_mlflow.data.columns import blocks, parse_block
from sonosco_mlflow.data.manifest_tools.findings import Finding
from sonosco_mlflow.data.utterances import UNKNOWN_SPEAKER, Utterance, parse_line
from sonosco_mlflow.errors import UserError, describe_failure

SHORTEST = 0.05
"""Seconds, less than any sound of speech takes; windows of features are about half as long."""


def numbered_rows(path: Path) -> Iterator[tuple[int, Utterance | str]]:
    """Yield the number of each line that is not blank, and its utterance, or what is wrong where it is none.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such manifest. Expected a JSON Lines file.")
    first = 1
    for block in blocks(path):
        columns = parse_block(block)
        if columns is not None:
            yield from enumerate(columns, first)
            first += len(columns)
        else:
            lines = _lines(block, encoding="utf-8-sig" if first == 1 else "utf-8")
            yield from ((first + i, _row(line)) for i, line in enumerate(lines) if line.strip())
            # What follows the last line end begins in the next block.
            first += len(lines) - 1


def check_rows(paths: Sequence[Path], characters: frozenset[str] | None = None) -> Iterator[Finding]:
    """Yield what is wrong with the rows of manifests that belong together, such as the splits of a corpus.

    Args:
        paths: the manifests.
        characters: all that a text may hold; None allows any.

    Raises:
        UserError: there is no such file.
    """
    ids, recordings, split_of = _Seen(), _Seen(), dict[str, int]()
    moved: set[tuple[str, int]] = set()
    for split, path in enumerate(paths):
        folder = os.path.abspath(path.parent)  # noqa: PTH100 - a string is what is wanted
        ids.begin(path)
        recordings.begin(path)
        for line, row in numbered_rows(path):
            if isinstance(row, str):
                yield Finding(str(path), line, "", "row", row)
                continue
            if row.duration < SHORTEST:
                yield Finding(str(path), line, row.id, "short", f"the recording lasts {row.duration:g} s")
            for check, found in _check_text(row.text, characters):
                yield Finding(str(path), line, row.id, check, found)
            if place := ids.first(row.id, line):
                yield Finding(str(path), line, row.id, "id", f"the id stands already in {place}")
            if place := recordings.first(_absolute(folder, row.audio_filepath), line):
                yield Finding(str(path), line, row.id, "same-audio", f"{row.audio_filepath} stands already in {place}")
            if row.speaker != UNKNOWN_SPEAKER and split_of.setdefault(row.speaker, split) != split:
                if (row.speaker, split) not in moved:
                    found = f"the speaker {row.speaker!r} stands in {paths[split_of[row.speaker]]}, too"
                    yield Finding(str(path), line, row.id, "speaker", found)
                moved.add((row.speaker, split))


class _Seen:
    """Where each name stood first, as one number a name: there may be millions."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._starts: list[int] = []
        self._paths: list[Path] = []
        self._last = 0

    def begin(self, path: Path) -> None:
        """Take the names that follow for those of another file."""
        self._starts.append(self._last)
        self._paths.append(path)

    def first(self, name: str, line: int) -> str:
        """Return where ``name`` stood before, as ``file:line``; nothing where this line is the first."""
        self._last = number = self._starts[-1] + line
        before = self._numbers.setdefault(name, number)
        if before == number:
            return ""
        file = bisect_right(self._starts, before - 1) - 1
        return f"{self._paths[file]}:{before - self._starts[file]}"


def _check_text(text: str, characters: frozenset[str] | None) -> Iterator[tuple[str, str]]:
    if not text or text.isspace():
        yield "text", "the text is empty"
    if characters is not None and not characters.issuperset(text):
        strange = ", ".join(map(repr, sorted(set(text) - characters)))
        yield "characters", f"the vocabulary lacks {strange} in {text[:80]!r}"


def _absolute(folder: str, audio_filepath: str) -> str:
    path = os.path.join(folder, audio_filepath)  # noqa: PTH118 - a third of pathlib's time
    return os.path.normpath(path) if "./" in audio_filepath or "//" in audio_filepath else path


def _row(line: str) -> Utterance | str:
    try:
        line.encode()
    except UnicodeEncodeError:
        return "found bytes that are not UTF-8"
    try:
        return parse_line(line, "")
    except UserError as error:
        return describe_failure(error).removeprefix(": ").rstrip(".")


def _lines(block: bytes, encoding: str) -> list[str]:
    # A byte that is no UTF-8 leaves half a character in the text of its line, by which it is found.
    text = block.decode(encoding, errors="surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
