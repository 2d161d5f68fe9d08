"""DeepSpeech2 (Amodei et al. 2016, arXiv 1512.02595): convolutions, batch-normed recurrent layers, CTC.

Two departures from the paper. Batch norm stands before a recurrent layer's input product, not behind it, so
that torch's fused layers can be used. Simple recurrent cells use tanh in place of the clipped ReLU, for the
same reason.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.decoding.ctc import ctc_search
from sonosco_mlflow.decoding.greedy import ctc_greedy, ctc_log_likelihood
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.models.base import Hypothesis, ModelOutput, SpeechModel
from sonosco_mlflow.models.layers import CELLS, MaskedBatchNorm, Recurrent, subsampled, valid_frames
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
        clipped = self.norm(mixed, lengths).clamp(0.0, 20.0)
        return clipped * valid_frames(lengths, clipped.shape[1])[..., None, None], lengths


@serializable
class DeepSpeech2(SpeechModel):
    """DeepSpeech2.

    Args:
        n_mels: mel bands of the features.
        vocabulary_size: number of token ids.
        channels: channels of each convolution.
        time_kernels: frames that each convolution spans; odd.
        band_kernels: mel bands that each convolution spans; odd.
        time_strides: sub-sampling in time of each convolution.
        band_strides: sub-sampling of the mel bands of each convolution.
        cell: "gru", "lstm" or "rnn".
        hidden_size: units of one direction of a recurrent layer.
        recurrent_layers: number of recurrent layers.
        bidirectional: whether a recurrent layer also runs backwards; the directions are summed.
        dropout: probability of dropping a value behind a recurrent layer.

    Raises:
        UserError: the five lists of the convolutions differ in length, a kernel is even, or the cell is
            unknown.
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
        },
        "paper": {
            "channels": [32, 32, 96],
            "time_kernels": [11, 11, 11],
            "band_kernels": [41, 21, 21],
            "time_strides": [2, 1, 1],
            "band_strides": [2, 2, 2],
            "cell": "rnn",
            "hidden_size": 1760,
            "recurrent_layers": 7,
            "bidirectional": True,
            "dropout": 0.0,
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
    ) -> None:
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
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(sizes[-1], vocabulary_size)

    def forward(self, batch: Batch) -> ModelOutput:
        """Return CTC loss and log-probabilities of ``batch``.

        An utterance's loss is the negative log-likelihood of its tokens divided by their number; one with too
        few encoder frames for its tokens counts as 0 and gives no gradient.
        """
        log_probs, lengths = self._log_probs(batch)
        likelihoods = ctc_log_likelihood(log_probs, lengths, batch.tokens, batch.token_lengths)
        loss = -(likelihoods / batch.token_lengths.cpu().clamp_min(1)).mean()
        return ModelOutput(loss.to(log_probs.device), log_probs, lengths)

    @torch.no_grad()
    def search(self, batch: Batch, search: Search) -> list[list[Hypothesis]]:
        """Return the best hypotheses of each utterance, and its posteriors."""
        search.refuse_attention_settings("DeepSpeech2")
        log_probs, lengths = self._log_probs(batch)
        posteriors = log_probs.exp().cpu()
        return [
            [Hypothesis(one.tokens, one.score, rows[:frames], one.total) for one in hypotheses]
            for hypotheses, rows, frames in zip(
                ctc_search(log_probs, lengths, search), posteriors, lengths.tolist(), strict=True
            )
        ]

    def teacher_forced(self, output: ModelOutput) -> list[list[int]]:
        """Return the tokens on the best path; CTC reads no reference, so :meth:`decode` gives the same."""
        return [one.tokens for one in ctc_greedy(output.logits, output.lengths)]

    def _log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        frames, lengths = batch.features[..., None], batch.feature_lengths
        frames = frames * valid_frames(lengths, frames.shape[1])[..., None, None]
        for convolution in self.convolutions:
            frames, lengths = convolution(frames, lengths)
        frames = frames.flatten(2)
        *before, last = self.norms
        for norm, recurrent in zip(before, self.recurrents, strict=True):
            frames = self.dropout(recurrent(norm(frames, lengths), lengths))
        return self.output(last(frames, lengths)).log_softmax(dim=-1), lengths
