import itertools
import math

import hypothesis.strategies as st
import jiwer
import numpy as np
import pytest
from hypothesis import given, settings

from sonosco_mlflow.metrics import (
    ErrorCounts,
    bootstrap_interval,
    character_error_rate,
    character_errors,
    word_error_rate,
    word_errors,
)

WORDS = st.lists(st.sampled_from(["ONE", "TWO", "THREE", "A", "I", "Ä"]), max_size=6).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)


def edit_distance(reference: list[str], hypothesis: list[str]) -> int:
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, found in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (expected != found))
    return row[-1]


@given(PAIRS.filter(lambda pairs: all(reference for reference, _ in pairs)))
@settings(max_examples=200, deadline=None)
def test_rates_of_a_whole_set_equal_jiwers(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = map(list, zip(*pairs, strict=True))
    assert word_error_rate(references, hypotheses) == jiwer.wer(references, hypotheses)
    assert character_error_rate(references, hypotheses) == jiwer.cer(references, hypotheses)


@given(PAIRS)
@settings(max_examples=200, deadline=None)
def test_errors_are_edit_distances_and_add_up(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = map(list, zip(*pairs, strict=True))
    for count, split in ((word_errors, str.split), (character_errors, list)):
        whole = count(references, hypotheses)
        assert whole.errors == sum(edit_distance(split(one), split(other)) for one, other in pairs)
        assert whole.reference_length == sum(len(split(reference)) for reference in references)
        assert sum((count([one], [other]) for one, other in pairs), ErrorCounts()) == whole


def test_a_rate_is_not_the_mean_of_rates() -> None:
    assert word_error_rate(["A B C D E F G H", "A"], ["A B C D E F G H", "B"]) == 1 / 9


def test_words_without_a_reference_are_insertions() -> None:
    assert word_errors(["", "A"], ["B C", "A"]) == ErrorCounts(insertions=2, reference_length=1)
    assert word_error_rate(["A"], ["A B C"]) == 2.0
    assert character_errors(["", "A"], [" B C ", "A"]) == ErrorCounts(insertions=3, reference_length=1)
    assert math.isnan(word_error_rate([""], ["B"]))
    assert math.isnan(word_error_rate([], []))


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths must match"):
        word_error_rate(["A", "B"], ["A"])


def test_a_bootstrap_interval_has_the_percentiles_of_all_resamples() -> None:
    """Of five utterances there are few enough resamples to try them all; unlike lengths must be weighed."""
    counts = [
        ErrorCounts(substitutions=n, reference_length=length) for n, length in [(0, 9), (1, 4), (3, 5), (2, 2), (0, 1)]
    ]
    rates = [
        sum(one.errors for one in drawn) / sum(one.reference_length for one in drawn)
        for drawn in itertools.product(counts, repeat=len(counts))
    ]
    for confidence in (0.95, 0.6):
        low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
        found = bootstrap_interval(counts, confidence=confidence)
        assert found == pytest.approx((low, high), abs=0.02)
        assert found == bootstrap_interval(counts, confidence=confidence), "the same counts give the same bounds"


def test_a_bootstrap_interval_of_nothing_spoken_is_no_number() -> None:
    assert all(map(math.isnan, bootstrap_interval([])))
    assert all(map(math.isnan, bootstrap_interval([ErrorCounts(insertions=2)])))
    counts = [ErrorCounts(insertions=2), ErrorCounts(reference_length=3, deletions=3)]
    low, high = bootstrap_interval(counts)
    assert 1.0 <= low < high
