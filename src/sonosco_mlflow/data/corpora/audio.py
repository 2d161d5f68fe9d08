"""Sound for the corpora: exact resampling, levelling, and 16 bit wav files.

A corpus must have the same bytes on every processor. Sums of floating point numbers do not, because their
order and their rounding depend on the instruction set; sums of integers do. So the filter has integer
coefficients, and since every product and partial sum stays below 2**53, float64 holds each of them exactly:
the fast matrix product of floats gives the integers themselves.
"""

import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from sonosco_mlflow.data.sounds import NO_SOUND
from sonosco_mlflow.errors import UserError

Samples = npt.NDArray[np.int16]
"""PCM, [time]."""

SYNTHESIS_RATE = 22_050
SAMPLE_RATE = 16_000
_DOWN, _UP = 441, 320  # 22,050 / 16,000 in lowest terms

_REACH = 48  # samples of input on each side that an output sample looks at
# The transition band, 450 Hz on each side of it, ends at the new Nyquist frequency.
_CUTOFF = 7_550 / SYNTHESIS_RATE
_UNITY = 1 << 15
# Outputs computed at once. The filter is zero far from the diagonal; and products this small stay in one thread,
# where BLAS would otherwise spend ten times the work on threads that wait for each other.
_GROUP = 10
_PEAK = 20_000
_MARGIN = SAMPLE_RATE * 6 // 100


def resampling_filter() -> npt.NDArray[np.float64]:
    """Return the windowed-sinc filter bank [441 + 2 * 48, 320]: one block of input to one block of output.

    The values are whole numbers; a column sums to about 2**15.
    """
    source = np.arange(-_REACH, _DOWN + _REACH)[:, None]
    distance = source - np.arange(_UP)[None, :] * _DOWN / _UP
    window = np.where(np.abs(distance) < _REACH, 0.5 + 0.5 * np.cos(np.pi * distance / _REACH), 0.0)
    coefficients: npt.NDArray[np.float64] = np.rint(_UNITY * 2 * _CUTOFF * np.sinc(2 * _CUTOFF * distance) * window)
    return coefficients


_FILTER = resampling_filter()


def to_sixteen_kilohertz(samples: Samples) -> npt.NDArray[np.int64]:
    """Resample [time] from 22,050 Hz to 16,000 Hz; the result is scaled up by 2**15 and exact."""
    blocks = -(-len(samples) // _DOWN)
    padded = np.zeros(_REACH + blocks * _DOWN + _REACH)
    padded[_REACH : _REACH + len(samples)] = samples
    windows = np.lib.stride_tricks.sliding_window_view(padded, _DOWN + 2 * _REACH)[::_DOWN]
    resampled = np.empty((blocks, _UP))
    for first in range(0, _UP, _GROUP):
        low, high = first * _DOWN // _UP, (first + _GROUP - 1) * _DOWN // _UP + 2 * _REACH + 1
        group = slice(first, first + _GROUP)
        resampled[:, group] = windows[:, low:high] @ _FILTER[low:high, group]
    length = -(-len(samples) * _UP // _DOWN)
    return resampled.astype(np.int64).reshape(-1)[:length]


def trim_and_level(samples: npt.NDArray[np.int64]) -> Samples:
    """Cut [time] to what is louder than 1 % of the peak and 60 ms around it; bring the peak to 20,000."""
    peak = int(np.abs(samples).max())
    loud = np.flatnonzero(np.abs(samples) * 100 > peak)
    kept = samples[max(0, loud[0] - _MARGIN) : loud[-1] + 1 + _MARGIN]
    return ((kept * _PEAK + peak // 2) // peak).astype(np.int16)


def write_wave(path: Path, samples: Samples, sample_rate: int) -> None:
    """Write [time] as a mono 16 bit wav file; the same samples give the same bytes."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.astype("<i2").tobytes())


def duration_of(path: Path) -> float:
    """Return frames / sample rate, in seconds, from the header of an audio file.

    Raises:
        UserError: it cannot be read, or holds no samples.
    """
    try:
        header = soundfile.info(str(path))
    except NO_SOUND as error:
        raise UserError(f"{path}: cannot be read as audio ({error}).") from error
    if header.frames <= 0:
        raise UserError(f"{path}: holds no samples.")
    return float(header.frames / header.samplerate)
