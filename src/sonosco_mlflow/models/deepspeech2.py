"""DeepSpeech2 (Amodei et al. 2016, arXiv 1512.02595): convolutions, batch-normed recurrent layers, CTC.

One departure: batch norm stands before a recurrent layer's input product, not behind it, so that torch's fused LSTM can
be used.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.models.ctc import CTCModel
from sonosco_mlflow.models.layers import CELLS, Dropout, LookAhead, MaskedBatchNorm, Recurrent, subsampled, valid_frames
from sonosco_mlflow.models.ranges import require_positive, require_shares
from sonosco_mlflow.models.recurrence import CLIP
from sonosco_mlflow.serialization.parameters import serializable


class Convolution(nn.Module):
    """2-D convolution over time and mel bands, batch norm, ReLU clipped at 20 (section 3.5).

    Args:
        channels: of the input.
        output_channels: of the output.
        kernel: (frames, bands) that it spans, both odd.
        stride: (frames, bands) between two outputs.
    """

    def __init__(self, channels: int, output_channels: int, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride
        self.convolution = nn.Conv2d(
            channels, output_channels, kernel, stride, (kernel[0] // 2, kernel[1] // 2), bias=False
        )
        self.norm = MaskedBatchNorm(output_channels)

    def forward(self, pictures: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[batch, time, bands, channels]``, zero in the padding, and lengths, each sub-sampled."""
        mixed = self.convolution(pictures.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        lengths = subsampled(lengths, self.stride[0])
        # Backwards, hardtanh is one pass where clamp is four.
        clipped = functional.hardtanh(self.norm(mixed, lengths), 0.0, CLIP)
        return clipped * valid_frames(lengths, clipped.shape[1])[..., None, None], lengths


@serializable
class DeepSpeech2(CTCModel):
    """DeepSpeech2.

    Args:
        n_mels: mel bands of the features.
        vocabulary_size: number of token ids.
        channels: channels of each convolution.
        time_kernels: frames that each convolution spans; odd.
        band_kernels: mel bands that each convolution spans; odd.
        time_strides: sub-sampling in time of each convolution.
        band_strides: sub-sampling of the mel bands of each convolution.
        cell: "gru", "lstm", "rnn" (tanh) or "clipped" (the paper's ReLU, clipped at 20).
        hidden_size: units of one direction of a recurrent layer.
        recurrent_layers: number of recurrent layers.
        bidirectional: whether a recurrent layer also runs backwards; the directions are summed.
        dropout: probability of dropping a value behind a recurrent layer.
        look_ahead: encoder frames of the future that a row convolution above the recurrent layers reads (section 3.7),
            for layers of one direction; 0 for none.

    Raises:
        UserError: the five lists of the convolutions differ in length, a kernel is even, the cell is unknown, or
            ``look_ahead`` is negative or beside layers of both directions.
    """

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "small": {
            "channels": [8, 16],
            "time_kernels": [11, 7],
            "band_kernels": [21, 11],
            "time_strides": [2, 2],
            "band_strides": [2, 2],
            "cell": "lstm",
            "hidden_size": 192,
            "recurrent_layers": 2,
            "bidirectional": True,
            "dropout": 0.1,
            "look_ahead": 0,
        },
        "paper": {
            "channels": [32, 32, 96],
            "time_kernels": [11, 11, 11],
            "band_kernels": [41, 21, 21],
            "time_strides": [2, 1, 1],
            "band_strides": [2, 2, 2],
            "cell": "clipped",
            "hidden_size": 1760,
            "recurrent_layers": 7,
            "bidirectional": True,
            "dropout": 0.0,
            "look_ahead": 0,
        },
    }

    def __init__(
        self,
        *,
        n_mels: int,
        vocabulary_size: int,
        channels: Sequence[int],
        time_kernels: Sequence[int],
        band_kernels: Sequence[int],
        time_strides: Sequence[int],
        band_strides: Sequence[int],
        cell: str,
        hidden_size: int,
        recurrent_layers: int,
        bidirectional: bool,
        dropout: float,
        look_ahead: int = 0,
    ) -> None:
        require_shares(dropout=dropout)
        require_positive(channels=channels, time_kernels=time_kernels, band_kernels=band_kernels)
        require_positive(time_strides=time_strides, band_strides=band_strides)
        require_positive(hidden_size=hidden_size, recurrent_layers=recurrent_layers)
        super().__init__()
        lists = [list(values) for values in (channels, time_kernels, band_kernels, time_strides, band_strides)]
        if len({len(values) for values in lists}) != 1:
            raise UserError(
                "model.settings: channels, time_kernels, band_kernels, time_strides and band_strides must "
                f"have one entry for each convolution, found {', '.join(map(str, lists))}"
            )
        if any(size % 2 == 0 for size in [*time_kernels, *band_kernels]):
            raise UserError(
                f"model.settings: time_kernels {list(time_kernels)} and band_kernels {list(band_kernels)} must be odd"
            )
        if cell not in CELLS:
            raise UserError(f"model.settings.cell is '{cell}': {nearest(cell, CELLS)}")
        if look_ahead < 0:
            raise UserError(f"model.settings.look_ahead is {look_ahead}, expected 0 or more encoder frames")
        if look_ahead and bidirectional:
            raise UserError(
                f"model.settings.look_ahead is {look_ahead}, but layers of both directions have read the whole future; "
                "set model.settings.bidirectional to false, or look_ahead to 0"
            )
        self.convolutions = nn.ModuleList()
        before, bands = 1, n_mels
        for width, frame_kernel, band_kernel, frame_stride, band_stride in zip(*lists, strict=True):
            self.convolutions.append(
                Convolution(before, width, (frame_kernel, band_kernel), (frame_stride, band_stride))
            )
            before, bands = width, -(-bands // band_stride)
        merge: Literal["sum", "forward"] = "sum" if bidirectional else "forward"
        sizes = [before * bands] + [hidden_size] * recurrent_layers
        self.norms = nn.ModuleList(MaskedBatchNorm(size) for size in sizes)
        self.recurrents = nn.ModuleList(Recurrent(cell, size, hidden_size, merge) for size in sizes[:-1])
        self.dropout = Dropout(dropout)
        self.look_ahead = LookAhead(hidden_size, look_ahead) if look_ahead else None
        self.output = nn.Linear(sizes[-1], vocabulary_size)

    def log_probabilities(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities ``[batch, frames, vocabulary]`` and the valid frames of each utterance."""
        pictures = features[..., None] * valid_frames(lengths, features.shape[1])[..., None, None]
        for convolution in self.convolutions:
            pictures, lengths = convolution(pictures, lengths)
        frames = pictures.flatten(2)
        *before, last = self.norms
        for norm, recurrent in zip(before, self.recurrents, strict=True):
            frames = self.dropout(recurrent(norm(frames, lengths), lengths))
        if self.look_ahead is not None:
            frames = self.look_ahead(frames, lengths)
        return self.output(last(frames, lengths)).log_softmax(dim=-1), lengths
