"""Prefix beam search for CTC (Graves 2012, section 7.5.3; Hannun et al. 2014, arXiv 1408.2873, algorithm 1).

A prefix's probability is summed over its alignments, those that end in a blank apart from those that do not, because
only behind a blank does the same token again make another one. All prefixes of all utterances read a frame together, in
few operations: their number, not their size, is what a frame costs.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from sonosco_mlflow.decoding.greedy import Decoded, ctc_best_paths, ctc_log_likelihood
from sonosco_mlflow.decoding.search import Search, TokenScores
from sonosco_mlflow.text import SpecialToken

NEVER = float("-inf")
FIRST = len(SpecialToken)
EMPTY_KEY = 1
NO_KEY = 0
KEY_FACTOR = 6364136223846793005  # of Knuth's MMIX generator (The Art of Computer Programming, volume 2, 3.3.4)


def ctc_beam(log_probs: Tensor, lengths: Tensor, search: Search) -> list[list[Decoded]]:
    """Return up to ``search.n_best`` hypotheses of each utterance, best first, each token sequence once.

    The search follows sums over the alignments that it has seen; what it returns is scored, and ranked, by the sum
    over all of them. Without a language model the tokens on the best path compete too, so that a beam never finds
    worse than greedy decoding. A language model also scores the end of sentence. Where nothing is possible, no tokens
    are returned, of probability 0.

    Args:
        log_probs: ``[batch, frames, vocabulary]``. Of the special tokens only the blank is considered.
        lengths: ``[batch]``, frames of each utterance.
        search: the settings; its language model is one over tokens.
    """
    log_probs, lengths = log_probs.detach().cpu(), lengths.cpu()
    found = _search(log_probs, lengths, search)
    tokens, counts, bonus, is_found = found.tokens, found.counts, found.bonus, found.sums > NEVER
    if search.language_model is None:
        paths = ctc_best_paths(log_probs, lengths)
        own = torch.tensor([[len(path)] for path in paths])
        rows = torch.stack([functional.pad(path, (0, tokens.shape[2] - len(path))) for path in paths])[:, None]
        tokens, counts = torch.cat([tokens, rows], dim=1), torch.cat([counts, own], dim=1)
        bonus = torch.cat([bonus, search.length_reward * own.double()], dim=1)
        is_found = functional.pad(is_found, (0, 1), value=True)
    scores = _likelihoods(log_probs, lengths, tokens, counts).double()
    totals = scores + bonus
    decoded = []
    for row in zip(*(part.tolist() for part in (tokens, counts, scores, totals, is_found)), strict=True):
        hypotheses = {
            tuple(said[:count]): Decoded(said[:count], score, torch.empty(0), total)
            for said, count, score, total, is_one in zip(*row, strict=True)
            if is_one
        }
        # By their tokens where they are worth the same: which place of the beam they have depends on the padding.
        ranked = sorted(hypotheses.values(), key=lambda one: (-one.total, one.tokens))
        decoded.append(ranked[: search.n_best] or [Decoded([], NEVER, torch.empty(0), NEVER)])
    return decoded


@dataclass(frozen=True)
class _Prefixes:
    """The prefixes of a beam, ``[batch, beam]`` each; tokens count from the first that is not special.

    A prefix is known by a key that its tokens make, ``key * KEY_FACTOR + token + 1`` behind one more of them. Two of a
    beam share one by chance with a probability of about 2 ** -64.

    Attributes:
        blank: log-probability of the alignments that end in a blank.
        token: log-probability of those that end in the last token.
        bonus: what language model and length reward add.
        last: last token; the number of tokens there are, of the empty prefix.
        key: of all tokens.
        parent: of all but the last; ``NO_KEY`` of the empty prefix, and of a place where there is no prefix.
    """

    blank: Tensor
    token: Tensor
    bonus: Tensor
    last: Tensor
    key: Tensor
    parent: Tensor


@dataclass(frozen=True)
class _Found:
    """What a search ends with.

    Attributes:
        tokens: ``[batch, beam, length]``.
        counts: ``[batch, beam]``, how many of them are valid.
        sums: log-probability of the alignments that were seen; -inf where there is no prefix.
        bonus: what language model and length reward add.
    """

    tokens: Tensor
    counts: Tensor
    sums: Tensor
    bonus: Tensor


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

    def gains(self, states: Tensor, kinds: int) -> Tensor:
        """Return ``[n, kinds + 1]``, what each next token adds behind ``states`` ``[n]``, and then nothing for none."""
        if self.language_model is None or not self.weight:
            gains = torch.full((len(states), kinds), self.reward, dtype=torch.float64)
        else:
            gains = self.reward + self.weight * self.language_model.log_probs(states).cpu()[:, FIRST:]
        return functional.pad(gains, (0, 1))

    def followed(self, states: Tensor, gains: Tensor, place: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        """Return states and gains of prefixes at ``place`` ``[batch, beam]``, behind ``said`` where it is a token."""
        if self.language_model is None:
            return states, gains
        kinds = gains.shape[-1] - 1
        states, gains = states.gather(1, place), gains.gather(1, place[..., None].expand_as(gains))
        is_longer = said < kinds
        states[is_longer] = self.language_model.advance(states[is_longer], said[is_longer] + FIRST).cpu()
        gains[is_longer] = self.gains(states[is_longer], kinds)
        return states, gains

    def ends(self, states: Tensor) -> Tensor:
        """Return ``[batch, beam]``, what the end of sentence adds."""
        if self.language_model is None or not self.weight:
            return torch.zeros(states.shape, dtype=torch.float64)
        scores = self.language_model.log_probs(states.flatten()).cpu()[:, SpecialToken.EOS]
        return self.weight * scores.view(states.shape)


def _search(log_probs: Tensor, lengths: Tensor, search: Search) -> _Found:
    batch, frames, vocabulary = log_probs.shape
    kinds, beam = vocabulary - FIRST, search.beam
    fusion = _Fusion(search)
    # Behind its last frame an utterance has blanks for certain: they change nothing.
    padding = torch.arange(frames)[:, None] >= lengths
    by_frame = log_probs.transpose(0, 1).double()
    blanks = by_frame[..., SpecialToken.BLANK].masked_fill(padding, 0.0)[..., None]
    # One more than there are tokens: none is never said, and has the place of the prefix that stays as it is.
    emissions = functional.pad(by_frame[..., FIRST:].masked_fill(padding[..., None], NEVER), (0, 1), value=NEVER)
    nothing = torch.full((batch, beam), NEVER, dtype=torch.float64)
    whole = torch.zeros(batch, beam, dtype=torch.int64)
    prefixes = _Prefixes(
        blank=nothing.masked_fill(torch.arange(beam) == 0, 0.0),
        token=nothing,
        bonus=torch.zeros_like(nothing),
        last=whole + kinds,
        key=whole + EMPTY_KEY,
        parent=whole + NO_KEY,
    )
    states = fusion.start(batch, beam)
    gains = fusion.gains(states.flatten(), kinds).view(batch, beam, kinds + 1)
    places, tokens = [], []
    for blank, emission in zip(blanks.unbind(), emissions.unbind(), strict=True):
        prefixes, place, said = _read(prefixes, gains, blank, emission)
        states, gains = fusion.followed(states, gains, place, said)
        places.append(place)
        tokens.append(said)
    said, counts = _told(places, tokens, kinds)
    sums = prefixes.blank.logaddexp(prefixes.token)
    return _Found(said + FIRST, counts, sums, prefixes.bonus + fusion.ends(states))


def _read(prefixes: _Prefixes, gains: Tensor, blank: Tensor, emission: Tensor) -> tuple[_Prefixes, Tensor, Tensor]:
    """Return the best prefixes after one more frame.

    Args:
        prefixes: those of before.
        gains: ``[batch, beam, tokens + 1]``, what a token, or none, adds to a prefix's bonus.
        blank: ``[batch, 1]``, log-probability of the blank.
        emission: ``[batch, tokens + 1]``, log-probabilities of the tokens; none is never said.

    Returns:
        The prefixes, the places ``[batch, beam]`` that they come from, and the new token of each, or the number of
        tokens where it has none.
    """
    beam, none = gains.shape[1], gains.shape[2] - 1
    last = prefixes.last
    total = prefixes.blank.logaddexp(prefixes.token)
    repeated = emission.gather(1, last)
    longer = total[..., None] + emission[:, None]
    longer.scatter_(2, last[..., None], (prefixes.blank + repeated)[..., None])
    # A prefix may also come about as its beginning with its last token: then that is no prefix of its own.
    joining = torch.where(prefixes.key[:, :, None] == prefixes.parent[:, None], last[:, None], none)
    same_blank = total + blank
    same_token = (prefixes.token + repeated).logaddexp(longer.gather(2, joining).amax(dim=1))
    longer.scatter_(2, joining, NEVER)
    longer[..., none] = same_blank.logaddexp(same_token)

    bonus = prefixes.bonus[..., None] + gains
    best = (longer + bonus).flatten(1).topk(beam, dim=1)
    place, said = best.indices // (none + 1), best.indices % (none + 1)
    is_same = said == none
    old = prefixes.key.gather(1, place)
    parent = torch.where(is_same, prefixes.parent.gather(1, place), old)
    following = _Prefixes(
        blank=torch.where(is_same, same_blank.gather(1, place), NEVER),
        token=torch.where(is_same, same_token.gather(1, place), longer.flatten(1).gather(1, best.indices)),
        bonus=bonus.flatten(1).gather(1, best.indices),
        last=torch.where(is_same, last.gather(1, place), said),
        key=torch.where(is_same, old, old * KEY_FACTOR + said + 1),
        parent=torch.where(best.values > NEVER, parent, NO_KEY),
    )
    return following, place, said


def _told(places: list[Tensor], tokens: list[Tensor], none: int) -> tuple[Tensor, Tensor]:
    """Return what the prefixes of the last frame say, ``[batch, beam, length]``, and how many tokens each has.

    Args:
        places: of each frame, where in the frame before each prefix comes from.
        tokens: of each frame, each prefix's new token, or ``none``.
        none: the number of tokens.
    """
    place = torch.arange(places[0].shape[1]).expand_as(places[0])
    backwards = []
    for origin, said in zip(reversed(places), reversed(tokens), strict=True):
        backwards.append(said.gather(1, place))
        place = origin.gather(1, place)
    said = torch.stack(backwards[::-1], dim=2)
    is_token = said < none
    order = is_token.to(torch.uint8).argsort(dim=2, descending=True, stable=True)
    counts = is_token.sum(dim=2)
    # Behind the end of a prefix nobody reads.
    return said.gather(2, order).clamp_max(none - 1), counts


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
