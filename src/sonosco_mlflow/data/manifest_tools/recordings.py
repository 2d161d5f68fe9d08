"""What can be said of a manifest's rows by opening their recordings: in many processes, one at a time in each."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from sonosco_mlflow.data.executors import Processes
from sonosco_mlflow.data.manifest_tools.findings import Finding
from sonosco_mlflow.data.manifest_tools.rows import numbered_rows
from sonosco_mlflow.data.sounds import NO_SOUND

SECONDS_OFF = 0.01
"""How far a row's duration may be from its recording's: what rounding to two digits does, and a little."""
FULL_SCALE = 0.9999
"""From here on a sample is as loud as one can be: the largest of 16 bits is 0.99997."""
QUIET = 0.001
"""A recording without a sample above it, 60 dB below full scale, is silent."""

# Samples of a recording that are in memory at once, and that the next ones begin with: a triple ends in one of them.
_SAMPLES = 1 << 20
_OVERLAP = 2


@dataclass(frozen=True, slots=True)
class Expected:
    """What each recording should be."""

    sample_rate: int = 16_000
    channels: int = 1


@dataclass(frozen=True, slots=True)
class _Task:
    manifest: str
    line: int
    id: str
    path: Path
    duration: float


def check_recordings(
    paths: Sequence[Path], expected: Expected, processes: int, progress: Callable[[int, int], None]
) -> Iterator[Finding]:
    """Yield what is wrong with the recordings of manifests, in the order of their rows; lines that are none are passed.

    Args:
        paths: the manifests.
        expected: of each recording.
        processes: how many work at once.
        progress: called with (done, all).

    Raises:
        UserError: there is no such manifest.
    """
    tasks = [
        _Task(str(path), line, row.id, path.parent / row.audio_filepath, row.duration)
        for path in paths
        for line, row in numbered_rows(path)
        if not isinstance(row, str)
    ]
    looked_at = Processes(processes).map(partial(_look_at, expected=expected), tasks)
    first_of: dict[bytes, _Task] = {}
    for done, (task, (digest, found)) in enumerate(zip(tasks, looked_at, strict=True), start=1):
        first = first_of.setdefault(digest, task) if digest else task
        # That a path stands in two rows is known without opening it.
        if first is not task and first.path.resolve() != task.path.resolve():
            found = [*found, ("same-audio", f"{task.path} has the bytes of {first.manifest}:{first.line}")]
        for check, what in found:
            yield Finding(task.manifest, task.line, task.id, check, what)
        progress(done, len(tasks))


def _look_at(task: _Task, expected: Expected) -> tuple[bytes, list[tuple[str, str]]]:
    """Return the digest of a recording, where there is one, and what is wrong with it: checks with what they found."""
    try:
        with task.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except (OSError, ValueError) as error:
        # A path with a null character is no OSError.
        reason = error.strerror if isinstance(error, OSError) else error
        return b"", [("file", f"{task.path} cannot be opened ({reason})")]
    try:
        with soundfile.SoundFile(task.path) as audio:
            return digest, [*_check_header(audio, task, expected), *_check_samples(audio, task.path)]
    except NO_SOUND as error:
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
        return digest, [("audio", f"{task.path} cannot be read as audio ({reason.strip().rstrip('.')})")]


def _check_header(audio: soundfile.SoundFile, task: _Task, expected: Expected) -> Iterator[tuple[str, str]]:
    seconds = audio.frames / audio.samplerate
    if abs(seconds - task.duration) > SECONDS_OFF:
        yield "duration", f"the duration is {task.duration:g} s, and {task.path} has {seconds:g} s"
    if audio.samplerate != expected.sample_rate:
        yield "sample-rate", f"{task.path} has {audio.samplerate} Hz, expected {expected.sample_rate}"
    if audio.channels != expected.channels:
        yield "channels", f"{task.path} has {audio.channels} channels, expected {expected.channels}"


def _check_samples(audio: soundfile.SoundFile, path: Path) -> Iterator[tuple[str, str]]:
    frames, peak, clipped = 0, 0.0, 0
    for block in audio.blocks(_SAMPLES, overlap=_OVERLAP, dtype="float32", always_2d=True):
        loudness = np.abs(block)
        full = loudness >= FULL_SCALE
        clipped += int((full[:-2] & full[1:-1] & full[2:]).sum())
        peak = max(peak, float(loudness.max(initial=0.0)))
        frames += len(block) - (_OVERLAP if frames else 0)
    if frames < audio.frames or frames == 0:
        yield "audio", f"{path} holds {frames} samples, and its header says {audio.frames}"
    elif peak < QUIET:
        yield "silence", f"{path} is silent: its loudest sample is at {peak:.5f} of full scale"
    if clipped:
        yield "clipping", f"{path} is clipped: three samples in a row at full scale, {clipped} times"
