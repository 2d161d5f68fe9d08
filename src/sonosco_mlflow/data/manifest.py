"""The manifest: which recordings there are, what is said in them, by whom.

JSON Lines with NeMo's keys, so that other toolkits read it, one utterance a line, sorted by id, always the
same bytes for the same content. Everything above it (features, batches, lineage) leans on a manifest's
digest, which is why it says what is learnt from and not where on this disk it lies.

>>> utterance = Utterance("fash-b", "wav/fash-b.wav", 2.95, "YES", "fash")
>>> manifest = Manifest([utterance], root=Path("corpus"))
>>> manifest.audio_path(manifest[0]).as_posix()
'corpus/wav/fash-b.wav'
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

from sonosco_mlflow.data.columns import Columns, read_columns
from sonosco_mlflow.data.utterances import UNKNOWN_SPEAKER, Utterance, line_of, parse_line
from sonosco_mlflow.errors import UserError

__all__ = ["UNKNOWN_SPEAKER", "Manifest", "Utterance"]

# Parts of a path that are not the name of a file or folder.
_NO_NAMES = frozenset(("", ".", ".."))


class Manifest(Sequence[Utterance]):
    """An unchangeable list of utterances, sorted by id, and the folder that their audio paths start from.

    Raises:
        UserError: an id stands twice.
    """

    def __init__(self, utterances: Iterable[Utterance], root: Path) -> None:
        ordered = sorted(utterances, key=lambda utterance: utterance.id)
        for first, second in pairwise(ordered):
            if first.id == second.id:
                raise UserError(
                    f"two utterances have the id {first.id!r}: {first.audio_filepath} and "
                    f"{second.audio_filepath}. Ids must be unique: rename one of the two."
                )
        self._utterances: tuple[Utterance, ...] | Columns = tuple(ordered)
        self.root = root

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest; audio paths start from the folder of ``path``.

        Plain NeMo lines are read too: without ``id`` it is the stem of the audio file, without ``speaker`` it
        is ``unknown``. Other keys are passed over, but not an ``offset``: segments of recordings are refused.

        Raises:
            UserError: naming file, line and key, what was found and what was expected.
        """
        columns = read_columns(path) if path.is_file() else None
        if columns is not None and not (ordered := columns.in_order()).has_twins():
            return cls._of_columns(ordered, path.parent)
        return cls(_read_exactly(path), path.parent)

    @classmethod
    def _of_columns(cls, columns: Columns, root: Path) -> "Manifest":
        manifest = cls([], root)
        manifest._utterances = columns
        return manifest

    def write(self, path: Path) -> None:
        """Write to ``path``, whole or not at all; relative audio paths are expressed from its folder.

        The same utterances give the same bytes.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        express = _from_folder(self.root, path.parent)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(line_of(utterance, express(utterance.audio_filepath)) for utterance in self)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def seen_from(self, folder: Path) -> Iterator[Utterance]:
        """Yield the utterances with audio paths that start from ``folder``, where they are relative."""
        express = _from_folder(self.root, folder)
        return (replace(utterance, audio_filepath=express(utterance.audio_filepath)) for utterance in self)

    def audio_path(self, utterance: Utterance) -> Path:
        """Return where the recording of ``utterance`` lies."""
        return self.root / utterance.audio_filepath

    @cached_property
    def digest(self) -> str:
        """The sha256, in hexadecimal, of ids, durations, texts and speakers.

        Audio paths are left out: a corpus that moves, or is checked out elsewhere, is the same corpus.
        """
        found = hashlib.sha256()
        for utterance in self:
            found.update(line_of(utterance, audio_filepath="").encode())
        return found.hexdigest()

    @property
    def hours(self) -> float:
        """The summed duration in hours."""
        return math.fsum(self._values("duration")) / 3600

    @property
    def speakers(self) -> tuple[str, ...]:
        """The names of the speakers, sorted, each once."""
        return tuple(sorted(set(self._values("speaker"))))

    def _values(self, name: str) -> Iterator[Any]:
        """Yield one field of each utterance, in their order: less work than to ask every utterance for it."""
        if isinstance(self._utterances, tuple):
            return (getattr(utterance, name) for utterance in self._utterances)
        return iter(self._utterances.values(name))

    def __len__(self) -> int:
        return len(self._utterances)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> "Manifest": ...
    def __getitem__(self, index: int | slice) -> "Utterance | Manifest":
        if not isinstance(index, slice):
            return self._utterances[index]
        chosen = self._utterances[index]
        if isinstance(chosen, tuple):
            return Manifest(chosen, self.root)
        return Manifest._of_columns(chosen.in_order(), self.root)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self._utterances)

    def __repr__(self) -> str:
        return f"Manifest({len(self)} utterances, {self.hours:.2f} h, root={str(self.root)!r})"


def _from_folder(root: Path, folder: Path) -> Callable[[str], str]:
    """Return what makes of an audio path that starts from ``root`` one that starts from ``folder``.

    It says what ``os.path.relpath`` says, which takes most of the time that writing a manifest does, and asks it where
    its answer is not plain.
    """
    way = os.path.relpath(root, folder)
    start = "" if way == "." else f"{way}/"
    # Where ``folder`` lies below ``root``, an audio path may lead through it.
    through = os.path.relpath(folder, root).split("/")[0] if Path(way).name == ".." else None

    def express(audio_filepath: str) -> str:
        parts = audio_filepath.split("/")
        if _NO_NAMES.isdisjoint(parts) and parts[0] != through:
            return start + audio_filepath
        if Path(audio_filepath).is_absolute():
            return audio_filepath
        return Path(os.path.relpath(root / audio_filepath, folder)).as_posix()

    return express


def _read_exactly(path: Path) -> list[Utterance]:
    first_lines: dict[str, int] = {}
    utterances = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        utterance = parse_line(line, f"{path}:{number}")
        first = first_lines.setdefault(utterance.id, number)
        if first != number:
            raise UserError(
                f"{path}:{number}: id {utterance.id!r} stands already in line {first}. Expected "
                "an 'id' of its own in each line (without one it is the name of the audio file)."
            )
        utterances.append(utterance)
    return utterances


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: there is no such manifest. Expected a JSON Lines file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found bytes that are not UTF-8 at offset {error.start}. Expected UTF-8.") from error
