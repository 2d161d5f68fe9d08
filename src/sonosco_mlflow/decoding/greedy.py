"""Greedy decoding of whole batches: the most likely token at each frame (CTC) or step (attention).

Nothing here knows a model: CTC decoding takes the log-probabilities, attention decoding takes what makes one step. So
every model decodes by the same two loops, and they stand below the models in the order of imports.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sonosco_mlflow.text import SpecialToken

State = tuple[Tensor, ...]
"""What a decoder carries from one step to the next; the first dimension of each tensor is the batch."""


class Steps(Protocol):
    """A decoder's steps for a batch of utterances, of which each has the same number of neighbouring rows."""

    def __call__(self, previous: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        """Make one step.

        Args:
            previous: ``[rows]``, the tokens before.
            state: after the step before, None before the first.

        Returns:
            Log-probabilities of the next token ``[rows, vocabulary]``, attention weights ``[rows, frames]``, and the
            state after the step.
        """
        ...

    def of(self, utterances: Tensor) -> "Steps":
        """Return the steps for some of the utterances alone."""
        ...


@dataclass(frozen=True)
class Decoded:
    """A hypothesis for one utterance.

    Attributes:
        tokens: ids without special tokens.
        score: natural logarithm of the sequence's probability.
        weights: ``[steps, frames]`` on the CPU, the attention of each step up to and including the end of
            sentence; empty for CTC.
        total: what it was ranked by; the score, where that alone counts.
    """

    tokens: list[int]
    score: float
    weights: Tensor
    total: float


def without_special(tokens: list[int]) -> list[int]:
    """Return ``tokens`` less the special ones."""
    return [token for token in tokens if token >= len(SpecialToken)]


def ctc_log_likelihood(
    log_probs: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor, impossible_as_zero: bool = False
) -> Tensor:
    """Return ``[batch]``, each utterance's log-probability of its tokens, summed over all alignments.

    It runs on the CPU whatever the device of ``log_probs``: the backward pass of torch's CUDA kernel adds in
    no fixed order.

    Args:
        log_probs: ``[batch, frames, vocabulary]``.
        lengths: ``[batch]``, frames of each utterance.
        tokens: ``[batch, length]``.
        token_lengths: ``[batch]``.
        impossible_as_zero: whether tokens that no alignment says, as those of an utterance with too few frames, count
            as 0 and give no gradient, instead of -inf.
    """
    return -functional.ctc_loss(
        log_probs.transpose(0, 1).cpu(),
        tokens.cpu(),
        lengths.cpu(),
        token_lengths.cpu(),
        blank=SpecialToken.BLANK,
        reduction="none",
        zero_infinity=impossible_as_zero,
    )


def ctc_best_paths(log_probs: Tensor, lengths: Tensor) -> list[Tensor]:
    """Return the tokens on each utterance's best path: repeats merged, then blanks dropped.

    Args:
        log_probs: ``[batch, frames, vocabulary]``.
        lengths: ``[batch]``, frames of each utterance.
    """
    best = log_probs.argmax(dim=-1)
    before = functional.pad(best[:, :-1], (1, 0), value=-1)
    valid = torch.arange(best.shape[1]) < lengths[:, None]
    kept = valid & (best != before) & (best >= len(SpecialToken))
    return [row[mask] for row, mask in zip(best, kept, strict=True)]


def ctc_greedy(log_probs: Tensor, lengths: Tensor) -> list[Decoded]:
    """Return the tokens on each utterance's best path.

    The score is that of the token sequence over all its alignments, not of the one path.

    Args:
        log_probs: ``[batch, frames, vocabulary]``.
        lengths: ``[batch]``, frames of each utterance.
    """
    log_probs, lengths = log_probs.detach().cpu(), lengths.cpu()
    rows = ctc_best_paths(log_probs, lengths)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float(SpecialToken.PAD))
    scores = ctc_log_likelihood(log_probs, lengths, tokens, torch.tensor([len(row) for row in rows]))
    return [
        Decoded(row.tolist(), score, torch.empty(0), score) for row, score in zip(rows, scores.tolist(), strict=True)
    ]


def attention_greedy(steps: Steps, limits: Tensor) -> list[Decoded]:
    """Return each utterance's tokens, taking the likeliest next one until the end of sentence.

    All utterances take their steps together; the loop ends when each has its end of sentence or has reached
    its limit.

    Args:
        steps: the decoder's, one row an utterance; the first gets the start of sentence and no state.
        limits: ``[batch]`` int64, at least 1; the greatest number of steps of each utterance.
    """
    previous = torch.full_like(limits, int(SpecialToken.SOS))
    active = torch.ones_like(limits, dtype=torch.bool)
    scores = torch.zeros(limits.shape, dtype=torch.float64, device=limits.device)
    counts = torch.zeros_like(limits)
    tokens: list[Tensor] = []
    weights: list[Tensor] = []
    state: State | None = None
    while bool(active.any()):
        log_probs, attended, state = steps(previous, state)
        best_score, previous = log_probs.max(dim=-1)
        tokens.append(previous)
        weights.append(attended)
        scores = scores + best_score.masked_fill(~active, 0.0)
        counts = counts + active
        active = active & (previous != SpecialToken.EOS) & (counts < limits)
    all_tokens, all_weights = torch.stack(tokens, dim=1).cpu(), torch.stack(weights, dim=1).cpu()
    return [
        Decoded(without_special(row[:count].tolist()), score, attended[:count], score)
        for row, score, attended, count in zip(all_tokens, scores.tolist(), all_weights, counts.tolist(), strict=True)
    ]
