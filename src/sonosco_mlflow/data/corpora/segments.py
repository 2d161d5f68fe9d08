"""Cuts utterances out of longer recordings, each into a file of its own.

They become 16 bit wav, ``wav/<recording>/<id>.wav``, mono, at the rate of the recording. Wav and not flac: the same
samples give the same bytes with any version of any library, so that DVC sees a corpus that was made again as the same,
and training reads it four times as fast; flac would take about half the space.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from sonosco_mlflow.data.corpora.archives import PLAIN_NAME
from sonosco_mlflow.data.corpora.audio import Samples, write_wave
from sonosco_mlflow.data.corpora.base import Request, make_audio_folder
from sonosco_mlflow.data.corpora.recordings import in_parallel
from sonosco_mlflow.data.corpora.unusable import UNREADABLE
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.errors import UserError

# Times of segments are often rounded up beyond the end; what Kaldi allows, too.
_OVERSHOOT = 0.5
_LONGEST_NAME = 200  # bytes, of the 255 that file systems allow
_LOSSLESS = re.compile("PCM_(S8|U8|16)|U?LAW|ALAW")


class _UnreadableError(UserError):
    """A recording is not there, or is no audio from its first sample to its last."""


@dataclass(frozen=True, slots=True)
class Segment:
    """An utterance: a recording, or the part of it from ``start`` to ``end`` in seconds (None: to its end).

    ``channel`` counts from 0; None is the mean of all. ``place`` is the file and line that say so.
    """

    id: str
    recording: Path
    text: str
    speaker: str
    place: str
    start: float = 0.0
    end: float | None = None
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class _Frames:
    """The part of a recording that is a segment, in samples."""

    first: int
    last: int
    rate: int
    is_whole: bool


def segment_id(recording: str, start: float, end: float) -> str:
    """Return an id that says where in ``recording`` a segment lies, in milliseconds.

    >>> segment_id("AlGore_2006", 12.5, 15.123)
    'AlGore_2006-0012500-0015123'
    """
    return f"{recording}-{round(start * 1000):07}-{round(end * 1000):07}"


def lay_segments(segments: Sequence[Segment], request: Request) -> tuple[dict[str, Utterance], dict[str, str]]:
    """Return the utterances by their ids: whole recordings where they lie, others cut into ``request.directory/wav``.

    Nothing is cut before all headers have been read. Utterances without a text, or whose recording cannot be read, are
    of ``UNREADABLE`` seconds, and the second dictionary says why.

    Raises:
        UserError: two have one id, or a segment is empty or ends beyond its recording.
    """
    _refuse_twins(segments)
    why = {one.id: f"{one.place}: {one.id!r} has an empty text" for one in segments if not one.text}
    silent = {one.id: _utterance(one, UNREADABLE) for one in segments if not one.text}
    by_recording: dict[Path, list[Segment]] = {}
    for segment in segments:
        if segment.text:
            by_recording.setdefault(segment.recording, []).append(segment)
    groups = list(by_recording.values())
    frames = in_parallel(_read_frames, groups, len(groups), request.processes, request.progress)
    if not all(part.is_whole for parts in frames if not isinstance(parts, _UnreadableError) for part in parts):
        make_audio_folder(request.directory)

    def of_no_use(segment: Segment, error: _UnreadableError) -> Utterance:
        why[segment.id] = str(error)
        return _utterance(segment, UNREADABLE)

    def lay_one(file: soundfile.SoundFile, segment: Segment, part: _Frames) -> Utterance:
        if part.is_whole:
            return _utterance(segment, part.last / part.rate)
        try:
            return _cut(file, segment, part, request.directory)
        except _UnreadableError as error:
            return of_no_use(segment, error)

    def lay(group: tuple[list[Segment], list[_Frames] | _UnreadableError]) -> list[Utterance]:
        segments, parts = group
        if isinstance(parts, _UnreadableError):
            return [of_no_use(segment, parts) for segment in segments]
        with open_recording(segments[0].recording, segments[0]) as file:
            return [lay_one(file, segment, part) for segment, part in zip(segments, parts, strict=True)]

    laid = in_parallel(lay, zip(groups, frames, strict=True), len(groups), request.processes, request.progress)
    return silent | {utterance.id: utterance for utterances in laid for utterance in utterances}, why


def cut_recording(content: IO[bytes], segments: Sequence[Segment], directory: Path) -> list[Utterance]:
    """Cut all ``segments`` out of a recording that is not a file but the bytes of one; see :func:`lay_segments`."""
    with open_recording(content, segments[0]) as file:
        return [_cut(file, segment, _frames(segment, file), directory) for segment in segments]


def open_recording(recording: Path | IO[bytes], segment: Segment) -> soundfile.SoundFile:
    """Open a recording, which ``segment`` names.

    Raises:
        UserError: it is not there, or cannot be read as audio.
    """
    if isinstance(recording, Path) and not recording.is_file():
        raise _UnreadableError(f"{segment.place}: names a recording that is not there: {recording}")
    try:
        return soundfile.SoundFile(str(recording) if isinstance(recording, Path) else recording)
    except (soundfile.SoundFileError, OSError) as error:
        raise _UnreadableError(f"{segment.place}: {segment.recording}: cannot be read as audio ({error})") from error


def _read_frames(segments: list[Segment]) -> list[_Frames] | _UnreadableError:
    """Return which part of their recording each of the segments is, or why it cannot be read."""
    try:
        file = open_recording(segments[0].recording, segments[0])
    except _UnreadableError as error:
        return error
    with file:
        return [_frames(segment, file) for segment in segments]


def _frames(segment: Segment, file: soundfile.SoundFile) -> _Frames:
    rate, held = file.samplerate, file.frames
    first = round(segment.start * rate)
    last = held if segment.end is None else round(segment.end * rate)
    if last > held + _OVERSHOOT * rate:
        raise UserError(
            f"{segment.place}: the segment {segment.id!r} ends at {segment.end} s. Expected an end within "
            f"{segment.recording}, which lasts {held / rate:g} s."
        )
    last = min(last, held)
    if not 0 <= first < last:
        raise UserError(
            f"{segment.place}: {segment.id!r} holds no samples: it goes from {segment.start} s to "
            f"{'the end' if segment.end is None else f'{segment.end} s'} of {segment.recording}, which lasts "
            f"{held / rate:g} s."
        )
    if segment.channel is not None and not 0 <= segment.channel < file.channels:
        raise UserError(
            f"{segment.place}: {segment.id!r} is in channel {segment.channel}. Expected one below {file.channels}, "
            f"which is how many {segment.recording} has."
        )
    is_whole = (first, last) == (0, held) and (segment.channel is None or file.channels == 1)
    return _Frames(first, last, rate, is_whole)


def _utterance(segment: Segment, seconds: float) -> Utterance:
    return Utterance(segment.id, str(segment.recording), seconds, segment.text, segment.speaker)


def _cut(file: soundfile.SoundFile, segment: Segment, part: _Frames, directory: Path) -> Utterance:
    path = directory / "wav" / file_name(segment.recording.stem) / f"{file_name(segment.id)}.wav"
    samples = _read_samples(file, segment, part)
    try:
        path.parent.mkdir(exist_ok=True)
        write_wave(path, samples, part.rate)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error
    place = path.relative_to(directory).as_posix()
    return Utterance(segment.id, place, len(samples) / part.rate, segment.text, segment.speaker)


def _read_samples(file: soundfile.SoundFile, segment: Segment, part: _Frames) -> Samples:
    count = part.last - part.first
    # soundfile does not scale floating point numbers to 16 bits.
    exact = _LOSSLESS.fullmatch(file.subtype) and file.channels == 1
    try:
        file.seek(part.first)
        found = file.read(count, dtype="int16" if exact else "float64", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise _UnreadableError(f"{segment.place}: {segment.recording}: cannot be read as audio ({error})") from error
    if len(found) != count:
        raise _UnreadableError(
            f"{segment.place}: {segment.recording}: ends after {part.first + len(found)} samples of the "
            f"{file.frames} that its header promises: it is damaged or was not copied to its end"
        )
    if exact:
        samples: Samples = found[:, 0]
        return samples
    mono = found.mean(axis=1) if segment.channel is None else found[:, segment.channel]
    scaled: Samples = np.rint(mono * (1 << 15)).clip(-(1 << 15), (1 << 15) - 1).astype(np.int16)
    return scaled


def file_name(name: str) -> str:
    """Return ``name`` where it can be the name of a file, or else another one that is made of it alone.

    >>> file_name("talk-1"), file_name("../talk")
    ('talk-1', '_.._talk-8a71b0c5')
    """
    if re.fullmatch(PLAIN_NAME, name) and len(name.encode()) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"_{re.sub('[^a-zA-Z0-9.]', '_', name)[:60]}-{digest}"


def _refuse_twins(segments: Iterable[Segment]) -> None:
    places: dict[str, str] = {}
    for segment in segments:
        if segment.id in places:
            raise UserError(
                f"{segment.place}: the id {segment.id!r} stands already in {places[segment.id]}. Ids must be unique."
            )
        places[segment.id] = segment.place


def with_unique_ids(segments: Iterable[Segment]) -> list[Segment]:
    """Put the folder of its recording before each id that several have, as names like ``0001`` tend to."""
    listed = list(segments)
    counts: dict[str, int] = {}
    for segment in listed:
        counts[segment.id] = counts.get(segment.id, 0) + 1
    return [
        segment if counts[segment.id] == 1 else replace(segment, id=f"{segment.recording.parent.name}-{segment.id}")
        for segment in listed
    ]
