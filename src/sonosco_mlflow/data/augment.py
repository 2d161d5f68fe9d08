"""SpecAugment on features, with its random stream as an argument.

An augmentation is a pure function of (features, stream). The dataset makes the stream for (seed, epoch, utterance),
so that an utterance is augmented alike whichever worker loads it and whatever was loaded before.
"""

from typing import Protocol

import numpy as np
from torch import Tensor

from sonosco_mlflow.serialization.parameters import serializable


class Augmentation(Protocol):
    """A random change of features."""

    def __call__(self, features: Tensor, stream: np.random.Generator) -> Tensor:
        """Return changed features ``[frames, n_mels]``, drawing from ``stream`` alone; the input is left as it is."""
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
