"""Beam search of attention models: all hypotheses of all utterances take each step together.

An utterance's hypotheses are neighbouring rows of one batch. After each step the best children of its rows go on, as
rows again; those that end are kept aside. The path that greedy search under the same settings would take always keeps
its place, so that a wider beam never finds worse than it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from sonosco_mlflow.decoding.greedy import Decoded, State, Step, without_special
from sonosco_mlflow.decoding.search import Search, TokenScores
from sonosco_mlflow.text import SpecialToken

NEVER = float("-inf")


@dataclass(frozen=True)
class Ended:
    """The best hypotheses so far that have come to their end, ``[batch, n_best]`` each, best first.

    Attributes:
        rank: what they are ranked by; minus infinity where there is none.
        score: the model's log-probability.
        step: at which they ended, from 0.
        parent: the row that they came from at that step.
        token: their last one, the end of sentence or, at the limit, any other.
    """

    rank: Tensor
    score: Tensor
    step: Tensor
    parent: Tensor
    token: Tensor

    @classmethod
    def none(cls, batch: int, n_best: int, device: torch.device) -> "Ended":
        """Return places for ``n_best`` hypotheses of each utterance, all empty."""
        scores = torch.full((batch, n_best), NEVER, dtype=torch.float64, device=device)
        numbers = torch.zeros((batch, n_best), dtype=torch.int64, device=device)
        return cls(scores, scores, numbers, numbers, numbers)

    def joined(self, other: "Ended") -> "Ended":
        """Return the best of both; of equals, the earlier ones."""
        rank = torch.cat([self.rank, other.rank], dim=1)
        order = rank.sort(dim=1, descending=True, stable=True).indices[:, : self.rank.shape[1]]
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("score", "step", "parent", "token"))
        return Ended(rank.gather(1, order), *(torch.cat(pair, dim=1).gather(1, order) for pair in pairs))


def attention_beam(step: Step, limits: Tensor, search: Search) -> list[list[Decoded]]:
    """Return up to ``search.n_best`` hypotheses of each utterance, best first, each token sequence once.

    A child goes on if it is among the ``beam`` best of its utterance's that do not end; one that ends counts if it is
    among the ``beam`` best of all. An utterance is done when nothing that goes on can come to stand among its
    ``n_best``, and with a beam of one when that has ended. Where ``attention_limit`` or ``end_threshold`` would leave
    an utterance with nothing, that step is taken without them.

    Args:
        step: as for greedy decoding, with ``batch * beam`` rows, an utterance's side by side.
        limits: ``[batch]`` int64, at least 1; the greatest number of steps of each utterance.
        search: the settings; its language model is one over tokens.
    """
    batch, beam, device = len(limits), search.beam, limits.device
    first_rows = torch.arange(batch, device=device)[:, None] * beam
    model = torch.full((batch, beam), NEVER, dtype=torch.float64, device=device)
    model[:, 0] = 0.0
    fusion = Fusion(search, batch * beam, device)
    peaks = torch.full((batch, beam), -1, device=device)
    follows_greedy = torch.ones(batch, dtype=torch.bool, device=device)
    active = torch.ones_like(follows_greedy)
    ended = Ended.none(batch, search.n_best, device)
    previous = torch.full((batch * beam,), int(SpecialToken.SOS), device=device)
    state: State | None = None
    parents: list[Tensor] = []
    tokens: list[Tensor] = []
    weights: list[Tensor] = []
    while bool(active.any()):
        number = len(weights)
        logits, attended, state = step(previous, state)
        weights.append(attended.view(batch, beam, -1))
        log_probs = logits.log_softmax(dim=-1).double().view(batch, beam, -1)
        vocabulary = log_probs.shape[-1]
        scores = (model[..., None] + log_probs).flatten(1)
        totals = fusion.totals(scores, vocabulary)

        last_peaks, peaks = peaks, weights[-1].argmax(dim=-1)
        if search.is_limited:
            allowed = totals.masked_fill(_refused(log_probs, last_peaks, peaks, search).flatten(1), NEVER)
            stuck = (allowed.amax(dim=1) == NEVER) & (ended.rank[:, 0] == NEVER)
            totals = torch.where(stuck[:, None], totals, allowed)

        children, follows_greedy = _best_children(totals, vocabulary, beam, follows_greedy)
        rank, score = totals.gather(1, children), scores.gather(1, children)
        parent, token = children // vocabulary, children % vocabulary

        ends = token == SpecialToken.EOS
        comes_to_end = ((ends | (limits <= number + 1)[:, None]) & active[:, None])[:, :beam]
        if bool(comes_to_end.any()):
            normalised = _normalised(rank[:, :beam], number + 1, search).masked_fill(~comes_to_end, NEVER)
            own = (part[:, :beam] for part in (score, torch.full_like(parent, number), parent, token))
            ended = ended.joined(Ended(normalised, *own))

        # Those that do not end, in their order; the places behind them stay empty.
        places = torch.arange(children.shape[1], device=device)
        going = (places + len(places) * ends).topk(min(beam, len(places)), dim=1, largest=False).indices
        going = functional.pad(going, (0, beam - going.shape[1]))
        is_empty = (
            ends.gather(1, going) | (rank.gather(1, going) == NEVER) | (torch.arange(beam, device=device) > places[-1])
        )
        parent, token = parent.gather(1, going), token.gather(1, going)
        model = score.gather(1, going).masked_fill(is_empty, NEVER)
        parents.append(parent)
        tokens.append(token)
        rows = (first_rows + parent).flatten()
        previous = token.flatten()
        state = tuple(tensor.index_select(0, rows) for tensor in state)
        peaks = peaks.gather(1, parent)
        fusion.follow(rows, previous)
        live = (model + fusion.bonus.view(batch, beam)).amax(dim=1)
        active = active & (limits > number + 1) & (_reachable(live, number + 1, limits, search) > ended.rank[:, -1])
        if beam == 1:
            active = active & follows_greedy
    return _traced(ended, parents, tokens, weights)


class Fusion:
    """What language model and length reward add to each row's score.

    Args:
        search: the settings.
        rows: number of rows.
        device: where they are searched.

    Attributes:
        bonus: ``[rows]`` float64, the sum so far.
    """

    def __init__(self, search: Search, rows: int, device: torch.device) -> None:
        self.weight, self.reward = search.language_model_weight, search.length_reward
        self.language_model = cast(TokenScores | None, search.language_model)
        self.bonus = torch.zeros(rows, dtype=torch.float64, device=device)
        self._states = None if self.language_model is None else self.language_model.start(rows)
        self._gains: Tensor | None = None

    def totals(self, scores: Tensor, vocabulary: int) -> Tensor:
        """Return ``[batch, beam * vocabulary]``, the scores of all children with what is added to them."""
        if self.language_model is None and self.reward == 0.0:
            return scores
        gains = self.bonus.new_full((len(self.bonus), vocabulary), self.reward)
        gains[:, SpecialToken.EOS] = 0.0
        if self.language_model is not None and self._states is not None and self.weight:
            gains = gains + self.weight * self.language_model.log_probs(self._states).to(gains.device)
        self._gains = gains
        return scores + (self.bonus[:, None] + gains).view_as(scores)

    def follow(self, rows: Tensor, tokens: Tensor) -> None:
        """Go on with the children ``tokens`` of ``rows``, both ``[rows]``."""
        if self._gains is None:
            return
        self.bonus = self.bonus[rows] + self._gains[rows, tokens]
        # A row of nothing has a child of no probability.
        self.bonus = self.bonus.masked_fill(self.bonus == NEVER, 0.0)
        if self.language_model is not None and self._states is not None:
            self._states = self.language_model.advance(self._states[rows.to(self._states.device)], tokens)


def _refused(log_probs: Tensor, last_peaks: Tensor, peaks: Tensor, search: Search) -> Tensor:
    """Return which children ``[batch, beam, vocabulary]`` the attention's peak or the end's probability rules out."""
    refused = torch.zeros_like(log_probs, dtype=torch.bool)
    if search.attention_limit is not None:
        refused |= (((peaks - last_peaks).abs() > search.attention_limit) & (last_peaks >= 0))[..., None]
    if search.end_threshold is not None:
        others = log_probs.clone()
        others[..., SpecialToken.EOS] = NEVER
        refused[..., SpecialToken.EOS] |= log_probs[..., SpecialToken.EOS] <= search.end_threshold * others.amax(dim=-1)
    return refused


def _best_children(totals: Tensor, vocabulary: int, beam: int, follows_greedy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the children that count, ``[batch, 2 * beam]``, best first, and where the greedy path goes on.

    At most ``beam`` of them end. The child that the greedy path takes, one of the first row's, comes first whatever its
    total.
    """
    best, greedy = totals[:, :vocabulary].max(dim=1)
    follows_greedy = follows_greedy & (best > NEVER)
    keys = totals.scatter(1, greedy[:, None], torch.where(follows_greedy, float("inf"), best)[:, None])
    children = keys.topk(min(2 * beam, keys.shape[1]), dim=1).indices
    return children, follows_greedy & (greedy != SpecialToken.EOS)


def _normalised(totals: Tensor, steps: int | Tensor, search: Search) -> Tensor:
    if search.length_normalisation == 0.0:
        return totals
    return totals / (torch.ones_like(totals) * steps) ** search.length_normalisation


def _reachable(totals: Tensor, steps: int, limits: Tensor, search: Search) -> Tensor:
    """Return the highest rank that anything can have that begins with totals ``[batch]`` after ``steps`` steps.

    Log-probabilities are never above 0, so only the reward of the tokens to come and the division by a greater length
    can help.
    """
    highest = totals + max(search.length_reward, 0.0) * (limits - steps)
    soon, late = (_normalised(highest, length, search) for length in (steps + 1, limits.clamp_min(steps + 1)))
    return torch.maximum(soon, late)


def _traced(
    ended: Ended, parents: Sequence[Tensor], tokens: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[list[Decoded]]:
    """Return the hypotheses, read backwards from where they ended."""
    row, spoken, attended = torch.zeros_like(ended.parent), [], []
    for number in reversed(range(len(weights))):
        at_end, before = ended.step == number, ended.step > number
        token = torch.where(at_end, ended.token, tokens[number].gather(1, row))
        row = torch.where(at_end, ended.parent, torch.where(before, parents[number].gather(1, row), row))
        spoken.append(token)
        attended.append(weights[number].gather(1, row[..., None].expand(-1, -1, weights[number].shape[-1])))
    all_tokens = torch.stack(spoken[::-1], dim=2).cpu()
    all_weights = torch.stack(attended[::-1], dim=2).cpu()
    counts = torch.where(ended.rank > NEVER, ended.step + 1, 0).tolist()
    found = []
    for utterance, (ranks, scores) in enumerate(zip(ended.rank.tolist(), ended.score.tolist(), strict=True)):
        hypotheses: dict[tuple[int, ...], Decoded] = {}
        for place, (rank, score, count) in enumerate(zip(ranks, scores, counts[utterance], strict=True)):
            said = without_special(all_tokens[utterance, place, :count].tolist())
            if count and tuple(said) not in hypotheses:
                hypotheses[tuple(said)] = Decoded(said, score, all_weights[utterance, place, :count], rank)
        found.append(list(hypotheses.values()))
    return found
