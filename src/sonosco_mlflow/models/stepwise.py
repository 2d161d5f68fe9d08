"""Decoder steps that cannot be made at once, each as cheap as it can be.

Where a step reads what the step before attended to, decoding is a loop under teacher forcing too. Two things keep it
from costing what it costs when written down plainly: whatever does not depend on the step before is one product over
all steps, and so are the gradients of all that each step is multiplied with.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class RepeatedProduct:
    """Multiplication of one step after another by the same matrix, whose gradient is one product over all steps.

    Plain autograd would add a gradient of the matrix's size at every step. Here each step's backward pass notes what
    it would have added, and when all have run the sum of the outer products is made at once.

    >>> product = RepeatedProduct(torch.ones(3, 2))
    >>> product(torch.ones(1, 1, 2))
    tensor([[[2., 2., 2.]]])

    Args:
        matrix: ``[outputs, inputs]``, or ``[batch, outputs, inputs]`` for one of each utterance.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._notes: list[tuple[Tensor, Tensor]] = []
        self._matrix: Tensor = _Gathered.apply(matrix, self._notes)  # type: ignore[no-untyped-call]

    def __call__(self, rows: Tensor) -> Tensor:
        """Return ``[batch, steps, outputs]`` of ``rows`` ``[batch, steps, inputs]``, of one step or of some."""
        product: Tensor = _Noted.apply(rows, self._matrix, self._notes)  # type: ignore[no-untyped-call]
        return product


class _Gathered(Function):
    """The matrix as it is; backwards, its gradient from the notes of the steps, all of which have run by then."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, notes: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.notes, ctx.shared = notes, matrix.dim() == 2
        # The steps say None of the matrix's gradient; no zeros need to be made of that.
        ctx.set_materialize_grads(False)
        return matrix.view_as(matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        if not ctx.notes:
            return None, None
        rows, gradients = (torch.cat(parts, dim=1) for parts in zip(*ctx.notes, strict=True))
        # A second backward pass through the same steps would find its own notes only.
        ctx.notes.clear()
        if ctx.shared:
            return gradients.flatten(0, 1).t() @ rows.flatten(0, 1), None
        return gradients.transpose(1, 2) @ rows, None


class _Noted(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, notes: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.notes = notes
        ctx.save_for_backward(rows, matrix)
        return rows @ matrix.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Under autocast the product was of 16 bits; what it was made of may be kept in 32.
        rows, matrix = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)
        ctx.notes.append((rows, gradient))
        return gradient @ matrix, None, None


def repeated(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what a linear layer with a bias, or a sequence of layers, does, for one step after another."""
    match module:
        case nn.Linear():
            product = RepeatedProduct(module.weight)
            return lambda rows: product(rows) + module.bias
        case nn.Sequential():
            layers = [repeated(layer) for layer in module]
            return lambda rows: reduce(lambda values, layer: layer(values), layers, rows)
    return module


class LSTMSteps:
    """The levels of an ``nn.LSTM``, one step at a time.

    Args:
        layer: one direction, batch first, with biases and without dropout between levels. Its input is a token's
            embedding, followed by what the step before has fed back.
        embedding_size: features of the embedding.
    """

    def __init__(self, layer: nn.LSTM, embedding_size: int) -> None:
        levels = range(layer.num_layers)
        first = layer.get_parameter("weight_ih_l0")
        self._embedded, fed = RepeatedProduct(first[:, :embedding_size]), first[:, embedding_size:]
        from_below = [fed, *(layer.get_parameter(f"weight_ih_l{level}") for level in levels[1:])]
        self._biases = [
            layer.get_parameter(f"bias_ih_l{level}") + layer.get_parameter(f"bias_hh_l{level}") for level in levels
        ]
        self._products = [
            (RepeatedProduct(matrix), RepeatedProduct(layer.get_parameter(f"weight_hh_l{level}")))
            for level, matrix in enumerate(from_below)
        ]

    def of_tokens(self, embedded: Tensor) -> Tensor:
        """Return the tokens' share of the first level's gates, ``[batch, steps, 4 * units]``, of one step or of all."""
        return self._embedded(embedded) + self._biases[0]

    def __call__(self, of_token: Tensor, fed: Tensor, hidden: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Make one step.

        Args:
            of_token: ``[batch, 1, 4 * units]``, its entry of :meth:`of_tokens`.
            fed: ``[batch, 1, fed back]``.
            hidden: ``[batch, levels, units]``.
            cells: ``[batch, levels, units]``.

        Returns:
            ``hidden`` and ``cells`` after it; the output is the last level's.
        """
        below = fed
        hidden_after, cells_after = [], []
        for level, (of_below, of_own) in enumerate(self._products):
            share = of_token if level == 0 else self._biases[level]
            gates = of_below(below) + of_own(hidden[:, level : level + 1]) + share
            entry, forget, new, out = gates.chunk(4, dim=-1)
            cell = forget.sigmoid() * cells[:, level : level + 1] + entry.sigmoid() * new.tanh()
            below = out.sigmoid() * cell.tanh()
            hidden_after.append(below)
            cells_after.append(cell)
        return torch.cat(hidden_after, dim=1), torch.cat(cells_after, dim=1)
