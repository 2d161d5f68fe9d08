"""Time-depth separable convolutions with an attention decoder (Hannun et al. 2019, arXiv 1904.02619).

A frame is seen as a small picture of ``channels x mel bands``. A block first mixes time, by a convolution
over time and channels that shares its weights across mel bands, and then depth, by two fully connected layers
within each frame. The decoder's recurrent layer reads the previous tokens alone and no attention, so that
under teacher forcing attention is one product over all steps.

The paper's layer norm also runs over time; here it runs over each frame, so that padding cannot reach the
statistics.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sonosco_mlflow.decoding.greedy import State
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.models.attention import AttentionModel, Memory, attend
from sonosco_mlflow.models.layers import Dropout, subsampled, valid_frames
from sonosco_mlflow.models.ranges import require_positive, require_shares
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.text import SpecialToken


class TimeConvolution(nn.Module):
    """Convolution over time and channels, the same for each mel band, then ReLU and dropout.

    Args:
        channels: of the input.
        output_channels: of the output.
        bands: mel bands of a frame.
        kernel: frames it spans, odd.
        stride: frames between two outputs.
        dropout: probability of dropping a value.
    """

    def __init__(
        self, channels: int, output_channels: int, bands: int, kernel: int, stride: int, dropout: float
    ) -> None:
        super().__init__()
        self.picture = (channels, bands)
        self.convolution = nn.Conv2d(
            channels, output_channels, (kernel, 1), stride=(stride, 1), padding=(kernel // 2, 0)
        )
        self.dropout = Dropout(dropout)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return ``[batch, ceil(time / stride), frame]`` of ``[batch, time, frame]``, a frame being flat."""
        masked = frames * valid_frames(lengths, frames.shape[1])[..., None]
        pictures = masked.reshape(*frames.shape[:2], *self.picture).transpose(1, 2)
        mixed = self.convolution(pictures).transpose(1, 2).flatten(2)
        dropped: Tensor = self.dropout(mixed.relu())
        return dropped


class TimeDepthSeparableBlock(nn.Module):
    """One TDS block (section 2.1): time convolution, then fully connected, each residual and normed."""

    def __init__(self, channels: int, bands: int, kernel: int, dropout: float) -> None:
        super().__init__()
        size = channels * bands
        self.time = TimeConvolution(channels, channels, bands, kernel, 1, dropout)
        self.time_norm = nn.LayerNorm(size)
        self.depth = nn.Sequential(
            nn.Linear(size, size), nn.ReLU(), Dropout(dropout), nn.Linear(size, size), Dropout(dropout)
        )
        self.depth_norm = nn.LayerNorm(size)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return ``[batch, time, channels * bands]`` of the same shape."""
        frames = self.time_norm(frames + self.time(frames, lengths))
        mixed: Tensor = self.depth_norm(frames + self.depth(frames))
        return mixed


class Subsampling(nn.Module):
    """The layer before each group of blocks: a strided time convolution to new channels, normed."""

    def __init__(
        self, channels: int, output_channels: int, bands: int, kernel: int, stride: int, dropout: float
    ) -> None:
        super().__init__()
        self.stride = stride
        self.time = TimeConvolution(channels, output_channels, bands, kernel, stride, dropout)
        self.norm = nn.LayerNorm(output_channels * bands)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames ``[batch, ceil(time / stride), output_channels * bands]`` and their lengths."""
        return self.norm(self.time(frames, lengths)), subsampled(lengths, self.stride)


class Encoder(nn.Module):
    """Groups of TDS blocks, each behind a sub-sampling layer, then keys and values by one linear layer."""

    def __init__(
        self,
        bands: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int],
        kernel: int,
        attention_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.subsamplings = nn.ModuleList()
        self.groups = nn.ModuleList()
        before = 1
        for width, depth, stride in zip(channels, blocks, strides, strict=True):
            self.subsamplings.append(Subsampling(before, width, bands, kernel, stride, dropout))
            self.groups.append(
                nn.ModuleList(TimeDepthSeparableBlock(width, bands, kernel, dropout) for _ in range(depth))
            )
            before = width
        self.output = nn.Linear(before * bands, 2 * attention_size)

    def forward(self, features: Tensor, lengths: Tensor) -> Memory:
        """Return keys and values of ``features`` ``[batch, time, mel]``."""
        frames = features
        for subsampling, group in zip(self.subsamplings, self.groups, strict=True):
            frames, lengths = subsampling(frames, lengths)
            assert isinstance(group, nn.ModuleList)
            for block in group:
                frames = block(frames, lengths)
        keys, values = self.output(frames).chunk(2, dim=-1)
        return Memory(keys, values, lengths)


@serializable
class TDS(AttentionModel):
    """TDS sequence-to-sequence model.

    Args:
        n_mels: mel bands of the features.
        vocabulary_size: number of token ids.
        channels: channels of each group of blocks.
        blocks: number of blocks of each group.
        strides: sub-sampling in time before each group.
        kernel: frames that a time convolution spans; odd.
        decoder_size: size of keys, values, embeddings and of the decoder's GRU.
        dropout: probability of dropping a value.
        label_smoothing: share of the target distribution spread evenly in training.
        random_sampling: probability that training replaces a previous token by one drawn evenly (section
            3.3).
        soft_window_sigma: width of the soft window in encoder frames.
        ctc_weight: share of the training loss that is a CTC loss above the values, 0 for none.

    Raises:
        UserError: ``ctc_weight`` is none of 0 to 1, ``channels``, ``blocks`` and ``strides`` differ in length, or
            ``kernel`` is even.
    """

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "small": {
            "channels": [4, 8],
            "blocks": [2, 2],
            "strides": [4, 2],
            "kernel": 15,
            "decoder_size": 160,
            "dropout": 0.0,
            "label_smoothing": 0.05,
            "random_sampling": 0.01,
            "soft_window_sigma": 4.0,
            "ctc_weight": 0.0,
        },
        "paper": {
            "channels": [10, 14, 18],
            "blocks": [2, 3, 6],
            "strides": [2, 2, 2],
            "kernel": 21,
            "decoder_size": 512,
            "dropout": 0.2,
            "label_smoothing": 0.05,
            "random_sampling": 0.01,
            "soft_window_sigma": 4.0,
            "ctc_weight": 0.0,
        },
    }

    def __init__(
        self,
        *,
        n_mels: int,
        vocabulary_size: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int],
        kernel: int,
        decoder_size: int,
        dropout: float,
        label_smoothing: float,
        random_sampling: float,
        soft_window_sigma: float,
        ctc_weight: float = 0.0,
    ) -> None:
        require_shares(dropout=dropout, random_sampling=random_sampling)
        require_positive(channels=channels, blocks=blocks, strides=strides, kernel=kernel, decoder_size=decoder_size)
        super().__init__(label_smoothing, soft_window_sigma, ctc_weight, decoder_size, vocabulary_size)
        if not len(channels) == len(blocks) == len(strides):
            raise UserError(
                f"model.settings: channels {list(channels)}, blocks {list(blocks)} and strides "
                f"{list(strides)} must have one entry for each group of blocks"
            )
        if kernel % 2 == 0:
            raise UserError(f"model.settings.kernel is {kernel}, expected an odd number")
        self.random_sampling = random_sampling
        self.encoder = Encoder(n_mels, channels, blocks, strides, kernel, decoder_size, dropout)
        self.embedding = nn.Embedding(vocabulary_size, decoder_size)
        self.recurrent = nn.GRU(decoder_size, decoder_size, batch_first=True)
        self.output = nn.Linear(2 * decoder_size, vocabulary_size)

    def encode(self, features: Tensor, lengths: Tensor) -> Memory:
        """Return keys and values of ``features`` ``[batch, time, mel]``."""
        memory: Memory = self.encoder(features, lengths)
        return memory

    def spell(
        self, previous: Tensor, memory: Memory, state: State | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Decode all steps of ``previous`` ``[batch, steps]`` at once (section 2.2)."""
        hidden = None if state is None else state[0].transpose(0, 1).contiguous()
        queries, hidden = self.recurrent(self.embedding(previous), hidden)
        contexts, weights = attend(queries, memory, bias)
        return self.output(torch.cat([contexts, queries], dim=-1)), weights, (hidden.transpose(0, 1),)

    def spell_in_training(
        self, previous: Tensor, memory: Memory, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Decode with some previous tokens drawn evenly (section 3.3)."""
        return self.spell(self.perturb(previous), memory, bias=bias)

    def perturb(self, previous: Tensor) -> Tensor:
        """Replace previous tokens at random; never the start of a sentence."""
        drawn = torch.randint_like(previous, len(SpecialToken), self.output.out_features)
        replaced = torch.rand(previous.shape, device=previous.device) < self.random_sampling
        return torch.where(replaced & (previous >= len(SpecialToken)), drawn, previous)
