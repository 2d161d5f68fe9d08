"""SpecAugment on features, speed and noise on recordings, each with its random stream as an argument.

An augmentation is a pure function of (features, stream), or of (waveform, stream). The dataset makes the stream for
(seed, epoch, utterance), so that an utterance is augmented alike whichever worker loads it and whatever was loaded
before.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sonosco_mlflow.data.processor import resampled, resampled_length
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable

# What resampling costs grows with the denominator.
_LARGEST_DENOMINATOR = 1000
_LARGEST_RATIO = 100.0


class Augmentation(Protocol):
    """A random change of features."""

    def __call__(self, features: Tensor, stream: np.random.Generator) -> Tensor:
        """Return changed features ``[frames, n_mels]``, drawing from ``stream`` alone; the input is left as it is."""
        ...


class WaveformAugmentation(Protocol):
    """A random change of a recording.

    One that depends on more than its parameters, such as files, has an attribute ``digest``, a text, of all that it
    depends on; a run does not go on where that is another.
    """

    def samples(self, samples: int, stream: np.random.Generator) -> int:
        """Return how many samples become of so many, by a stream that is equal to the one of the change itself."""
        ...

    def __call__(self, waveform: Tensor, stream: np.random.Generator) -> Tensor:
        """Return a changed waveform ``[samples]``, drawing from ``stream`` alone; the input is left as it is."""
        ...


def _uniform_integer(stream: np.random.Generator, upper: int) -> int:
    # By a uniform draw: NumPy's are the same on every instruction set.
    return int(stream.random() * (upper + 1))


@serializable
class SpecAugment:
    """Masks of whole time spans and mel bands (Park et al. 2019, arXiv 1904.08779, section 2).

    Masked cells become 0, the mean of normalised features. There is no time warping: the paper found that it
    contributes least.

    Args:
        time_masks: number of time masks.
        time_mask_frames: largest width of one (T).
        time_mask_share: bound on one mask's share of the utterance (p).
        frequency_masks: number of frequency masks.
        frequency_mask_bands: largest width of one (F).
    """

    def __init__(
        self,
        time_masks: int = 2,
        time_mask_frames: int = 40,
        time_mask_share: float = 0.2,
        frequency_masks: int = 2,
        frequency_mask_bands: int = 27,
    ) -> None:
        self.time_masks = time_masks
        self.time_mask_frames = time_mask_frames
        self.time_mask_share = time_mask_share
        self.frequency_masks = frequency_masks
        self.frequency_mask_bands = frequency_mask_bands

    def __call__(self, features: Tensor, stream: np.random.Generator) -> Tensor:
        """Return ``features`` ``[frames, n_mels]`` with masks drawn from ``stream``."""
        features = features.clone()
        frames, bands = features.shape
        for _ in range(self.frequency_masks):
            width = _uniform_integer(stream, min(self.frequency_mask_bands, bands))
            start = _uniform_integer(stream, bands - width)
            features[:, start : start + width] = 0.0
        for _ in range(self.time_masks):
            width = _uniform_integer(stream, min(self.time_mask_frames, int(self.time_mask_share * frames)))
            start = _uniform_integer(stream, frames - width)
            features[start : start + width] = 0.0
        return features


def _ratio(speed: float) -> tuple[int, int]:
    """Return a speed as a fraction, as it is written: 0.9 is 9/10."""
    return Fraction(str(speed)).as_integer_ratio()


@serializable
class SpeedPerturbation:
    """Plays a recording at one of several speeds, pitch and all (Ko et al. 2015, "Audio augmentation").

    Args:
        speeds: one of them is drawn, each alike; at 1.1 a recording is 1.1 times as fast, and shorter.

    Raises:
        UserError: there is none, or one is out of its range.
    """

    def __init__(self, speeds: Sequence[float] = (0.9, 1.0, 1.1)) -> None:
        if not speeds or not all(0.5 <= speed <= 2 and _ratio(speed)[1] <= _LARGEST_DENOMINATOR for speed in speeds):
            raise UserError(
                f"augment.speeds: found {list(speeds)}, expected numbers from 0.5 to 2 with up to three decimals, such "
                "as [0.9, 1.0, 1.1]"
            )
        self.speeds = list(speeds)

    def samples(self, samples: int, stream: np.random.Generator) -> int:
        """Return how long a recording of so many samples becomes."""
        return resampled_length(samples, *self._rates(stream))

    def __call__(self, waveform: Tensor, stream: np.random.Generator) -> Tensor:
        """Return ``waveform`` ``[samples]`` at the speed that ``stream`` draws."""
        return resampled(waveform, *self._rates(stream))

    def _rates(self, stream: np.random.Generator) -> tuple[int, int]:
        return _ratio(self.speeds[_uniform_integer(stream, len(self.speeds) - 1)])


@serializable
class Noise:
    """Adds noise at a random ratio of signal to noise, between white and brown.

    Its power falls as a power of the frequency, drawn between 0 (white) and 2 (brown), and is level below 1/320 of the
    sample rate (50 Hz at 16 kHz), where there is nothing to hear.

    Args:
        lowest: ratio of the powers of signal and noise over the whole recording, in dB.
        highest: the ratio is drawn between the two, each alike.
        share: probability that there is noise at all.

    Raises:
        UserError: ``lowest`` is above ``highest``, or one is beyond 100 dB.
    """

    def __init__(self, lowest: float = 10.0, highest: float = 30.0, share: float = 0.5) -> None:
        if not -_LARGEST_RATIO <= lowest <= highest <= _LARGEST_RATIO:
            raise UserError(
                f"augment.noise_snr: found {[lowest, highest]}, expected the lower ratio first, both from -100 to 100"
            )
        self.lowest = lowest
        self.highest = highest
        self.share = share

    def samples(self, samples: int, stream: np.random.Generator) -> int:
        """Return the number of samples as it is."""
        return samples

    def __call__(self, waveform: Tensor, stream: np.random.Generator) -> Tensor:
        """Return ``waveform`` ``[samples]`` with noise drawn from ``stream``."""
        if stream.random() >= self.share:
            return waveform
        ratio = self.lowest + (self.highest - self.lowest) * stream.random()
        slope = 2 * stream.random()
        # By uniform draws: NumPy's are the same on every instruction set. A sum of many is as good as normal.
        # A power of two is quickly transformed.
        length = 1 << len(waveform).bit_length()
        spectrum = np.fft.rfft(stream.random(length) - 0.5)
        spectrum *= np.maximum(np.fft.rfftfreq(length), 1 / 320) ** (-slope / 2)
        noise = np.fft.irfft(spectrum, length)[: len(waveform)]
        power = float(waveform.double().square().mean()) / 10 ** (ratio / 10)
        scaled = noise * np.sqrt(power / max(float(np.square(noise).mean()), 1e-30))
        return waveform + torch.from_numpy(scaled).to(waveform.dtype)
