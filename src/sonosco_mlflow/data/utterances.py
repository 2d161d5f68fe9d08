"""One utterance, and its line in a manifest: how it is written, and how it is read or refused.

>>> line_of(Utterance("fash-b", "wav/fash-b.wav", 2.95, "YES", "fash")).rstrip()
'{"id": "fash-b", "audio_filepath": "wav/fash-b.wav", "duration": 2.95, "text": "YES", "speaker": "fash"}'
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sonosco_mlflow.errors import UserError

UNKNOWN_SPEAKER = "unknown"

_encode = json.JSONEncoder(ensure_ascii=False).encode


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


def line_of(utterance: Utterance, audio_filepath: str | None = None) -> str:
    """Return the line of ``utterance``, with its end; ``audio_filepath`` stands there in place of its own."""
    return (
        _encode(
            {
                "id": utterance.id,
                "audio_filepath": utterance.audio_filepath if audio_filepath is None else audio_filepath,
                "duration": utterance.duration,
                "text": utterance.text,
                "speaker": utterance.speaker,
            }
        )
        + "\n"
    )


def parse_line(line: str, place: str) -> Utterance:
    """Return the utterance of a line.

    Raises:
        UserError: it begins with ``place`` and names the key, what was found and what was expected.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
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
        id=_string(entry, "id", place) if "id" in entry else _string({"id": Path(audio_filepath).stem}, "id", place),
        audio_filepath=audio_filepath,
        duration=_seconds(entry, place),
        text=_string(entry, "text", place, may_be_empty=True),
        speaker=_string(entry, "speaker", place) if "speaker" in entry else UNKNOWN_SPEAKER,
    )


def _string(entry: Mapping[str, object], key: str, place: str, may_be_empty: bool = False) -> str:
    value = entry.get(key)
    if isinstance(value, str) and (value or may_be_empty):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: key {key!r}: found the escape of half a character, which no text can hold. Write it out."
            ) from error
        return value
    expected = "a string" if may_be_empty else "a string that is not empty"
    raise UserError(f"{place}: key {key!r}: found {_found(entry, key)}. Expected {expected}.")


def _seconds(entry: Mapping[str, object], place: str) -> float:
    value = entry.get("duration")
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
    except OverflowError:
        # A whole number that no float can hold.
        pass
    raise UserError(f"{place}: key 'duration': found {_found(entry, 'duration')}. Expected seconds above 0.")


def _found(entry: Mapping[str, object], key: str) -> str:
    return json.dumps(entry[key], ensure_ascii=False)[:80] if key in entry else f"no such key in {sorted(entry)}"
