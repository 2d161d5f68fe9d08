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
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import overload

from sonosco_mlflow.errors import UserError

UNKNOWN_SPEAKER = "unknown"


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording and its transcript. The field order is the order of the keys in a line.

    ``audio_filepath`` is absolute, or relative to the folder of the manifest; ``duration`` is in seconds.
    """

    id: str
    audio_filepath: str
    duration: float
    text: str
    speaker: str


class Manifest(Sequence[Utterance]):
    """An unchangeable list of utterances, sorted by id, and the folder that their audio paths start from.

    Raises:
        UserError: an id stands twice.
    """

    def __init__(self, utterances: Iterable[Utterance], root: Path) -> None:
        self._utterances = tuple(sorted(utterances, key=lambda utterance: utterance.id))
        self.root = root
        for first, second in zip(self._utterances, self._utterances[1:], strict=False):
            if first.id == second.id:
                raise UserError(
                    f"two utterances have the id {first.id!r}: {first.audio_filepath} and "
                    f"{second.audio_filepath}. Ids must be unique: rename one of the two."
                )

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest; audio paths start from the folder of ``path``.

        Plain NeMo lines are read too: without ``id`` it is the stem of the audio file, without ``speaker`` it
        is ``unknown``. Other keys are passed over, but not an ``offset``: segments of recordings are refused.

        Raises:
            UserError: naming file, line and key, what was found and what was expected.
        """
        first_lines: dict[str, int] = {}
        utterances = []
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            utterance = _parse(line, f"{path}:{number}")
            first = first_lines.setdefault(utterance.id, number)
            if first != number:
                raise UserError(
                    f"{path}:{number}: id {utterance.id!r} stands already in line {first}. Expected "
                    "an 'id' of its own in each line (without one it is the name of the audio file)."
                )
            utterances.append(utterance)
        return cls(utterances, path.parent)

    def write(self, path: Path) -> None:
        """Write to ``path``, whole or not at all; relative audio paths are expressed from its folder.

        The same utterances give the same bytes.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [_line(replace(u, audio_filepath=self._path_from(path.parent, u))) for u in self._utterances]
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def audio_path(self, utterance: Utterance) -> Path:
        """Return where the recording of ``utterance`` lies."""
        return self.root / utterance.audio_filepath

    @cached_property
    def digest(self) -> str:
        """The sha256, in hexadecimal, of ids, durations, texts and speakers.

        Audio paths are left out: a corpus that moves, or is checked out elsewhere, is the same corpus.
        """
        lines = (_line(replace(utterance, audio_filepath="")) for utterance in self._utterances)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def hours(self) -> float:
        """The summed duration in hours."""
        return math.fsum(utterance.duration for utterance in self._utterances) / 3600

    @property
    def speakers(self) -> tuple[str, ...]:
        """The names of the speakers, sorted, each once."""
        return tuple(sorted({utterance.speaker for utterance in self._utterances}))

    def __len__(self) -> int:
        return len(self._utterances)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> "Manifest": ...
    def __getitem__(self, index: int | slice) -> "Utterance | Manifest":
        if isinstance(index, slice):
            return Manifest(self._utterances[index], self.root)
        return self._utterances[index]

    def __repr__(self) -> str:
        return f"Manifest({len(self)} utterances, {self.hours:.2f} h, root={str(self.root)!r})"

    def _path_from(self, folder: Path, utterance: Utterance) -> str:
        if Path(utterance.audio_filepath).is_absolute():
            return utterance.audio_filepath
        return Path(os.path.relpath(self.audio_path(utterance), folder)).as_posix()


def _line(utterance: Utterance) -> str:
    return json.dumps(asdict(utterance), ensure_ascii=False) + "\n"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: there is no such manifest. Expected a JSON Lines file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found bytes that are not UTF-8 at offset {error.start}. Expected UTF-8.") from error


def _parse(line: str, place: str) -> Utterance:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: found no valid JSON ({error}). Expected one JSON object a line.") from error
    if not isinstance(entry, dict):
        raise UserError(f"{place}: found {line.strip()[:80]}. Expected a JSON object.")
    if entry.get("offset"):
        raise UserError(
            f"{place}: key 'offset': found {_found(entry, 'offset')}. Segments of longer recordings are not "
            "read: cut each into a file of its own."
        )
    audio_filepath = _string(entry, "audio_filepath", place)
    return Utterance(
        id=_string({"id": Path(audio_filepath).stem} | entry, "id", place),
        audio_filepath=audio_filepath,
        duration=_seconds(entry, place),
        text=_string(entry, "text", place, may_be_empty=True),
        speaker=_string({"speaker": UNKNOWN_SPEAKER} | entry, "speaker", place),
    )


def _string(entry: Mapping[str, object], key: str, place: str, may_be_empty: bool = False) -> str:
    value = entry.get(key)
    if isinstance(value, str) and (value or may_be_empty):
        return value
    expected = "a string" if may_be_empty else "a string that is not empty"
    raise UserError(f"{place}: key {key!r}: found {_found(entry, key)}. Expected {expected}.")


def _seconds(entry: Mapping[str, object], place: str) -> float:
    value = entry.get("duration")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise UserError(f"{place}: key 'duration': found {_found(entry, 'duration')}. Expected seconds above 0.")


def _found(entry: Mapping[str, object], key: str) -> str:
    return json.dumps(entry[key], ensure_ascii=False)[:80] if key in entry else f"no such key in {sorted(entry)}"
