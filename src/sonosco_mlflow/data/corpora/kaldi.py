"""Data directories of Kaldi: ``wav.scp``, ``text``, and where there are any ``segments`` and ``utt2spk``.

``wav.scp`` must hold plain paths. A pipe is a command, which is not run here: convert the recordings first.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sonosco_mlflow.data.corpora.base import Brought, Request, some
from sonosco_mlflow.data.corpora.listed import ListFormat, locate, read_lines
from sonosco_mlflow.data.corpora.segments import Segment
from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER
from sonosco_mlflow.errors import UserError

_TO_THE_END = -1.0
# Of telephone calls, by letters.
_CHANNELS = {"A": 0, "B": 1}


def bring(request: Request) -> Brought:
    """Bring what data directories of Kaldi name; see ``Corpus.bring``.

    ``source`` is a data directory, or a folder with several: ``train``, ``dev``, ``test``, or what ``parts`` names.
    Relative paths start from the data directory, or from one of the two folders above it, as Kaldi's recipes have it.

    Raises:
        UserError: no source; a pipe; a line that cannot be read; an utterance without a text or the reverse; or a
            recording that is too short.
    """
    return _FORMAT.bring(request)


@dataclass(frozen=True, slots=True)
class _Span:
    """Which part of which recording an utterance is, and where that stands."""

    recording: str
    place: str
    start: float = 0.0
    end: float | None = None
    channel: int | None = None


def _read(folder: Path) -> list[Segment]:
    recordings = {name: (place, _recording(path, place, folder)) for name, place, path in _table(folder / "wav.scp")}
    spans = {name: _Span(name, place) for name, (place, _) in recordings.items()}
    if (folder / "segments").is_file():
        spans = _read_segments(folder, recordings)
    texts = {name: text for name, _, text in _table(folder / "text", may_be_empty=True)}
    speakers = dict.fromkeys(spans, UNKNOWN_SPEAKER)
    if (folder / "utt2spk").is_file():
        speakers = {name: speaker for name, _, speaker in _table(folder / "utt2spk")}
    _require_same(folder / "text", spans, texts)
    _require_same(folder / "utt2spk", spans, speakers)
    return [
        Segment(
            id=name,
            recording=recordings[span.recording][1],
            text=texts[name],
            speaker=speakers[name],
            place=span.place,
            start=span.start,
            end=span.end,
            channel=span.channel,
        )
        for name, span in spans.items()
    ]


def _recording(path: str, place: str, folder: Path) -> Path:
    if path.endswith("|") or path.startswith("|"):
        raise UserError(
            f"{place}: found the pipe {path[:80]!r}. Expected the path of a recording: commands are not run here; "
            "write what this one makes to files, and name these."
        )
    return locate(path, folder)


def _read_segments(folder: Path, recordings: Collection[str]) -> dict[str, _Span]:
    spans = {}
    for name, place, rest in _table(folder / "segments"):
        try:
            recording, first, last, *channels = rest.split()
            start, end = float(first), float(last)
            (channel,) = [_CHANNELS[one] if one in _CHANNELS else int(one) for one in channels] or (None,)
        except ValueError:
            recording, start, end, channel = "", math.nan, math.nan, None
        if not (math.isfinite(start) and math.isfinite(end)):
            raise UserError(
                f"{place}: found {rest[:80]!r}. Expected a recording, its start and end in seconds, and of a recording "
                "of several channels which one, from 0."
            )
        if recording not in recordings:
            raise UserError(f"{place}: names the recording {recording!r}, which {folder / 'wav.scp'} does not.")
        spans[name] = _Span(recording, place, start, None if end == _TO_THE_END else end, channel)
    return spans


def _table(path: Path, may_be_empty: bool = False) -> list[tuple[str, str, str]]:
    """Return the key, the place and the rest of each line."""
    if not path.is_file():
        raise UserError(f"{path} is not there. Expected a data directory of Kaldi: wav.scp and text at least.")
    rows: dict[str, tuple[str, str, str]] = {}
    for place, line in read_lines(path):
        key, *rest = line.split(maxsplit=1)
        if not rest and not may_be_empty:
            raise UserError(f"{place}: found {line[:80]!r}. Expected a key, and what belongs to it.")
        if key in rows:
            raise UserError(f"{place}: the key {key!r} stands already in {rows[key][1]}. Expected each once.")
        rows[key] = key, place, rest[0] if rest else ""
    return list(rows.values())


def _require_same(path: Path, utterances: Collection[str], found: Collection[str]) -> None:
    missing, unknown = sorted({*utterances} - {*found}), sorted({*found} - {*utterances})
    if missing:
        raise UserError(f"{path}: has no line for {some(missing)}. Expected one for each utterance.")
    if unknown:
        raise UserError(
            f"{path}: has lines for what is no utterance: {some(unknown)}. Kaldi's utils/fix_data_dir.sh helps."
        )


_FORMAT = ListFormat(
    name="data directory of Kaldi",
    forms=("{}",),
    is_list=lambda path: (path / "wav.scp").is_file(),
    read=_read,
)
