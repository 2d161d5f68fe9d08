"""Error rates as counts that can be summed, and as functions of a whole set.

A metric is any callable ``metric(references, hypotheses) -> float`` over all utterances of a set. The rates here sum
errors and reference lengths over the set before dividing: the mean of the utterances' rates would weigh a word in
a short utterance more than one in a long one.

>>> word_error_rate(["ZERO ONE", "TWO"], ["ZERO", "TWO"])
0.3333333333333333
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from sonosco_mlflow.determinism import random_stream
from sonosco_mlflow.serialization.parameters import serializable

if TYPE_CHECKING:
    from jiwer import CharacterOutput, WordOutput

Metric = Callable[[Sequence[str], Sequence[str]], float]


@dataclass(frozen=True)
class ErrorCounts:
    """Edit operations against a reference, and the reference's length, in words or characters.

    Counts of disjoint sets add up to the counts of their union, on one machine or many.
    """

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0

    @property
    def errors(self) -> int:
        """Number of edit operations."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference word or character, a fraction; may exceed 1. NaN for an empty reference."""
        return self.errors / self.reference_length if self.reference_length else float("nan")

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_length + other.reference_length,
        )


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Count word errors of aligned lists, as jiwer does; an empty reference counts its hypothesis as insertions."""
    # Imported here: whoever reads a recipe or a manifest should not pay for it.
    import jiwer

    return _counts(jiwer.process_words(list(references), list(hypotheses)))


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Count character errors of aligned lists, spaces between words included, as jiwer does."""
    import jiwer

    return _counts(jiwer.process_characters(list(references), list(hypotheses)))


def _counts(found: "WordOutput | CharacterOutput") -> ErrorCounts:
    reference_length = found.hits + found.substitutions + found.deletions
    return ErrorCounts(found.substitutions, found.deletions, found.insertions, reference_length)


@serializable
def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Return summed word errors over summed reference words, a fraction (0.08 is 8 %)."""
    return word_errors(references, hypotheses).rate


@serializable
def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Return summed character errors over summed reference characters, a fraction."""
    return character_errors(references, hypotheses).rate


def bootstrap_interval(
    counts: Sequence[ErrorCounts], *, confidence: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Return the bounds between which the rate of a set lies with ``confidence``, were other utterances drawn.

    Percentiles of the rates of ``resamples`` sets of as many utterances, drawn from these with replacement (Bisani and
    Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation", section 2). Errors of one
    utterance stay together, since they depend on each other. The same counts give the same bounds.

    Args:
        counts: the utterances'.
        confidence: share of the resampled rates that lies between the bounds, in (0, 1).
        resamples: number of sets.

    Returns:
        The lower and the upper bound, fractions; NaN where the references are empty.
    """
    errors = np.array([one.errors for one in counts], dtype=np.int64)
    lengths = np.array([one.reference_length for one in counts], dtype=np.int64)
    if not lengths.sum():
        return float("nan"), float("nan")
    stream = random_stream("bootstrap", resamples)
    rates = []
    for _ in range(resamples):
        drawn = (stream.random(len(counts)) * len(counts)).astype(np.int64)
        length = int(lengths[drawn].sum())
        # Of a set without a single reference word there is no rate.
        rates += [int(errors[drawn].sum()) / length] if length else []
    low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
