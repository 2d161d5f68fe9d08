"""NeMo's manifests: JSON lines with ``audio_filepath``, ``duration`` and ``text``, and ``offset`` in a segment.

A line without ``offset`` is a whole recording, and its header says how long it is. One with ``offset`` is the part of
it that begins there and lasts ``duration`` seconds. ``speaker`` and ``id`` are taken where they stand.
"""

from pathlib import Path

from sonosco_mlflow.data.corpora.base import Brought, Request
from sonosco_mlflow.data.corpora.listed import ListFormat, locate, name_at, read_objects, seconds_at, string_at
from sonosco_mlflow.data.corpora.segments import Segment, segment_id
from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER


def bring(request: Request) -> Brought:
    """Bring what NeMo's manifests name; see ``Corpus.bring``.

    ``source`` is a manifest (``.jsonl``, ``.json``, ``.json.gz``, ``.jsonl.gz``), or a folder with ``train.jsonl``,
    ``dev.jsonl``, ``test.jsonl`` or those that ``parts`` names.

    Raises:
        UserError: no source, a line or key that cannot be read, or a recording that is too short.
    """
    return _FORMAT.bring(request)


def _read(path: Path) -> list[Segment]:
    segments = []
    for place, entry in read_objects(path):
        recording = locate(string_at(entry, "audio_filepath", place), path.parent)
        start, end, name = 0.0, None, recording.stem
        if entry.get("offset") is not None:
            start = seconds_at(entry, "offset", place)
            end = start + seconds_at(entry, "duration", place)
            name = segment_id(recording.stem, start, end)
        identifier = name_at(entry, "id", place, name)
        speaker = name_at(entry, "speaker", place, UNKNOWN_SPEAKER)
        text = string_at(entry, "text", place)
        segments.append(Segment(identifier, recording, text, speaker, place, start, end))
    return segments


_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_FORMAT = ListFormat(
    name="manifest of NeMo",
    forms=tuple(form + ending for ending in _ENDINGS for form in ("{}", "{}_manifest")),
    is_list=lambda path: path.name.endswith(_ENDINGS) and path.is_file(),
    read=_read,
)
