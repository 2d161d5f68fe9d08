"""AudioDataProcessor: from a sound file to features, log-mel energies or what is made of them.

All of them are torchaudio's numbers to the last bit, without dither, and windows and filters are made once. A frame
covers the samples from the start of its window on, so that the number of frames follows from the number of samples.

>>> processor = AudioDataProcessor(n_mels=80)
>>> processor.features(torch.zeros(16000)).shape
torch.Size([98, 80])
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import soundfile
import torch
import torchaudio
from torch import Tensor

from sonosco_mlflow.data.sounds import NO_SOUND
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable

WINDOWS: Mapping[str, Callable[[int], Tensor]] = {
    "hann": partial(torch.hann_window, periodic=False),
    "hamming": partial(torch.hamming_window, periodic=False),
    "blackman": partial(torch.blackman_window, periodic=False),
    "povey": lambda length: torch.hann_window(length, periodic=False) ** 0.85,
}

PRE_EMPHASIS = 0.97  # Kaldi's


def _kaldi_blackman(length: int) -> Tensor:
    """Return what `torch.blackman_window` does but for the rounding, which low energies show."""
    samples = torch.arange(length, dtype=torch.float32)
    step = 2 * math.pi / (length - 1)
    return 0.42 - 0.5 * torch.cos(step * samples) + 0.08 * torch.cos(2 * step * samples)


def resampled_length(samples: int, rate: int, new_rate: int) -> int:
    """Return how many samples :func:`resampled` gives of so many: ``ceil(samples * new_rate / rate)``."""
    return -(-samples * new_rate // rate)


def resampled(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """Return ``waveform`` ``[samples]`` of one rate at another."""
    if rate == new_rate:
        return waveform
    found = torchaudio.functional.resample(waveform, rate, new_rate)
    # torchaudio counts in single precision, which long recordings are beyond.
    return torch.nn.functional.pad(found, (0, resampled_length(len(waveform), rate, new_rate) - len(found)))


def read_audio(path: Path, sample_rate: int) -> Tensor:
    """Return the samples of a sound file as float32 ``[samples]`` in [-1, 1] at ``sample_rate`` Hz, mixed to mono.

    Reads what libsndfile reads: wav, flac, ogg, opus, mp3, NIST sphere.

    Raises:
        UserError: the file is missing or is no sound file that can be read.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except NO_SOUND as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from error
    return resampled(torch.from_numpy(samples).mean(dim=1), rate, sample_rate)


@serializable
class AudioDataProcessor:
    """Log-mel filter-bank energies of a waveform, as ``torchaudio.transforms.MelSpectrogram`` computes them.

    Args:
        sample_rate: Hz; audio at another rate is resampled to it.
        n_mels: number of mel filters.
        window_size: seconds of one analysis window.
        window_stride: seconds between the starts of two windows.
        window: "hann", "hamming", "blackman" or "povey" (a Hann window to the power 0.85, as in Kaldi).

    Raises:
        UserError: an unknown window, a window or stride of no samples, or more mel bands than frequencies.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mels: int = 80,
        window_size: float = 0.025,
        window_stride: float = 0.01,
        window: str = "hann",
    ) -> None:
        if window not in WINDOWS:
            raise UserError(f"features.window is '{window}', expected one of {', '.join(WINDOWS)}")
        self.sample_rate = sample_rate
        self.n_mels = n_mels
        self.window = window
        self.window_length = round(window_size * sample_rate)
        self.hop_length = round(window_stride * sample_rate)
        if self.window_length < 2 or self.hop_length < 1:
            raise UserError(
                f"features.window_size {window_size} and features.window_stride {window_stride} are "
                f"{self.window_length} and {self.hop_length} samples at {sample_rate} Hz; expected at least 2 and 1"
            )
        self._n_fft = 2 ** math.ceil(math.log2(self.window_length))
        if n_mels > self._n_fft // 2 + 1:
            raise UserError(
                f"features.n_mels is {n_mels}, expected at most {self._n_fft // 2 + 1}, the frequencies of a window of "
                f"{self.window_length} samples"
            )
        self._window = WINDOWS[window](self.window_length)
        self._filters = torchaudio.functional.melscale_fbanks(
            self._n_fft // 2 + 1, 0.0, float(sample_rate // 2), n_mels, sample_rate
        )

    @property
    def size(self) -> int:
        """Numbers in a frame."""
        return self.n_mels

    def frames(self, samples: int) -> int:
        """Return the number of feature frames of a waveform of that many samples at ``sample_rate``."""
        return max(0, 1 + (samples - self.window_length) // self.hop_length)

    def features(self, waveform: Tensor) -> Tensor:
        """Return the features ``[frames, size]`` float32 of a waveform ``[samples]``.

        Raises:
            UserError: the waveform is shorter than one window.
        """
        if self.frames(len(waveform)) == 0:
            raise UserError(f"{len(waveform)} samples are shorter than one analysis window of {self.window_length}")
        return self._frames_of(waveform.float())

    def _frames_of(self, waveform: Tensor) -> Tensor:
        """Return the natural logarithm of the mel energies of a waveform that is long enough."""
        return self._mel_energies(waveform).clamp_min_(1e-10).log_()

    def _mel_energies(self, waveform: Tensor) -> Tensor:
        frames = waveform.unfold(0, self.window_length, self.hop_length)
        spread = frames.new_zeros(len(frames), self._n_fft)
        # torchaudio has a window in the middle of the samples that are transformed, which the rounding depends on.
        left = (self._n_fft - self.window_length) // 2
        torch.mul(frames, self._window, out=spread[:, left : left + self.window_length])
        return self._filtered(spread)

    def _filtered(self, windows: Tensor) -> Tensor:
        """Return the mel energies ``[frames, n_mels]`` of windows ``[frames, n_fft]``."""
        energies: Tensor = torch.fft.rfft(windows).abs().square_() @ self._filters
        return energies

    def __call__(self, path: Path) -> Tensor:
        """Return the features ``[frames, size]`` of a sound file.

        Raises:
            UserError: the file cannot be read, or is shorter than one window; the message names it.
        """
        waveform = read_audio(path, self.sample_rate)
        try:
            return self.features(waveform)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


@serializable
class KaldiFilterBankProcessor(AudioDataProcessor):
    """Kaldi's log-mel filter banks, as ``torchaudio.compliance.kaldi.fbank`` computes them.

    To the last bit, but where each window begins one sample behind the one before: its means are then summed otherwise.

    Samples count as 16 bit integers, as Kaldi reads them; each window is centred and pre-emphasised.

    Args:
        sample_rate: Hz; audio at another rate is resampled to it.
        n_mels: number of mel filters, at least 4.
        window_size: seconds of one analysis window.
        window_stride: seconds between the starts of two windows.
        window: "hann", "hamming", "blackman" or "povey", which is Kaldi's own.

    Raises:
        UserError: as for :class:`AudioDataProcessor`, or fewer than 4 mel bands.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mels: int = 80,
        window_size: float = 0.025,
        window_stride: float = 0.01,
        window: str = "povey",
    ) -> None:
        super().__init__(sample_rate, n_mels, window_size, window_stride, window)
        if n_mels < 4:
            raise UserError(f"features.n_mels is {n_mels}, expected at least 4 for Kaldi's filter banks")
        self._window = (_kaldi_blackman if window == "blackman" else WINDOWS[window])(self.window_length)
        banks, _ = torchaudio.compliance.kaldi.get_mel_banks(
            n_mels,
            self._n_fft,
            sample_rate,
            low_freq=20.0,
            high_freq=0.0,  # up to half the sample rate
            vtln_low=100.0,
            vtln_high=-500.0,
            vtln_warp_factor=1.0,  # none
        )
        self._filters = torch.nn.functional.pad(banks, (0, 1)).T

    def _frames_of(self, waveform: Tensor) -> Tensor:
        frames = waveform.unfold(0, self.window_length, self.hop_length) * 2**15
        frames -= frames.mean(dim=1, keepdim=True)
        spread = frames.new_zeros(len(frames), self._n_fft)
        emphasised = spread[:, : self.window_length]
        torch.mul(frames[:, :-1], -PRE_EMPHASIS, out=emphasised[:, 1:])
        torch.mul(frames[:, 0], -PRE_EMPHASIS, out=emphasised[:, 0])
        emphasised += frames
        emphasised *= self._window
        return self._filtered(spread).clamp_min_(torch.finfo(torch.float32).eps).log_()


@serializable
class MelCepstrumProcessor(AudioDataProcessor):
    """Mel-frequency cepstral coefficients, as ``torchaudio.transforms.MFCC`` computes them of log-mel energies.

    Args:
        sample_rate: Hz; audio at another rate is resampled to it.
        n_mels: number of mel filters.
        window_size: seconds of one analysis window.
        window_stride: seconds between the starts of two windows.
        window: "hann", "hamming", "blackman" or "povey".
        n_mfcc: number of coefficients, the first ones of an orthonormal cosine transform.

    Raises:
        UserError: as for :class:`AudioDataProcessor`, or more coefficients than mel bands.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mels: int = 80,
        window_size: float = 0.025,
        window_stride: float = 0.01,
        window: str = "hann",
        n_mfcc: int = 40,
    ) -> None:
        super().__init__(sample_rate, n_mels, window_size, window_stride, window)
        if n_mfcc > n_mels:
            raise UserError(f"features.n_mfcc is {n_mfcc}, expected at most {n_mels}, the number of mel bands")
        self.n_mfcc = n_mfcc
        self._cosines = torchaudio.functional.create_dct(n_mfcc, n_mels, norm="ortho")

    @property
    def size(self) -> int:
        """Numbers in a frame."""
        return self.n_mfcc

    def _frames_of(self, waveform: Tensor) -> Tensor:
        # torchaudio adds this to energies that are to become coefficients, where log-mel energies are cut off.
        coefficients: Tensor = (self._mel_energies(waveform) + 1e-6).log() @ self._cosines
        return coefficients
