"""Layers that know how long each utterance is.

A batch is padded to its longest utterance. Every layer here that mixes frames, in time or into statistics,
leaves the padding out, so that an utterance gets the same result alone, in company, and however much it is
padded.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonosco_mlflow.models.recurrence import ClippedRNN, run

CELLS: dict[str, type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "clipped": ClippedRNN,
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
    sequences = functional.pad(sequences, (0, 0, 0, -time % count))
    return sequences.reshape(batch, -1, count * features)


def reversed_within(sequences: Tensor, lengths: Tensor) -> Tensor:
    """Reverse each sequence ``[batch, time, features]`` within its length; padding stays behind it."""
    positions = torch.arange(sequences.shape[1], device=sequences.device)
    mirrored = lengths[:, None] - 1 - positions
    source = torch.where(mirrored >= 0, mirrored, positions)
    return sequences.gather(1, source[..., None].expand_as(sequences))


class Dropout(nn.Module):
    """Dropout that costs a third of torch's on a CPU: four values share one draw of 64 bits from torch's generator.

    The probability is rounded to a 65536th, and what is kept is scaled by exactly that.

    Args:
        probability: of a value becoming 0, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"dropout is {probability}, expected at least 0 and less than 1")
        self.dropped = min(round(probability * 2**16), 2**16 - 1)

    def forward(self, values: Tensor) -> Tensor:
        """Return ``values`` with some of them 0; in evaluation, all as they are."""
        if not self.training or self.dropped == 0:
            return values
        draws = torch.empty((values.numel() + 3) // 4, dtype=torch.int64, device=values.device)
        # Without an upper end all 64 bits are drawn; by default the sign would never be.
        draws.random_(-(2**63), None)
        kept = draws.view(torch.int16)[: values.numel()].view(values.shape) >= self.dropped - 2**15
        return values * kept.to(values.dtype).mul_(2**16 / (2**16 - self.dropped))


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
        cell: "lstm", "gru", "rnn" (tanh) or "clipped" (the clipped ReLU of Amodei et al. 2016).
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
        ahead = run(self.forwards, sequences)
        if self.merge == "forward":
            return ahead
        back = reversed_within(run(self.backwards, reversed_within(sequences, lengths)), lengths)
        return ahead + back if self.merge == "sum" else torch.cat([ahead, back], dim=-1)


class LookAhead(nn.Module):
    """Row convolution (Amodei et al. 2016, section 3.7): each feature a weighted sum of itself now and soon.

    Args:
        features: of a frame.
        frames: how many frames of the future are read.
    """

    def __init__(self, features: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.convolution = nn.Conv2d(features, features, (frames + 1, 1), groups=features, bias=False)

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        """Return ``[batch, time, features]`` of the same shape; beyond an utterance's end there is silence."""
        masked = sequences * valid_frames(lengths, sequences.shape[1])[..., None]
        # As pictures of one column: conv2d is up to twice as fast as conv1d here.
        rows = functional.pad(masked, (0, 0, 0, self.frames)).mT[..., None]
        mixed: Tensor = self.convolution(rows)[..., 0].mT
        return mixed
