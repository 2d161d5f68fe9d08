"""Prefix beam search for CTC (Graves 2012, section 7.5.3; Hannun et al. 2014, arXiv 1408.2873, algorithm 1).

A prefix's probability is summed over its alignments, those that end in a blank apart from those that do not, because
only behind a blank does the same token again make another one. All prefixes of all utterances read a frame together.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from sonosco_mlflow.decoding.greedy import Decoded, ctc_greedy, ctc_log_likelihood
from sonosco_mlflow.decoding.search import Search, TokenScores
from sonosco_mlflow.text import SpecialToken

NEVER = float("-inf")
FIRST = len(SpecialToken)


def ctc_beam(log_probs: Tensor, lengths: Tensor, search: Search) -> list[list[Decoded]]:
    """Return up to ``search.n_best`` hypotheses of each utterance, best first, each token sequence once.

    The search follows sums over the alignments that it has seen; what it returns is scored, and ranked, by the sum
    over all of them. Without a language model the tokens on the best path compete too, so that a beam never finds
    worse than greedy decoding. A language model also scores the end of sentence.

    Args:
        log_probs: ``[batch, frames, vocabulary]``. Of the special tokens only the blank is considered.
        lengths: ``[batch]``, frames of each utterance.
        search: the settings; its language model is one over tokens.
    """
    log_probs, lengths = log_probs.detach().cpu(), lengths.cpu()
    found = _Fusion(search).end(_search(log_probs, lengths, search))
    tokens, counts, bonus = found.tokens + FIRST, found.counts, found.bonus
    is_found = found.blank.logaddexp(found.token) > NEVER
    if search.language_model is None:
        greedy = [one.tokens for one in ctc_greedy(log_probs, lengths)]
        rows = torch.zeros(len(greedy), 1, tokens.shape[2], dtype=torch.int64)
        for row, said in zip(rows, greedy, strict=True):
            row[0, : len(said)] = torch.tensor(said, dtype=torch.int64)
        own = torch.tensor([[len(said)] for said in greedy])
        tokens, counts = torch.cat([tokens, rows], dim=1), torch.cat([counts, own], dim=1)
        bonus = torch.cat([bonus, search.length_reward * own.double()], dim=1)
        is_found = functional.pad(is_found, (0, 1), value=True)
    scores = _likelihoods(log_probs, lengths, tokens, counts).double()
    totals = (scores + bonus).masked_fill(~is_found, NEVER)
    order = totals.sort(dim=1, descending=True, stable=True).indices
    decoded = []
    for row, places in enumerate(order.tolist()):
        hypotheses: dict[tuple[int, ...], Decoded] = {}
        for place in places:
            said = tokens[row, place, : counts[row, place]].tolist()
            if is_found[row, place] and tuple(said) not in hypotheses:
                score, total = scores[row, place].item(), totals[row, place].item()
                hypotheses[tuple(said)] = Decoded(said, score, torch.empty(0), total)
        decoded.append(list(hypotheses.values())[: search.n_best])
    return decoded


@dataclass(frozen=True)
class _Prefixes:
    """The prefixes of a beam, ``[batch, beam]`` each; tokens count from the first that is not special.

    Attributes:
        blank: log-probability of the alignments that end in a blank.
        token: log-probability of those that end in the last token.
        bonus: what language model and length reward add.
        last: last token; -1 of the empty prefix.
        counts: number of tokens.
        tokens: ``[batch, beam, frames]``, valid up to ``counts``.
        begins: ``[batch, beam, beam]``, whether the first prefix is the second's beginning, or all of it.
        states: of the language model.
    """

    blank: Tensor
    token: Tensor
    bonus: Tensor
    last: Tensor
    counts: Tensor
    tokens: Tensor
    begins: Tensor
    states: Tensor


class _Fusion:
    """What language model and length reward add to a prefix."""

    def __init__(self, search: Search) -> None:
        self.weight, self.reward = search.language_model_weight, search.length_reward
        self.language_model = cast(TokenScores | None, search.language_model)

    def start(self, batch: int, beam: int) -> Tensor:
        """Return the states ``[batch, beam]`` of empty prefixes."""
        if self.language_model is None:
            return torch.zeros(batch, beam, dtype=torch.int64)
        return self.language_model.start(batch * beam).cpu().view(batch, beam)

    def gains(self, states: Tensor, tokens: int) -> Tensor:
        """Return ``[n, tokens]``, what each next token adds behind ``states`` ``[n]``."""
        if self.language_model is None or not self.weight:
            return torch.full((len(states), tokens), self.reward, dtype=torch.float64)
        return self.reward + self.weight * self.language_model.log_probs(states).cpu()[:, FIRST:]

    def advanced(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states ``[n]`` behind one more token."""
        if self.language_model is None:
            return states
        return self.language_model.advance(states, tokens + FIRST).cpu()

    def end(self, prefixes: _Prefixes) -> _Prefixes:
        """Return the prefixes as whole sentences."""
        if self.language_model is None or not self.weight:
            return prefixes
        ends = self.language_model.log_probs(prefixes.states.flatten()).cpu()[:, SpecialToken.EOS]
        return _replaced(prefixes, bonus=prefixes.bonus + self.weight * ends.view_as(prefixes.bonus))


def _replaced(prefixes: _Prefixes, **changes: Tensor) -> _Prefixes:
    return _Prefixes(**{**vars(prefixes), **changes})


def _search(log_probs: Tensor, lengths: Tensor, search: Search) -> _Prefixes:
    batch, frames, vocabulary = log_probs.shape
    kinds, beam = vocabulary - FIRST, search.beam
    fusion = _Fusion(search)
    # Behind its last frame an utterance has blanks for certain: they change nothing.
    valid = torch.arange(frames) < lengths[:, None]
    blanks = log_probs[..., SpecialToken.BLANK].double().masked_fill(~valid, 0.0)
    emissions = log_probs[..., FIRST:].double().masked_fill(~valid[..., None], NEVER)
    alone = torch.arange(beam) == 0
    nothing = torch.full((batch, beam), NEVER, dtype=torch.float64)
    prefixes = _Prefixes(
        blank=nothing.masked_fill(alone, 0.0),
        token=nothing,
        bonus=torch.zeros_like(nothing),
        last=torch.full((batch, beam), -1),
        counts=torch.zeros(batch, beam, dtype=torch.int64),
        tokens=torch.zeros(batch, beam, frames, dtype=torch.int64),
        begins=(alone[:, None] & alone).expand(batch, beam, beam),
        states=fusion.start(batch, beam),
    )
    gains = fusion.gains(prefixes.states.flatten(), kinds).view(batch, beam, kinds)
    for frame in range(frames):
        prefixes, parent, is_longer = _read(prefixes, gains, blanks[:, frame, None], emissions[:, frame])
        gains = gains.gather(1, parent[..., None].expand_as(gains))
        states = prefixes.states.gather(1, parent)
        if search.language_model is not None:
            states[is_longer] = fusion.advanced(states[is_longer], prefixes.last[is_longer])
            gains[is_longer] = fusion.gains(states[is_longer], kinds)
        prefixes = _replaced(prefixes, states=states)
    return prefixes


def _read(prefixes: _Prefixes, gains: Tensor, blank: Tensor, emission: Tensor) -> tuple[_Prefixes, Tensor, Tensor]:
    """Return the best prefixes after one more frame; the states are still those of before.

    Args:
        prefixes: those of before.
        gains: ``[batch, beam, tokens]``, what a token adds to a prefix's bonus.
        blank: ``[batch, 1]``, log-probability of the blank.
        emission: ``[batch, tokens]``, log-probabilities of the tokens.

    Returns:
        The prefixes, the places ``[batch, beam]`` that they come from, and whether each has a new token.
    """
    batch, beam, kinds = gains.shape
    last = prefixes.last.clamp_min(0)
    total = prefixes.blank.logaddexp(prefixes.token)
    repeated = emission.gather(1, last)
    longer = total[..., None] + emission[:, None, :]
    again = torch.where(prefixes.last >= 0, prefixes.blank + repeated, longer.gather(2, last[..., None])[..., 0])
    longer = longer.scatter(2, last[..., None], again[..., None])
    same_blank, same_token = total + blank, prefixes.token + repeated

    # A prefix may also come about as its beginning with its last token: then that is no prefix of its own.
    is_parent = prefixes.begins & (prefixes.counts[:, :, None] + 1 == prefixes.counts[:, None, :])
    has_parent, parent = is_parent.max(dim=1)
    source = parent * kinds + last
    longer = longer.flatten(1)
    joining = longer.gather(1, source).masked_fill(~has_parent, NEVER)
    same_token = same_token.logaddexp(joining)
    gone = torch.zeros_like(longer).scatter_add(1, source, has_parent.to(longer)) > 0
    longer = longer.masked_fill(gone, NEVER)

    ranks = torch.cat(
        [
            (same_blank.logaddexp(same_token) + prefixes.bonus)[..., None],
            longer.view(batch, beam, kinds) + prefixes.bonus[..., None] + gains,
        ],
        dim=2,
    ).flatten(1)
    best = ranks.topk(beam, dim=1)
    place, token = best.indices // (kinds + 1), best.indices % (kinds + 1) - 1
    is_longer, said = token >= 0, token.clamp_min(0)
    chosen = place * kinds + said
    counts = prefixes.counts.gather(1, place)
    texts = prefixes.tokens.gather(1, place[..., None].expand_as(prefixes.tokens))
    begins = _begins(prefixes, place, is_longer, said, texts) & (best.values > NEVER)[:, :, None]
    following = _Prefixes(
        blank=same_blank.gather(1, place).masked_fill(is_longer, NEVER),
        token=torch.where(is_longer, longer.gather(1, chosen), same_token.gather(1, place)),
        bonus=prefixes.bonus.gather(1, place) + gains.flatten(1).gather(1, chosen).masked_fill(~is_longer, 0.0),
        last=torch.where(is_longer, said, prefixes.last.gather(1, place)),
        counts=counts + is_longer,
        # Behind the end of a prefix that stays the same, nobody reads.
        tokens=texts.scatter(2, counts[..., None], said[..., None]),
        begins=begins & (best.values > NEVER)[:, None, :],
        states=prefixes.states,
    )
    return following, place, is_longer


def _begins(prefixes: _Prefixes, place: Tensor, is_longer: Tensor, said: Tensor, texts: Tensor) -> Tensor:
    """Return which of the new prefixes begin which others, from what is known of those that they come from.

    One that stays the same begins what its own begins, and what is made longer from that. One with a new token begins
    itself, and what its old one begins and goes on with that token.
    """
    beam = place.shape[1]
    before = prefixes.begins.gather(1, place[..., None].expand_as(prefixes.begins))
    before = before.gather(2, place[:, None, :].expand_as(before))
    counts = prefixes.counts.gather(1, place)
    next_token = texts.gather(2, counts[:, None, :].expand_as(before)).transpose(1, 2)
    goes_on = (counts[:, :, None] < counts[:, None, :]) & (next_token == said[:, :, None])
    itself = torch.eye(beam, dtype=torch.bool)
    return torch.where(is_longer[..., None], (before & goes_on) | itself, before)


def _likelihoods(log_probs: Tensor, lengths: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """Return ``[batch, hypotheses]``, log-likelihoods of ``tokens`` ``[batch, hypotheses, length]``."""
    hypotheses = tokens.shape[1]
    longest = max(int(counts.max()), 1)
    unused = torch.arange(longest) >= counts[..., None]
    # Of a large vocabulary few tokens occur, and each hypothesis needs an utterance's frames once more.
    occurring, tokens = torch.unique(
        tokens[..., :longest].masked_fill(unused, int(SpecialToken.BLANK)), return_inverse=True
    )
    columns = torch.cat([torch.arange(SpecialToken.BLANK + 1), occurring])
    return ctc_log_likelihood(
        log_probs[..., columns].repeat_interleave(hypotheses, dim=0),
        lengths.repeat_interleave(hypotheses),
        tokens.flatten(0, 1) + SpecialToken.BLANK + 1,
        counts.flatten(),
    ).view_as(counts)
