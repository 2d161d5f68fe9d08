"""The rows of a manifest as columns, read by a quick parser: of a million, objects would take twice the time.

orjson is less lenient than Python's json, and says less of what is wrong. So lines are taken as columns only where they
are plain, and all others are left to the exact parser (:mod:`sonosco_mlflow.data.utterances`), which says the same of
plain ones.

>>> columns = parse_block(b'{"id": "a", "audio_filepath": "a.wav", "duration": 2, "text": "YES", "speaker": "x"}')
>>> columns[0].duration
2.0
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice
from operator import eq, le
from pathlib import Path
from typing import Any, overload

import orjson

from sonosco_mlflow.data.utterances import Utterance

_NAMES = tuple(field.name for field in fields(Utterance))
_STRINGS = tuple(name for name in _NAMES if name != "duration")
# Bytes of a file that are parsed at once: what is made of so many stays in a processor's cache. With megabytes, reading
# takes up to twice the time.
_BLOCK = 1 << 18


class Columns(Sequence[Utterance]):
    """Utterances of which each is made when it is asked for.

    Args:
        values: a list for each field of an utterance, in their order and of one length.
    """

    def __init__(self, values: Sequence[list[Any]]) -> None:
        self._values = tuple(values)

    def values(self, name: str) -> list[Any]:
        """Return one field of all utterances."""
        return self._values[_NAMES.index(name)]

    def in_order(self) -> "Columns":
        """Return them sorted by id."""
        ids = self._values[0]
        if all(map(le, ids, islice(ids, 1, None))):
            return self
        order = sorted(range(len(ids)), key=ids.__getitem__)
        return Columns([[values[i] for i in order] for values in self._values])

    def has_twins(self) -> bool:
        """Return whether neighbours have the same id."""
        ids = self._values[0]
        return any(map(eq, ids, islice(ids, 1, None)))

    def __len__(self) -> int:
        return len(self._values[0])

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> "Columns": ...
    def __getitem__(self, index: int | slice) -> "Utterance | Columns":
        if isinstance(index, slice):
            return Columns([values[index] for values in self._values])
        return Utterance(*(values[index] for values in self._values))

    def __iter__(self) -> Iterator[Utterance]:
        return map(Utterance, *self._values)


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in pieces of whole lines."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block + file.readline()


def read_columns(path: Path) -> Columns | None:
    """Return the rows of a manifest in their order; None where it takes the exact parser to tell them.

    Raises:
        OSError: the file cannot be read.
    """
    found: list[list[Any]] = [[] for _ in _NAMES]
    speakers: dict[str, str] = {}
    for block in blocks(path):
        columns = parse_block(block)
        if columns is None:
            return None
        for values, more in zip(found[:-1], columns._values[:-1], strict=True):
            values += more
        # A speaker's name is one object in all of their rows.
        found[-1] += map(speakers.setdefault, columns._values[-1], columns._values[-1])
    return Columns(found)


def parse_block(block: bytes) -> Columns | None:
    """Return the rows of whole lines; None where it takes the exact parser to tell them."""
    if b"\r" in block:  # to the exact parser the end of a line, to JSON a space
        return None
    try:
        entries = list(map(orjson.loads, block.removesuffix(b"\n").split(b"\n")))
        found = {name: [entry[name] for entry in entries] for name in _NAMES}
        has_more = any(map(len(_NAMES).__ne__, map(len, entries)))
        if has_more and any(entry.get("offset") for entry in entries):
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not _are_plain(found):
        return None
    found["duration"] = [float(seconds) for seconds in found["duration"]]
    return Columns([found[name] for name in _NAMES])


def _are_plain(found: dict[str, list[Any]]) -> bool:
    """Return whether each value is what an utterance may have there."""
    seconds = found["duration"]
    return (
        all(set(map(type, found[name])) == {str} for name in _STRINGS)
        and all(all(found[name]) for name in _STRINGS if name != "text")
        and set(map(type, seconds)) <= {int, float}
        and min(seconds) > 0
    )
