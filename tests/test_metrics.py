import math

import hypothesis.strategies as st
import jiwer
import pytest
from hypothesis import given, settings

from sonosco_mlflow.metrics import (
    ErrorCounts,
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
    assert math.isnan(word_error_rate([""], ["B"]))
    assert math.isnan(word_error_rate([], []))


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        word_error_rate(["A", "B"], ["A"])
