"""Cuts of lhotse: JSON lines, each a ``MonoCut`` of a recording in a file, with its supervisions.

A cut is an utterance, whose text is that of its supervisions in their order. One that is a whole recording of one
channel stays where it is; others are cut out. Nothing here needs lhotse itself.
"""

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path

import soundfile

from sonosco_mlflow.data.corpora.base import Brought, Request
from sonosco_mlflow.data.corpora.listed import ListFormat, locate, name_at, read_objects, seconds_at, string_at
from sonosco_mlflow.data.corpora.segments import Segment
from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER, Manifest, Utterance
from sonosco_mlflow.errors import UserError

# lhotse rounds times, which makes the end of a whole recording another number than its duration.
_ROUNDING = 1e-4


def bring(request: Request) -> Brought:
    """Bring what lhotse's cuts name; see ``Corpus.bring``.

    ``source`` is a file of cuts (``.jsonl``, ``.jsonl.gz``), or a folder with ``train.jsonl``, ``dev.jsonl``,
    ``test.jsonl``, or ``cuts_train.jsonl`` and so on, or those that ``parts`` names.

    Raises:
        UserError: no source; a cut of another kind, without recording or supervision, of one that is no file or that is
            transformed as it is read; or a recording that is too short.
    """
    return _FORMAT.bring(request)


def write_cuts(manifest: Manifest, path: Path) -> None:
    """Write ``manifest`` as cuts of lhotse, with absolute paths; ``.gz`` at the end of ``path`` packs them.

    Raises:
        UserError: a recording cannot be read.
    """
    lines = "".join(json.dumps(_cut(manifest, utterance), ensure_ascii=False) + "\n" for utterance in manifest)
    content = lines.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    # Without the time, the same manifest gives the same bytes.
    partial.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    partial.replace(path)


def _cut(manifest: Manifest, utterance: Utterance) -> dict[str, object]:
    recording = manifest.audio_path(utterance).resolve()
    try:
        header = soundfile.info(str(recording))
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{recording}: cannot be read as audio ({error}).") from error
    duration = header.frames / header.samplerate
    channels = list(range(header.channels))
    supervision = {
        "id": utterance.id,
        "recording_id": utterance.id,
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "text": utterance.text,
        "speaker": utterance.speaker,
    }
    source = {"type": "file", "channels": channels, "source": str(recording)}
    return {
        "id": utterance.id,
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "supervisions": [supervision],
        "recording": {
            "id": utterance.id,
            "sources": [source],
            "sampling_rate": header.samplerate,
            "num_samples": header.frames,
            "duration": duration,
            "channel_ids": channels,
        },
        "type": "MonoCut",
    }


def _read(path: Path) -> list[Segment]:
    return [_segment(entry, place, path.parent) for place, entry in read_objects(path)]


def _segment(entry: Mapping[str, object], place: str, folder: Path) -> Segment:
    if entry.get("type") != "MonoCut":
        raise UserError(f"{place}: key 'type': found {entry.get('type')!r}. Expected 'MonoCut': cuts of one channel.")
    recording = _object(entry, "recording", place)
    if recording.get("transforms"):
        raise UserError(
            f"{place}: the recording is transformed as it is read ('transforms'). Save the audio of these cuts first: "
            "CutSet.save_audios"
        )
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise UserError(f"{place}: key 'sources' of the recording: found {sources!r:.80}. Expected one, a file.")
    if sources[0].get("type") != "file":
        raise UserError(f"{place}: the recording's source is {sources[0].get('type')!r}. Expected 'file'.")
    start, duration = seconds_at(entry, "start", place), seconds_at(entry, "duration", place)
    lasts = seconds_at(recording, "duration", place)
    is_whole = start + duration >= lasts - _ROUNDING
    texts, speakers = _supervisions(entry, place)
    return Segment(
        id=string_at(entry, "id", place, may_be_empty=False),
        recording=locate(string_at(sources[0], "source", place), folder),
        text=" ".join(texts),
        speaker=speakers.pop() if len(speakers) == 1 else UNKNOWN_SPEAKER,
        place=place,
        start=start,
        end=None if is_whole else start + duration,
        channel=_channel(entry, sources[0], place),
    )


def _supervisions(entry: Mapping[str, object], place: str) -> tuple[list[str], set[str]]:
    """Return the texts of a cut's supervisions in their order, and who speaks."""
    supervisions = entry.get("supervisions")
    if not isinstance(supervisions, list) or not supervisions or not all(isinstance(s, dict) for s in supervisions):
        raise UserError(f"{place}: key 'supervisions': found {supervisions!r:.80}. Expected one at least.")
    # Their times count from the cut's beginning, and may lie before it.
    ordered = sorted(supervisions, key=lambda supervision: seconds_at(supervision, "start", place, least=-math.inf))
    texts = [string_at(supervision, "text", place) for supervision in ordered]
    return texts, {name_at(supervision, "speaker", place, UNKNOWN_SPEAKER) for supervision in ordered}


def _channel(entry: Mapping[str, object], source: Mapping[str, object], place: str) -> int:
    """Return which channel of the file a cut is of."""
    channel, channels = entry.get("channel", 0), source.get("channels")
    if not isinstance(channels, list) or channel not in channels:
        raise UserError(f"{place}: key 'channel': found {channel!r}. Expected one of the source's: {channels!r:.80}.")
    return channels.index(channel)


def _object(entry: Mapping[str, object], key: str, place: str) -> dict[str, object]:
    value = entry.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{place}: key {key!r}: found {value!r:.80}. Expected an object.")
    return value


_ENDINGS = (".jsonl", ".jsonl.gz")
_FORMAT = ListFormat(
    name="file of lhotse's cuts",
    forms=tuple(form + ending for form in ("{}", "cuts_{}", "{}_cuts") for ending in _ENDINGS),
    is_list=lambda path: path.name.endswith(_ENDINGS) and path.is_file(),
    read=_read,
)
