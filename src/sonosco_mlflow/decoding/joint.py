"""Decoding by two opinions: an attention decoder's of the next token, and CTC's of the whole prefix.

An attention decoder may skip or repeat what was said, which CTC's monotonic alignments cannot; CTC does not know what
was said before, which the decoder does (Watanabe et al. 2017, *Hybrid CTC/Attention Architecture for End-to-End Speech
Recognition*, section III). Both decide at every step here, so that greedy decoding and beam search need no change.
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sonosco_mlflow.decoding.greedy import State, Steps
from sonosco_mlflow.text import SpecialToken

NEVER = float("-inf")
LEAST = -1000.0
"""The lowest log-probability of a frame: zero for all purposes, and sums of it can still be subtracted."""


@dataclass(frozen=True)
class Prefixes:
    """What CTC says of one prefix a row, at each number of frames from 0 to all.

    Attributes:
        spoken: ``[rows, frames + 1]`` float64, log-probability of the prefix with its last token in the last frame.
        blank: the same with a blank in the last frame.
        last: ``[rows]``, the last token; the start of sentence where there is none.
    """

    spoken: Tensor
    blank: Tensor
    last: Tensor

    @property
    def either(self) -> Tensor:
        """``[rows, frames + 1]``, the log-probability of the prefix whatever the last frame says."""
        return torch.logaddexp(self.spoken, self.blank)


class PrefixScorer:
    """The probability that what was said begins with a prefix, summed over all alignments.

    Equations of Graves 2012, *Supervised Sequence Labelling with Recurrent Neural Networks*, section 7.5.3. Their
    recursions over frames are linear, and so each is one cumulative sum: of terms divided by the product of the
    probabilities up to their frame.

    Args:
        log_probs: ``[batch, frames, vocabulary]``, each frame's.
        lengths: ``[batch]``, frames of each utterance.
    """

    def __init__(self, log_probs: Tensor, lengths: Tensor) -> None:
        frames = log_probs.double().clamp_min(LEAST)
        # Frames of padding say blank for sure: they change the probability of no prefix.
        padding = torch.arange(frames.shape[1], device=frames.device) >= lengths[:, None]
        silence = torch.full_like(frames[0, 0], LEAST)
        silence[SpecialToken.BLANK] = 0.0
        frames = torch.where(padding[..., None], silence, frames)
        self._of_tokens = frames.mT.contiguous()
        self._products = functional.pad(self._of_tokens.cumsum(dim=-1), (1, 0))
        self._probabilities = frames.exp()

    def of(self, utterances: Tensor) -> "PrefixScorer":
        """Return the scorer of some of the utterances."""
        narrowed = copy(self)
        narrowed._of_tokens, narrowed._products = self._of_tokens[utterances], self._products[utterances]
        narrowed._probabilities = self._probabilities[utterances]
        return narrowed

    def start(self, rows: int) -> Prefixes:
        """Return the empty prefix of each row."""
        blank = self._products[self._utterances(rows), int(SpecialToken.BLANK)]
        last = torch.full((rows,), int(SpecialToken.SOS), device=blank.device)
        return Prefixes(torch.full_like(blank, NEVER), blank, last)

    def extended(self, prefixes: Prefixes, tokens: Tensor) -> tuple[Prefixes, Tensor]:
        """Return each row's prefix with one of ``tokens`` ``[rows]`` behind it, and ``[rows]``, its probability's log.

        The probability is that of everything that begins with it.
        """
        utterances = self._utterances(len(tokens))
        repeats = (tokens == prefixes.last)[:, None]
        # The same token again is one of its own only behind a blank.
        before = torch.where(repeats, prefixes.blank, prefixes.either)[:, :-1]
        products = self._products[utterances, tokens]
        begins = (before - products[:, :-1]).logcumsumexp(dim=1)
        spoken = functional.pad(products[:, 1:] + begins, (1, 0), value=NEVER)
        of_blank = self._products[utterances, int(SpecialToken.BLANK)]
        rests = (spoken[:, :-1] - of_blank[:, :-1]).logcumsumexp(dim=1)
        blank = functional.pad(of_blank[:, 1:] + rests, (1, 0), value=NEVER)
        total = (before + self._of_tokens[utterances, tokens]).logsumexp(dim=1)
        return Prefixes(spoken, blank, tokens), total

    def children(self, prefixes: Prefixes) -> Tensor:
        """Return ``[rows, vocabulary]``, the log-probability of each prefix with each token behind it.

        Behind the end of sentence comes nothing: its is that of the prefix as a whole. The other special tokens are no
        part of a sentence.
        """
        rows, batch, frames = len(prefixes.last), *self._probabilities.shape[:2]
        either = prefixes.either
        most = either.amax(dim=1, keepdim=True)
        shares = (either[:, :-1] - most).exp().view(batch, -1, frames)
        found = (shares @ self._probabilities).view(rows, -1)
        after_blank = (prefixes.blank[:, :-1] - most).exp()
        again = (after_blank * self._probabilities[self._utterances(rows), :, prefixes.last]).sum(dim=1)
        found = found.scatter(1, prefixes.last[:, None], again[:, None]).log() + most
        found[:, : len(SpecialToken)] = NEVER
        found[:, SpecialToken.EOS] = either[:, -1]
        return found

    def _utterances(self, rows: int) -> Tensor:
        """Return ``[rows]``, the utterance of each, of which each has the same number of neighbouring ones."""
        count = len(self._products)
        return torch.arange(count, device=self._products.device).repeat_interleave(rows // count)


@dataclass(frozen=True)
class JointSteps:
    """A decoder's steps, of which CTC decides a share; see :class:`~sonosco_mlflow.decoding.greedy.Steps`.

    A step's log-probabilities are ``(1 - weight)`` times the decoder's and ``weight`` times CTC's, which is of the
    prefix with the token given the prefix. So a whole sentence's is the weighted sum of what each says of it.

    Attributes:
        steps: the decoder's.
        scorer: CTC's opinion of the same utterances.
        weight: CTC's share, above 0 and at most 1.
    """

    steps: Steps
    scorer: PrefixScorer
    weight: float

    def __call__(self, previous: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        """Make one step of each row."""
        if state is None:
            prefixes, total = self.scorer.start(len(previous)), torch.zeros(1, device=previous.device)
            log_probs, attended, inner = self.steps(previous, None)
        else:
            prefixes, total = self.scorer.extended(Prefixes(*state[:3]), previous)
            log_probs, attended, inner = self.steps(previous, state[3:])
        # A prefix is never less likely than what begins with it; rounding may say otherwise.
        gains = (self.scorer.children(prefixes) - total[:, None]).clamp_max(0.0)
        joint = (1.0 - self.weight) * log_probs.double() + self.weight * gains
        # What begins with more tokens than there are frames is impossible, and so is all that follows.
        joint = joint.nan_to_num(nan=NEVER, neginf=NEVER)
        return joint, attended, (prefixes.spoken, prefixes.blank, prefixes.last, *inner)

    def of(self, utterances: Tensor) -> "JointSteps":
        """Return the steps for some of the utterances alone."""
        return JointSteps(self.steps.of(utterances), self.scorer.of(utterances), self.weight)
