"""A disk that loses what was not synced: from a log of operations, the states that a crash may leave behind.

What a file system promises without an fsync is next to nothing. Of a file's content that was not synced, any part may
be there; of a directory's changes that were not, any selection, in any order. A rename alone is in one piece.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import DISK

# Says of something of a directory's or a file's that was not synced whether it reached the disk, and how much of it.
Choice = Callable[[], float]


@dataclass(frozen=True)
class Operation:
    """One operation; ``name`` is ``mark`` for what a test notes in between.

    Attributes:
        target: the path or the descriptor that it is for.
        detail: what was written, the new path, the descriptor that was opened (with whether it was emptied) or the
            mark.
    """

    name: str
    target: Any = None
    detail: Any = None


class RecordingOs:
    """Stands for the module ``os``: does what is asked and notes it."""

    def __init__(self) -> None:
        self.log: list[Operation] = []
        self._lock = threading.Lock()

    def mark(self, detail: object) -> None:
        with self._lock:
            self.log.append(Operation("mark", None, detail))

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in DISK:
            return function

        def noted(*arguments: Any) -> Any:
            # Together: the log's order is the disk's.
            with self._lock:
                result = function(*arguments)
                target = Path(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else arguments[0]
                details = {"write": lambda: bytes(arguments[1][:result]), "replace": lambda: Path(arguments[1])}
                if name == "open":
                    detail: Any = (result, bool(arguments[1] & os.O_TRUNC), bool(arguments[1] & os.O_CREAT))
                else:
                    detail = details.get(name, lambda: None)()
                self.log.append(Operation(name, target, detail))
                return result

        return noted


@dataclass
class File:
    content: bytes = b""
    synced: bytes = b""

    def crashed(self, choose: Choice) -> bytes:
        """Return what is read after a crash: what was synced, and of what came after it some first part.

        Where a file system has kept the length and not the content, zeros are read behind it.
        """
        if not self.content.startswith(self.synced):
            return self.content if choose() >= 1 else self.synced
        more = len(self.content) - len(self.synced)
        kept = int(more * choose())
        zeros = more - kept if 0.5 < choose() < 1 else 0
        return self.content[: len(self.synced) + kept] + bytes(zeros)


@dataclass
class Directory:
    entries: dict[str, "File | Directory"] = field(default_factory=dict)
    synced: dict[str, "File | Directory"] = field(default_factory=dict)
    changes: list[dict[str, "File | Directory | None"]] = field(default_factory=list)

    def change(self, **entries: "File | Directory | None") -> None:
        self.changes.append(entries)
        _apply(self.entries, entries)

    def crashed(self, choose: Choice) -> dict[str, "File | Directory"]:
        """Return the names that are there after a crash: those that were synced, and some of the later changes."""
        entries = dict(self.synced)
        for change in self.changes:
            if choose() >= 0.5:
                _apply(entries, change)
        return entries


def _apply(entries: dict[str, "File | Directory"], change: dict[str, "File | Directory | None"]) -> None:
    for name, entry in change.items():
        if entry is None:
            entries.pop(name, None)
        else:
            entries[name] = entry


class LossyDisk:
    """The disk below ``root``, to which operations happen.

    Args:
        root: an empty directory, on the disk.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = Directory()
        self._opened: dict[int, File | Directory] = {}

    def do(self, operation: Operation) -> None:
        target, detail = operation.target, operation.detail
        match operation.name:
            case "mkdir":
                self._parent(target).change(**{target.name: Directory()})
            case "open":
                descriptor, emptied, created = detail
                found = self._find(target)
                if found is None:
                    assert created
                    found = File()
                    self._parent(target).change(**{target.name: found})
                if emptied and isinstance(found, File):
                    found.content = b""
                self._opened[descriptor] = found
            case "write":
                file = self._opened[target]
                assert isinstance(file, File)
                file.content += detail
            case "fsync":
                opened = self._opened[target]
                if isinstance(opened, File):
                    opened.synced = opened.content
                else:
                    opened.synced, opened.changes = dict(opened.entries), []
            case "replace":
                assert target.parent == detail.parent, "a rename from one directory to another is not modelled"
                self._parent(target).change(**{target.name: None, detail.name: self._found(target)})
            case "unlink" | "rmdir":
                self._parent(target).change(**{target.name: None})

    def crash(self, folder: Path, choose: Choice) -> None:
        """Write to ``folder`` what is found after a crash at this moment."""
        _write(self.top, folder, choose)

    def _find(self, path: Path) -> File | Directory | None:
        entry: File | Directory | None = self.top
        for part in path.relative_to(self.root).parts:
            assert isinstance(entry, Directory)
            entry = entry.entries.get(part)
        return entry

    def _found(self, path: Path) -> File | Directory:
        entry = self._find(path)
        assert entry is not None, path
        return entry

    def _parent(self, path: Path) -> Directory:
        parent = self._found(path.parent)
        assert isinstance(parent, Directory)
        return parent


def _write(directory: Directory, folder: Path, choose: Choice) -> None:
    folder.mkdir(parents=True)
    for name, entry in directory.crashed(choose).items():
        if isinstance(entry, File):
            (folder / name).write_bytes(entry.crashed(choose))
        else:
            _write(entry, folder / name, choose)


def choices(seed: int, count: int) -> Iterator[tuple[str, Choice]]:
    """Yield, by name: all that was not synced is lost; all is kept; parts of it; and ``count`` by chance."""
    yield "all lost", lambda: 0.0
    yield "all kept", lambda: 1.0
    yield "half of everything", lambda: 0.5
    yield "three quarters of everything, and zeros", lambda: 0.75
    for number in range(count):
        stream = random.Random(1000 * seed + number)
        yield f"by chance ({seed}, {number})", lambda stream=stream: stream.choice((0.0, 0.25, 0.5, 0.75, 1.0))
