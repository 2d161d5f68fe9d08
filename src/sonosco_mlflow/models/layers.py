"""Layers that know how long each utterance is.

A batch is padded to its longest utterance. Every layer here that mixes frames, in time or into statistics,
leaves the padding out, so that an utterance gets the same result alone, in company, and however much it is
padded.
"""

from typing import Literal

import torch
from torch import Tensor, nn

CELLS: dict[str, type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}


def valid_frames(lengths: Tensor, frames: int) -> Tensor:
    """Return ``[batch, frames]``, True where a frame is not padding.

    >>> valid_frames(torch.tensor([1, 2]), 2)
    tensor([[ True, False],
            [ True,  True]])
    """
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def subsampled(lengths: Tensor, stride: int) -> Tensor:
    """Return the lengths after keeping one frame in ``stride``, rounded up."""
    return torch.div(lengths + stride - 1, stride, rounding_mode="floor")


def join_neighbours(sequences: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Concatenate each ``count`` neighbouring frames into one (Chan et al. 2016, section 3.1).

    ``[batch, time, features]`` becomes ``[batch, ceil(time / count), count * features]``; an utterance whose
    length does not divide by ``count`` is completed with zeros.
    """
    batch, time, features = sequences.shape
    sequences = sequences * valid_frames(lengths, time)[..., None]
    sequences = nn.functional.pad(sequences, (0, 0, 0, -time % count))
    return sequences.reshape(batch, -1, count * features)


def reversed_within(sequences: Tensor, lengths: Tensor) -> Tensor:
    """Reverse each sequence ``[batch, time, features]`` within its length; padding stays behind it."""
    positions = torch.arange(sequences.shape[1], device=sequences.device)
    mirrored = lengths[:, None] - 1 - positions
    source = torch.where(mirrored >= 0, mirrored, positions)
    return sequences.gather(1, source[..., None].expand_as(sequences))


class MaskedBatchNorm(nn.Module):
    """Batch normalisation whose statistics are those of the real frames alone.

    In training each feature is normalised over all real frames of the batch, "sequence-wise" (Amodei et al.
    2016, section 3.2); in evaluation by running averages of those statistics.

    Args:
        features: size of the last dimension.
        momentum: weight of a new batch in the running averages.
        epsilon: added to the variance.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, features: int, momentum: float = 0.1, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.epsilon = epsilon
        self.scale = nn.Parameter(torch.ones(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_variance", torch.ones(features))

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        """Return ``sequences`` ``[batch, time, ..., features]`` normalised; padding means nothing then."""
        if self.training:
            # Under autocast the sequences may be of 16 bits: a sum over all frames would be short of digits.
            mean, variance = self._statistics(sequences.to(self.running_mean.dtype), lengths)
        else:
            mean, variance = self.running_mean, self.running_variance
        gain = self.scale * (variance + self.epsilon).rsqrt()
        return sequences * gain + (self.shift - mean * gain)

    def _statistics(self, sequences: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        valid = valid_frames(lengths, sequences.shape[1])
        valid = valid.reshape(valid.shape + (1,) * (sequences.dim() - 2))
        summed = tuple(range(sequences.dim() - 1))
        count = lengths.sum() * (sequences[0, 0].numel() // sequences.shape[-1])
        mean = (sequences * valid).sum(dim=summed) / count
        variance = ((sequences - mean) * valid).square().sum(dim=summed) / count
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp_min(1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_variance.lerp_(unbiased, self.momentum)
        return mean, variance


class Recurrent(nn.Module):
    """One recurrent layer, in one direction or both.

    The second direction reads each utterance reversed within its length. That equals packed sequences, which
    torch runs two to five times slower on a CPU.

    Args:
        cell: "lstm", "gru" or "rnn" (tanh).
        input_size: features of a frame.
        hidden_size: units of one direction.
        merge: "sum" of both directions, their "concatenation", or "forward" for one direction alone.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        merge: Literal["sum", "concatenation", "forward"],
    ) -> None:
        super().__init__()
        self.merge = merge
        self.forwards = CELLS[cell](input_size, hidden_size, batch_first=True)
        if merge != "forward":
            self.backwards = CELLS[cell](input_size, hidden_size, batch_first=True)
        self.output_size = 2 * hidden_size if merge == "concatenation" else hidden_size

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        """Return ``[batch, time, output_size]`` of ``sequences`` ``[batch, time, input_size]``."""
        ahead: Tensor = self.forwards(sequences)[0]
        if self.merge == "forward":
            return ahead
        back = reversed_within(self.backwards(reversed_within(sequences, lengths))[0], lengths)
        return ahead + back if self.merge == "sum" else torch.cat([ahead, back], dim=-1)
