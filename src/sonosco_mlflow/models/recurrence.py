"""Recurrent layers on a CPU whose weights' gradients are one product over all steps.

torch has a fast LSTM for a CPU, but its GRU and simple layers add the outer products of every step to the gradient of
the recurrent weights: each step then moves the whole matrix through memory several times, and at the papers' sizes that
is most of the time. Here the backward loop only carries the gradient from step to step, by one product and one
multiplication each; the weights' gradients follow once, at the end. On a GPU torch's own layers run.

>>> layer = torch.nn.GRU(3, 4, batch_first=True)
>>> run(layer, torch.zeros(2, 5, 3)).shape
torch.Size([2, 5, 4])
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

CLIP = 20.0
"""The ceiling of DeepSpeech2's clipped ReLU, ``min(max(x, 0), 20)``."""


class ClippedRNN(nn.RNN):
    """The weights of a simple layer that :func:`run` runs with the clipped ReLU; torch has no such layer."""


def run(layer: nn.LSTM | nn.GRU | nn.RNN, sequences: Tensor) -> Tensor:
    """Return the outputs ``[batch, time, units]`` of all steps, as ``layer(sequences)`` does.

    Args:
        layer: one level, one direction, batch first.
        sequences: ``[batch, time, features]``.
    """
    clipped = isinstance(layer, ClippedRNN)
    if isinstance(layer, nn.LSTM) or (sequences.device.type != "cpu" and not clipped):
        found: Tensor = layer(sequences)[0]
        return found
    matrix, bias = layer.get_parameter("weight_hh_l0"), layer.get_parameter("bias_hh_l0")
    inputs = functional.linear(sequences, layer.get_parameter("weight_ih_l0"), layer.get_parameter("bias_ih_l0"))
    if isinstance(layer, nn.GRU):
        # Under autocast the inputs are of 16 bits.
        weights = (matrix.to(inputs.dtype), bias.to(inputs.dtype))
        outputs: Tensor = _Gated.apply(inputs, *weights)  # type: ignore[no-untyped-call]
    else:
        outputs = _Simple.apply(inputs, matrix, bias, clipped)  # type: ignore[no-untyped-call]
    return outputs


class _Simple(Function):
    """``h_t = f(x_t + W h_{t-1} + b)``, ``f`` being tanh or the clipped ReLU."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight: Tensor, bias: Tensor, clipped: bool) -> Tensor:
        """Return all states ``[batch, time, units]`` of ``projected``, of the same shape."""
        states = functional.pad((projected + bias).transpose(0, 1), (0, 0, 0, 0, 1, 0))
        for step in range(1, len(states)):
            state = states[step].addmm_(states[step - 1], weight.t())
            state.clamp_(0.0, CLIP) if clipped else state.tanh_()
        ctx.save_for_backward(weight, states)
        ctx.clipped = clipped
        return states[1:].transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of what :meth:`forward` took."""
        weight, states = ctx.saved_tensors
        made = states[1:]
        slopes = ((made > 0) & (made < CLIP)).to(made.dtype) if ctx.clipped else 1 - made.square()
        # First what reaches each state from its output, then in place what reaches its sum.
        flows = torch.empty_like(slopes).copy_(gradient.transpose(0, 1))
        for step in reversed(range(len(flows))):
            flows[step] *= slopes[step]
            if step:
                flows[step - 1].addmm_(flows[step], weight)
        rows = flows.flatten(0, 1)
        return flows.transpose(0, 1), rows.t() @ states[:-1].flatten(0, 1), rows.sum(dim=0), None


class _Gated(Function):
    """torch's GRU: reset and update gates ``r, z``, and ``h_t = (1 - z) n + z h_{t-1}``.

    Here ``n = tanh(x_n + r (W_n h_{t-1} + b_n))``.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return all states ``[batch, time, units]`` of ``projected`` ``[batch, time, 3 * units]``."""
        inputs = projected.transpose(0, 1).contiguous()
        steps, batch, units = len(inputs), len(projected), weight.shape[1]
        states = inputs.new_zeros(steps + 1, batch, units)
        gates, news, recurrents = (inputs.new_empty(steps, batch, size) for size in (2 * units, units, units))
        for step in range(steps):
            carried = torch.addmm(bias, states[step], weight.t())
            torch.add(inputs[step, :, : 2 * units], carried[:, : 2 * units], out=gates[step]).sigmoid_()
            reset, update = gates[step].chunk(2, dim=-1)
            recurrents[step] = carried[:, 2 * units :]
            torch.addcmul(inputs[step, :, 2 * units :], reset, recurrents[step], out=news[step]).tanh_()
            torch.lerp(news[step], states[step], update, out=states[step + 1])
        ctx.save_for_backward(weight, states, gates, news, recurrents)
        return states[1:].transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of what :meth:`forward` took."""
        weight, states, gates, news, recurrents = ctx.saved_tensors
        reset, update = gates.chunk(2, dim=-1)
        # Of a state's gradient, the shares that reach the sums inside reset gate, update gate and W_n h + b_n.
        to_new = (1 - update) * (1 - news.square())
        shares = torch.stack(
            [to_new * recurrents * reset * (1 - reset), (states[:-1] - news) * update * (1 - update), to_new * reset],
            dim=2,
        )
        outputs = gradient.transpose(0, 1)
        flow = torch.zeros_like(states[0])
        flows = torch.empty_like(states[1:])
        carried = torch.empty_like(shares)
        for step in reversed(range(len(flows))):
            torch.add(flow, outputs[step], out=flows[step])
            torch.mul(flows[step, :, None], shares[step], out=carried[step])
            flow = torch.addmm(flows[step] * update[step], carried[step].flatten(1), weight)
        rows = carried.flatten(2).flatten(0, 1)
        projected = torch.cat([carried[:, :, :2].flatten(2), flows * to_new], dim=-1)
        return projected.transpose(0, 1), rows.t() @ states[:-1].flatten(0, 1), rows.sum(dim=0)
