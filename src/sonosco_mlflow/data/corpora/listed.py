"""What corpora have in common that are lists of recordings on this machine: those of other toolkits.

A list alone is everything there is, and dev and test are cut from it. A folder has a list for each split, named after
it (``train.jsonl``, ``dev.jsonl``, ``test.jsonl``); ``data.parts`` names others, one or more for each.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sonosco_mlflow.data.corpora.base import Brought, Request, some
from sonosco_mlflow.data.corpora.segments import Segment, lay_segments, with_unique_ids
from sonosco_mlflow.data.corpora.splits import SPLITS, Parts
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.errors import UserError

_LEVELS = 3


@dataclass(frozen=True, slots=True)
class ListFormat:
    """How lists of one kind are found and read.

    Attributes:
        name: What a list is called in messages.
        forms: What the list of a split may be called, with ``{}`` for its name, the likeliest first.
        is_list: Whether a path is a list.
        read: Returns the utterances of a list.
    """

    name: str
    forms: tuple[str, ...]
    is_list: Callable[[Path], bool]
    read: Callable[[Path], list[Segment]]

    def bring(self, request: Request) -> Brought:
        """Bring what the lists name: whole recordings stay where they are, parts of them are cut out.

        Raises:
            UserError: no source; no lists, or none of that name; a part of a recording that cannot be cut out.
        """
        lists = self._lists(request.source, request.parts)
        read = [(split, item) for split, paths in lists.items() for path in paths for item in self.read(path)]
        segments = [
            replace(segment, text=" ".join(segment.text.split()))
            for segment in with_unique_ids(segment for _, segment in read)
        ]
        laid, why = lay_segments(segments, request)
        given: dict[str, list[Utterance]] = {split: [] for split in lists}
        for (split, _), segment in zip(read, segments, strict=True):
            given[split].append(laid[segment.id])
        return Brought(given, why)

    def _lists(self, source: str | None, parts: Parts | None) -> dict[str, list[Path]]:
        if source is None or "://" in source:
            raise UserError(f"data.source: found {source!r}. Expected a path: {self._expected()}.")
        root = Path(source).expanduser().resolve()
        if self.is_list(root):
            if parts is not None:
                raise UserError(f"data.parts: {root} is one list, without parts. Give the folder with the lists.")
            return {"train": [root]}
        if not root.is_dir():
            raise UserError(f"data.source: {root} is not there, or is none. Expected {self._expected()}.")
        if parts is not None:
            return {split: [self._named(root, name) for name in names] for split, names in parts.items()}
        found = {split: [path] for split in SPLITS for path in [self._find(root, split)] if path is not None}
        if not found:
            raise UserError(f"data.source: found no {self.name} in {root}. Expected {self._expected()}.")
        return found

    def _named(self, root: Path, name: str) -> Path:
        path = root / name if self.is_list(root / name) else self._find(root, name)
        if path is None:
            there = some(sorted(path.name for path in root.iterdir() if self.is_list(path)))
            raise UserError(f"data.parts: {root} has no {self.name} {name!r}. There are: {there or 'none'}.")
        return path

    def _find(self, root: Path, name: str) -> Path | None:
        candidates = (root / form.format(name) for form in self.forms)
        return next((path for path in candidates if self.is_list(path)), None)

    def _expected(self) -> str:
        first = self.forms[0]
        return f"a {self.name}, or a folder with {', '.join(first.format(split) for split in SPLITS)}"


def locate(name: str, folder: Path) -> Path:
    """Return where a recording lies that a list in ``folder`` names: by an absolute path, or from ``folder``.

    Some toolkits' paths start from where they were run, so the two folders above are tried, too. A recording that
    is nowhere is returned as if it started from ``folder``.
    """
    candidates = [place / name for place in (folder, *folder.parents)[:_LEVELS]]
    return next((path for path in candidates if path.is_file()), candidates[0])


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield "file:number" and text of each line that is not blank; ``.gz`` is unpacked.

    Raises:
        UserError: it is damaged, or no UTF-8.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found bytes that are not UTF-8 at offset {error.start}. Expected UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield "file:number" and the JSON object of each line.

    Raises:
        UserError: a line is none.
    """
    for place, line in read_lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: found no valid JSON ({error}). Expected one JSON object a line.") from error
        if not isinstance(entry, dict):
            raise UserError(f"{place}: found {line[:80]}. Expected a JSON object.")
        yield place, entry


def string_at(entry: Mapping[str, object], key: str, place: str, may_be_empty: bool = True) -> str:
    """Return the string under ``key``.

    Raises:
        UserError: there is none.
    """
    value = entry.get(key)
    if not isinstance(value, str) or not (value or may_be_empty):
        expected = "a string" if may_be_empty else "a string that is not empty"
        raise UserError(f"{place}: key {key!r}: found {_found(entry, key)}. Expected {expected}.")
    return value


def name_at(entry: Mapping[str, object], key: str, place: str, otherwise: str) -> str:
    """Return the string under ``key``, or ``otherwise`` where there is none, null, or an empty one.

    Raises:
        UserError: there is something else.
    """
    return otherwise if entry.get(key) in (None, "") else string_at(entry, key, place)


def seconds_at(entry: Mapping[str, object], key: str, place: str, least: float = 0.0) -> float:
    """Return the seconds under ``key``, ``least`` or more.

    Raises:
        UserError: there are none.
    """
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise UserError(f"{place}: key {key!r}: found {_found(entry, key)}. Expected seconds, {least:g} or more.")
    return float(value)


def _found(entry: Mapping[str, object], key: str) -> str:
    return json.dumps(entry[key], ensure_ascii=False)[:80] if key in entry else f"no such key in {sorted(entry)}"
