"""Decoding the slow way: every sequence there is, one at a time, in Python's floats."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sonosco_mlflow.decoding.greedy import State, without_special
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.text import SpecialToken

SOS, EOS, BLANK = int(SpecialToken.SOS), int(SpecialToken.EOS), int(SpecialToken.BLANK)
FIRST = len(SpecialToken)
NEVER = float("-inf")

Scores = Callable[[Sequence[int]], list[float]]
"""From what was said to the log-probability of each next token."""


class Rules(nn.Module):
    """A language model given by what it says behind the last token: ``[vocabulary, vocabulary]`` log-probabilities."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table.double()

    def start(self, count: int) -> Tensor:
        return torch.full((count,), SOS)

    def log_probs(self, states: Tensor) -> Tensor:
        return self.table[states]

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return tokens

    def plainly(self, said: Sequence[int]) -> list[float]:
        return [float(value) for value in self.table[said[-1] if said else SOS]]


def random_rules(vocabulary: int, generator: torch.Generator) -> Rules:
    logits = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, [SpecialToken.PAD, SpecialToken.BLANK, SpecialToken.SOS]] = NEVER
    return Rules(logits.log_softmax(dim=-1))


class Speaker:
    """A decoder without a model: what it says next depends on all that was said.

    Args:
        logits: ``[batch, situations, vocabulary]``.
        peaks: ``[batch, situations]``, the frame that it looks at then.
        frames: number of frames.
    """

    def __init__(self, logits: Tensor, peaks: Tensor, frames: int) -> None:
        self.logits, self.peaks, self.frames = logits, peaks, frames
        self.calls = self.rows = 0

    @classmethod
    def random(
        cls, generator: torch.Generator, batch: int, letters: int, *, frames: int = 4, sharpness: float = 2.0
    ) -> "Speaker":
        logits = sharpness * torch.randn(batch, 97, FIRST + letters, generator=generator)
        logits[..., [SpecialToken.PAD, SpecialToken.BLANK, SpecialToken.SOS, SpecialToken.UNKNOWN]] = NEVER
        return cls(logits, torch.randint(frames, (batch, 97), generator=generator), frames)

    def only(self, utterance: int) -> "Speaker":
        rows = slice(utterance, utterance + 1)
        return Speaker(self.logits[rows], self.peaks[rows], self.frames)

    def steps(self, beam: int) -> "SpeakerSteps":
        """Return its steps for ``beam`` rows an utterance."""
        return SpeakerSteps(self, beam, torch.arange(len(self.logits)))

    def plainly(self, utterance: int, said: Sequence[int]) -> tuple[list[float], int]:
        """Return the log-probabilities of the next token, and where it looks for it."""
        situation = 0
        for token in said:
            situation = (31 * situation + token) % 97
        log_probs = self.logits[utterance, situation].log_softmax(dim=-1)
        return [float(value) for value in log_probs], int(self.peaks[utterance, situation])


class JointSpeaker(Speaker):
    """A speaker of whose score CTC decides a share, by the probability of everything that begins with what was said.

    Args:
        speaker: who decides the rest.
        frames: ``[batch, frames, vocabulary]``, CTC's log-probabilities.
        lengths: frames of each utterance.
        weight: CTC's share.
    """

    def __init__(self, speaker: Speaker, frames: Tensor, lengths: Sequence[int], weight: float) -> None:
        super().__init__(speaker.logits, speaker.peaks, speaker.frames)
        self.weight = weight
        self.sums = [ctc_sums(rows[:length]) for rows, length in zip(frames, lengths, strict=True)]

    def plainly(self, utterance: int, said: Sequence[int]) -> tuple[list[float], int]:
        log_probs, peak = super().plainly(utterance, said)
        before = self.begins(utterance, said)
        joint = []
        for token, log_prob in enumerate(log_probs):
            ends = token == EOS
            whole = self.sums[utterance].get(tuple(said), 0.0) if ends else self.begins(utterance, [*said, token])
            is_possible = whole > 0.0 and (ends or token >= FIRST)
            gain = math.log(whole / before) if is_possible else NEVER
            joint.append((1.0 - self.weight) * log_prob + self.weight * gain)
        return joint, peak

    def begins(self, utterance: int, said: Sequence[int]) -> float:
        """Return the probability of all label sequences that begin with what was said."""
        return sum(share for labels, share in self.sums[utterance].items() if labels[: len(said)] == tuple(said))


@dataclass(frozen=True)
class SpeakerSteps:
    """Steps of some of a speaker's utterances."""

    speaker: Speaker
    beam: int
    utterances: Tensor

    def __call__(self, previous: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        speaker, utterances = self.speaker, self.utterances.repeat_interleave(self.beam)
        speaker.calls += 1
        speaker.rows += len(previous)
        situation = torch.zeros_like(previous) if state is None else (31 * state[0] + previous) % 97
        weights = nn.functional.one_hot(speaker.peaks[utterances, situation], speaker.frames).float()
        return speaker.logits[utterances, situation].log_softmax(dim=-1), weights, (situation,)

    def of(self, utterances: Tensor) -> "SpeakerSteps":
        return replace(self, utterances=self.utterances[utterances])


def all_sentences(
    speaker: Speaker, utterance: int, limit: int, search: Search
) -> Iterator[tuple[float, float, list[int]]]:
    """Yield rank, score and tokens of each sentence of at most ``limit`` steps that the search's limits allow."""

    def follow(
        said: list[int], score: float, bonus: float, last_peak: int | None
    ) -> Iterator[tuple[float, float, list[int]]]:
        log_probs, peak = speaker.plainly(utterance, said)
        far = (
            search.attention_limit is not None
            and last_peak is not None
            and abs(peak - last_peak) > search.attention_limit
        )
        if far:
            return
        says = None if search.language_model is None else search.language_model.plainly(said)
        for token, log_prob in enumerate(log_probs):
            if log_prob == NEVER:
                continue
            if token == EOS and search.end_threshold is not None:
                others = max(value for other, value in enumerate(log_probs) if other != EOS)
                if log_prob <= search.end_threshold * others:
                    continue
            gain = 0.0 if token == EOS else search.length_reward
            if says is not None:
                gain += search.language_model_weight * says[token]
            now, more = score + log_prob, bonus + gain
            if token == EOS or len(said) + 1 == limit:
                yield (now + more) / (len(said) + 1) ** search.length_normalisation, now, [*said, token]
            else:
                yield from follow([*said, token], now, more, peak)

    yield from follow([], 0.0, 0.0, None)


def ranked_sentences(
    speaker: Speaker, utterance: int, limit: int, search: Search
) -> list[tuple[float, float, list[int]]]:
    """Return all sentences, best first."""
    found = sorted(all_sentences(speaker, utterance, limit, search), key=lambda one: -one[0])
    return [(rank, score, without_special(tokens)) for rank, score, tokens in found]


def ctc_sums(log_probs: Tensor) -> dict[tuple[int, ...], float]:
    """Return the probability of each label sequence of ``[frames, vocabulary]``, summed path by path."""
    kinds = [BLANK, *range(FIRST, log_probs.shape[1])]
    sums: dict[tuple[int, ...], float] = {}
    for path in itertools.product(kinds, repeat=len(log_probs)):
        said = tuple(token for token, _ in itertools.groupby(path) if token != BLANK)
        probability = math.exp(sum(float(log_probs[frame, token]) for frame, token in enumerate(path)))
        sums[said] = sums.get(said, 0.0) + probability
    return sums


def ranked_labels(log_probs: Tensor, search: Search) -> list[tuple[float, float, list[int]]]:
    """Return total, score and tokens of each label sequence, best first."""
    found = []
    for said, probability in ctc_sums(log_probs).items():
        score = math.log(probability)
        total = score + search.length_reward * len(said)
        if search.language_model is not None:
            for place in range(len(said) + 1):
                token = said[place] if place < len(said) else EOS
                total += search.language_model_weight * search.language_model.plainly(said[:place])[token]
        found.append((total, score, list(said)))
    return sorted(found, key=lambda one: -one[0])
