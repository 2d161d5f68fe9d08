"""More that may happen to a recording: it is louder, higher, later, in a room, among other sounds.

Each is a :class:`~sonosco_mlflow.data.augment.WaveformAugmentation` that leaves the length as it is.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
import torchaudio
from torch import Tensor

from sonosco_mlflow.data.features import files_digest
from sonosco_mlflow.data.processor import read_audio, resampled
from sonosco_mlflow.data.sounds import NO_SOUND
from sonosco_mlflow.data.walking import files_below
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
KEPT_BYTES = 256 * 1024 * 1024
"""Of the sounds of a folder, as they were read, so many stay in memory: a minute at 16 kHz has 4 MB."""
_LARGEST_GAIN = 60.0
_LARGEST_PITCH = 12.0
# Of stretching, in samples: a piece spans a few periods of a voice, and looks for its place within one.
_PIECE, _HOP, _REACH = 512, 256, 160


class _SameLength:
    def samples(self, samples: int, stream: np.random.Generator) -> int:
        """Return the number of samples as it is."""
        return samples


@serializable
class Gain(_SameLength):
    """Makes a recording louder or softer.

    Args:
        lowest: change of its level in dB.
        highest: the change is drawn between the two, each alike.

    Raises:
        UserError: ``lowest`` is above ``highest``, or one is beyond 60 dB.
    """

    def __init__(self, lowest: float = -10.0, highest: float = 6.0) -> None:
        _require_range("augment.gain", lowest, highest, _LARGEST_GAIN)
        self.lowest = lowest
        self.highest = highest

    def __call__(self, waveform: Tensor, stream: np.random.Generator) -> Tensor:
        """Return ``waveform`` ``[samples]`` at another level; nothing is cut off at full scale."""
        return waveform * 10 ** (_between(stream, self.lowest, self.highest) / 20)


@serializable
class Pitch(_SameLength):
    """Makes a voice higher or deeper, and its resonances with it, at the speed at which it speaks.

    The recording is stretched by overlapping pieces that fit each other (WSOLA, Verhelst and Roelands 1993), and played
    so much faster. The change is rounded to the nearest fraction of a denominator of at most 100.

    Args:
        lowest: change in semitones.
        highest: the change is drawn between the two, each alike.

    Raises:
        UserError: ``lowest`` is above ``highest``, or one is beyond an octave.
    """

    def __init__(self, lowest: float = -2.0, highest: float = 2.0) -> None:
        _require_range("augment.pitch", lowest, highest, _LARGEST_PITCH)
        self.lowest = lowest
        self.highest = highest

    def __call__(self, waveform: Tensor, stream: np.random.Generator) -> Tensor:
        """Return ``waveform`` ``[samples]`` at another pitch."""
        factor = Fraction(2 ** (_between(stream, self.lowest, self.highest) / 12)).limit_denominator(100)
        if factor == 1:
            return waveform
        stretched = torch.from_numpy(_stretched(waveform.numpy(), float(factor))).to(waveform.dtype)
        played = resampled(stretched, factor.numerator, factor.denominator)[: len(waveform)]
        return torch.nn.functional.pad(played, (0, len(waveform) - len(played)))


@serializable
class Shift(_SameLength):
    """Lets a recording begin later or earlier: silence comes in where it moved from, the other end is cut off.

    Args:
        seconds: the most that it moves, either way.
        sample_rate: of the recordings, in Hz.

    Raises:
        UserError: ``seconds`` is negative.
    """

    def __init__(self, seconds: float, sample_rate: int) -> None:
        if not 0 <= seconds < math.inf:
            raise UserError(f"augment.shift: found {seconds}, expected seconds, 0 or more")
        self.seconds = seconds
        self.sample_rate = sample_rate

    def __call__(self, waveform: Tensor, stream: np.random.Generator) -> Tensor:
        """Return ``waveform`` ``[samples]`` moved in time, by less than its length."""
        most = min(round(self.seconds * self.sample_rate), len(waveform) - 1)
        moved = int(stream.random() * (2 * most + 1)) - most
        if moved >= 0:
            return torch.nn.functional.pad(waveform[: len(waveform) - moved], (moved, 0))
        return torch.nn.functional.pad(waveform[-moved:], (0, -moved))


class Sounds:
    """The sound files below a folder, in the order of their names.

    Args:
        folder: with recordings of noise, or impulse responses of rooms.
        key: of the recipe, for messages.

    Raises:
        UserError: there is none, or one of them cannot be read.
    """

    def __init__(self, folder: Path, key: str) -> None:
        found = files_below(folder) if folder.is_dir() else []
        paths = [path for path in found if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")]
        if not paths:
            raise UserError(f"{key}: found '{folder}', expected a folder with recordings ({', '.join(AUDIO_SUFFIXES)})")
        for path in paths:
            _require_sound(path, key)
        self.paths: Sequence[Path] = paths
        self._kept = _KeptSounds()

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 of what they contain; where they lie does not count."""
        return files_digest(self.paths)

    def draw(self, sample_rate: int, stream: np.random.Generator) -> Tensor:
        """Return the samples ``[samples]`` of one of them, each alike."""
        return self._kept.read(self.paths[int(stream.random() * len(self.paths))], sample_rate)

    def __getstate__(self) -> dict[str, object]:
        # Workers that are spawned remember sounds of their own.
        return {"paths": self.paths, "digest": self.digest}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._kept = _KeptSounds()


class _KeptSounds:
    """Sounds as they were read, of which the latest stay in memory."""

    def __init__(self) -> None:
        self._sounds: OrderedDict[tuple[Path, int], Tensor] = OrderedDict()
        self._bytes = 0

    def read(self, path: Path, sample_rate: int) -> Tensor:
        """Return the samples of a sound."""
        key = (path, sample_rate)
        if key not in self._sounds:
            self._sounds[key] = read_audio(path, sample_rate)
            self._bytes += self._sounds[key].nbytes
        self._sounds.move_to_end(key)
        while self._bytes > KEPT_BYTES and len(self._sounds) > 1:
            self._bytes -= self._sounds.popitem(last=False)[1].nbytes
        return self._sounds[key]


def _require_sound(path: Path, key: str) -> None:
    try:
        samples = soundfile.info(str(path)).frames
    except NO_SOUND as error:
        raise UserError(f"{key}: {path} cannot be read as audio ({error}); take it out of the folder") from error
    if samples <= 0:
        raise UserError(f"{key}: {path} holds no samples; take it out of the folder")


class RecordedNoise(_SameLength):
    """Adds a piece of a recording of noise, from a random place on and repeated where it is short.

    Args:
        sounds: recordings of noise.
        sample_rate: of the recordings that noise is added to, in Hz.
        lowest: ratio of the powers of signal and noise over the whole recording, in dB.
        highest: the ratio is drawn between the two, each alike.
        share: probability that there is noise at all.

    Raises:
        UserError: ``lowest`` is above ``highest``, or one is beyond 100 dB.
    """

    def __init__(self, sounds: Sounds, sample_rate: int, lowest: float, highest: float, share: float = 0.5) -> None:
        _require_range("augment.noise_snr", lowest, highest, 100.0)
        self.sounds = sounds
        self.sample_rate = sample_rate
        self.lowest = lowest
        self.highest = highest
        self.share = share

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of all that it depends on, the recordings of noise among it."""
        return _digest(self.sounds.digest, self.sample_rate, self.lowest, self.highest, self.share)

    def __call__(self, waveform: Tensor, stream: np.random.Generator) -> Tensor:
        """Return ``waveform`` ``[samples]`` with noise; as it is where the noise is silent."""
        if stream.random() >= self.share:
            return waveform
        ratio = _between(stream, self.lowest, self.highest)
        noise = self.sounds.draw(self.sample_rate, stream)
        first = int(stream.random() * len(noise))
        noise = noise.roll(-first).repeat(-(-len(waveform) // len(noise)))[: len(waveform)]
        powers = [float(part.double().square().mean()) for part in (waveform, noise)]
        if powers[1] == 0.0:
            return waveform
        return waveform + noise * math.sqrt(powers[0] / powers[1] / 10 ** (ratio / 10))


class Reverberation(_SameLength):
    """Plays a recording in a room, by a measured or simulated impulse response of it.

    The response is moved so that its loudest sample is the direct sound, which does not delay; the level stays.

    Args:
        sounds: impulse responses.
        sample_rate: of the recordings, in Hz.
        share: probability that there is a room at all.
    """

    def __init__(self, sounds: Sounds, sample_rate: int, share: float = 0.5) -> None:
        self.sounds = sounds
        self.sample_rate = sample_rate
        self.share = share

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of all that it depends on, the responses among it."""
        return _digest(self.sounds.digest, self.sample_rate, self.share)

    def __call__(self, waveform: Tensor, stream: np.random.Generator) -> Tensor:
        """Return ``waveform`` ``[samples]`` in a room; as it is where the response is silent."""
        if stream.random() >= self.share:
            return waveform
        response = self.sounds.draw(self.sample_rate, stream)
        response = response[int(response.abs().argmax()) :]
        played: Tensor = torchaudio.functional.fftconvolve(waveform, response)[: len(waveform)]
        powers = [float(part.double().square().mean()) for part in (waveform, played)]
        return waveform if powers[1] == 0.0 else played * math.sqrt(powers[0] / powers[1])


def _stretched(samples: npt.NDArray[np.float32], factor: float) -> npt.NDArray[np.float64]:
    """Return ``samples`` ``[time]`` spoken ``factor`` times as slowly at the same pitch.

    Pieces of the recording are laid over each other at a constant distance. Each comes from near where its time has
    come, and from that place there which continues the piece before best.
    """
    count = math.ceil(len(samples) * factor / _HOP) + 1
    padded = np.pad(samples.astype(np.float64), (_HOP + _REACH, 2 * _PIECE + _REACH))
    window = np.hanning(_PIECE + 1)[:-1]
    stretched = np.zeros(count * _HOP + _PIECE)
    place = _REACH
    for number in range(count):
        if number:
            continuation = padded[place + _HOP : place + _HOP + _PIECE]
            first = min(round(number * _HOP / factor), len(padded) - _PIECE - 2 * _REACH)
            near = padded[first : first + _PIECE + 2 * _REACH]
            place = first + int(np.correlate(near, continuation).argmax())
        stretched[number * _HOP : number * _HOP + _PIECE] += window * padded[place : place + _PIECE]
    return stretched[_HOP : _HOP + math.ceil(len(samples) * factor)]


def _between(stream: np.random.Generator, lowest: float, highest: float) -> float:
    # By a uniform draw: NumPy's are the same on every instruction set.
    return lowest + (highest - lowest) * stream.random()


def _require_range(key: str, lowest: float, highest: float, most: float) -> None:
    if not -most <= lowest <= highest <= most:
        raise UserError(
            f"{key}: found {[lowest, highest]}, expected the lower number first, both from {-most:g} to {most:g}"
        )


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
