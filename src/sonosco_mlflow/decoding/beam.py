"""Beam search of attention models: all hypotheses of all utterances take each step together.

An utterance's hypotheses are neighbouring rows of one batch. After each step the best children of its rows go on, as
rows again; those that end are kept aside. The path that greedy search under the same settings would take always keeps
its place, so that a wider beam never finds worse than it.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from sonosco_mlflow.decoding.greedy import Decoded, State, Steps, without_special
from sonosco_mlflow.decoding.search import Search, TokenScores
from sonosco_mlflow.text import SpecialToken

NEVER = float("-inf")
MOST_TO_GO_ON = 0.8
"""Share of the utterances in a batch that must still be searched for none of the others to be left."""


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
        scores = [torch.full((batch, n_best), NEVER, dtype=torch.float64, device=device) for _ in range(2)]
        numbers = [torch.zeros((batch, n_best), dtype=torch.int64, device=device) for _ in range(3)]
        return cls(*scores, *numbers)

    def of(self, utterances: Tensor) -> "Ended":
        """Return those of some of the utterances."""
        return Ended(*(part[utterances] for part in vars(self).values()))

    def put(self, utterances: Tensor, other: "Ended") -> None:
        """Take ``other`` for these utterances."""
        for name, part in vars(other).items():
            getattr(self, name)[utterances] = part

    def joined(self, other: "Ended") -> "Ended":
        """Return the best of both; of equals, the earlier ones."""
        rank = torch.cat([self.rank, other.rank], dim=1)
        order = rank.sort(dim=1, descending=True, stable=True).indices[:, : self.rank.shape[1]]
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("score", "step", "parent", "token"))
        return Ended(rank.gather(1, order), *(torch.cat(pair, dim=1).gather(1, order) for pair in pairs))


@dataclass(frozen=True)
class Taken:
    """What one step made of the utterances that were searched in it.

    Attributes:
        utterances: ``[searched]``, their places in the batch.
        parents: ``[searched, beam]``, the row that each child comes from.
        tokens: ``[searched, beam]``, what it says.
        weights: ``[searched, beam, frames]``, where each of the rows before looked.
    """

    utterances: Tensor
    parents: Tensor
    tokens: Tensor
    weights: Tensor


def attention_beam(steps: Steps, limits: Tensor, search: Search) -> list[list[Decoded]]:
    """Return up to ``search.n_best`` hypotheses of each utterance, best first, each token sequence once.

    A child goes on if it is among the ``beam`` best of its utterance's that do not end; one that ends counts if it is
    among the ``beam`` best of all. An utterance is done when nothing that goes on can come to stand among its
    ``n_best``, and with a beam of one when that has ended. Where ``attention_limit`` or ``end_threshold`` would leave
    an utterance with nothing, that step is taken without them.

    Args:
        steps: the decoder's, with ``batch * beam`` rows, an utterance's side by side.
        limits: ``[batch]`` int64, at least 1; the greatest number of steps of each utterance.
        search: the settings; its language model is one over tokens.
    """
    ended = Ended.none(len(limits), search.n_best, limits.device)
    beams = Beams(steps, limits, search)
    taken = []
    while len(beams.utterances):
        taken.append(beams.take_step())
        beams.leave_done(ended)
    return _traced(ended, taken)


class Beams:
    """The hypotheses that go on, ``[searched, beam]`` for the utterances that are still searched.

    Args:
        steps: the decoder's.
        limits: ``[batch]``, the greatest number of steps of each utterance.
        search: the settings.

    Attributes:
        utterances: ``[searched]``, places in the batch.
        ended: the best of each that have come to their end.
    """

    def __init__(self, steps: Steps, limits: Tensor, search: Search) -> None:
        batch, beam, device = len(limits), search.beam, limits.device
        self.search = search
        self.utterances = torch.arange(batch, device=device)
        self.ended = Ended.none(batch, search.n_best, device)
        self._steps, self._limits = steps, limits
        self._number = 0
        self._model = torch.full((batch, beam), NEVER, dtype=torch.float64, device=device)
        self._model[:, 0] = 0.0
        self._fusion = Fusion(search, batch * beam, device)
        self._peaks = torch.full((batch, beam), -1, device=device)
        self._follows_greedy = torch.ones(batch, dtype=torch.bool, device=device)
        self._active = torch.ones_like(self._follows_greedy)
        self._previous = torch.full((batch * beam,), int(SpecialToken.SOS), device=device)
        self._state: State | None = None
        self._places = torch.arange(2 * beam, device=device)
        self._first_rows = self._rows_of(self.utterances)[:, :1]

    def take_step(self) -> Taken:
        """Let every hypothesis say one more token, and keep the best."""
        beam, search = self.search.beam, self.search
        log_probs, attended, state = self._steps(self._previous, self._state)
        weights, vocabulary = attended.view(-1, beam, attended.shape[-1]), log_probs.shape[-1]
        log_probs = log_probs.double().view(-1, beam, vocabulary)
        scores = (self._model[..., None] + log_probs).flatten(1)
        totals = self._fusion.totals(scores, vocabulary)
        if search.is_limited:
            last_peaks, self._peaks = self._peaks, weights.argmax(dim=-1)
            allowed = totals.masked_fill(_refused(log_probs, last_peaks, self._peaks, search).flatten(1), NEVER)
            stuck = (allowed.amax(dim=1) == NEVER) & (self.ended.rank[:, 0] == NEVER)
            totals = torch.where(stuck[:, None], totals, allowed)

        children, self._follows_greedy = _best_children(totals, vocabulary, beam, self._follows_greedy)
        rank, score = totals.gather(1, children), scores.gather(1, children)
        parent, token = children // vocabulary, children % vocabulary
        ends = token == SpecialToken.EOS
        self._end(ends, rank, score, parent, token)

        # Those that do not end, in their order; the places behind them stay empty.
        places = self._places[: children.shape[1]]
        going = (places + len(places) * ends).topk(min(beam, len(places)), dim=1, largest=False).indices
        going = functional.pad(going, (0, beam - going.shape[1]))
        is_empty = ends.gather(1, going) | (rank.gather(1, going) == NEVER) | (self._places[:beam] >= len(places))
        parent, token = parent.gather(1, going), token.gather(1, going)
        self._model = score.gather(1, going).masked_fill(is_empty, NEVER)
        rows = (self._first_rows + parent).flatten()
        self._previous = token.flatten()
        self._state = tuple(tensor.index_select(0, rows) for tensor in state)
        self._peaks = self._peaks.gather(1, parent)
        self._fusion.follow(rows, self._previous)
        self._number += 1
        return Taken(self.utterances, parent, token, weights)

    def _end(self, ends: Tensor, rank: Tensor, score: Tensor, parent: Tensor, token: Tensor) -> None:
        """Keep those of the children that have come to their end, by the end of sentence or at the limit."""
        beam = self.search.beam
        at_limit = self._limits <= self._number + 1
        comes_to_end = ((ends | at_limit[:, None]) & self._active[:, None])[:, :beam]
        if bool(comes_to_end.any()):
            normalised = _normalised(rank[:, :beam], self._number + 1, self.search)
            own = (part[:, :beam] for part in (score, torch.full_like(parent, self._number), parent, token))
            self.ended = self.ended.joined(Ended(normalised.masked_fill(~comes_to_end, NEVER), *own))

    def leave_done(self, ended: Ended) -> None:
        """Search no more where nothing better can come; what was found there goes to ``ended``, of the whole batch."""
        best = (self._model + self._fusion.bonus.view_as(self._model)).amax(dim=1)
        reachable = _reachable(best, self._number, self._limits, self.search)
        self._active = self._active & (self._limits > self._number) & (reachable > self.ended.rank[:, -1])
        if self.search.beam == 1:
            self._active = self._active & self._follows_greedy
        count = int(self._active.sum())
        # To leave some costs a copy of the others' memory.
        if count > MOST_TO_GO_ON * len(self._active):
            return
        done, kept = (~self._active).nonzero()[:, 0], self._active.nonzero()[:, 0]
        ended.put(self.utterances[done], self.ended.of(done))
        rows = self._rows_of(kept).flatten()
        self._steps, self._fusion = self._steps.of(kept), self._fusion.of(rows)
        self._state = None if self._state is None else tuple(tensor[rows] for tensor in self._state)
        self._previous, self._first_rows = self._previous[rows], self._first_rows[:count]
        self.utterances, self.ended = self.utterances[kept], self.ended.of(kept)
        self._limits, self._model, self._peaks = self._limits[kept], self._model[kept], self._peaks[kept]
        self._follows_greedy, self._active = self._follows_greedy[kept], self._active[kept]

    def _rows_of(self, utterances: Tensor) -> Tensor:
        """Return ``[utterances, beam]``, the rows of some of those that are searched."""
        return utterances[:, None] * self.search.beam + torch.arange(self.search.beam, device=utterances.device)


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

    def of(self, rows: Tensor) -> "Fusion":
        """Return what is added to some of the rows."""
        narrowed = copy(self)
        narrowed.bonus = self.bonus[rows]
        narrowed._states = None if self._states is None else self._states[rows.to(self._states.device)]
        return narrowed

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


def _traced(ended: Ended, taken: Sequence[Taken]) -> list[list[Decoded]]:
    """Return the hypotheses, read backwards from where they ended."""
    row, spoken, attended = torch.zeros_like(ended.parent), [], []
    for number, step in reversed(list(enumerate(taken))):
        some = step.utterances
        at_end, before = ended.step[some] == number, ended.step[some] > number
        token, weights = torch.zeros_like(row), step.weights.new_zeros(*row.shape, step.weights.shape[-1])
        token[some] = torch.where(at_end, ended.token[some], step.tokens.gather(1, row[some]))
        parents = torch.where(before, step.parents.gather(1, row[some]), row[some])
        row[some] = torch.where(at_end, ended.parent[some], parents)
        weights[some] = step.weights.gather(1, row[some][..., None].expand(-1, -1, weights.shape[-1]))
        spoken.append(token)
        attended.append(weights)
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
