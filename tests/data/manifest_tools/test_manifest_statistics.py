import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonosco_mlflow.data.manifest_tools.statistics import histogram, statistics_of
from sonosco_mlflow.data.utterances import Utterance


def test_what_there_is_is_counted() -> None:
    made = [
        Utterance("a", "a.wav", 60.0, "one two", "x"),
        Utterance("b", "b.wav", 120.0, " three ", "y"),
        Utterance("c", "c.wav", 1.0, "", "unknown"),
        Utterance("d", "d.wav", 59.0, "four", "x"),
    ]
    found = statistics_of(iter(made))
    assert (found.utterances, found.words, found.characters, found.speakers, found.unknown) == (4, 4, 18, 2, 1)
    assert found.hours == pytest.approx(240 / 3600)
    assert sum(found.durations.counts) == sum(found.rates.counts) == 4
    assert sum(found.minutes.counts) == 2
    text = str(found)
    assert "speakers    2 (and 1 utterances of unknown ones)" in text
    assert "utterances by seconds" in text


def test_nothing_is_counted_as_nothing() -> None:
    found = statistics_of([])
    assert (found.utterances, found.hours, found.durations.counts) == (0, 0.0, ())
    assert "utterances  0" in str(found)


@given(st.lists(st.floats(0, 1e12) | st.floats(0, 10) | st.just(3.0), min_size=1, max_size=80))
def test_each_value_is_counted_once_between_its_edges(values: list[float]) -> None:
    found = histogram("values", np.array(values))
    assert sum(found.counts) == len(values)
    assert len(found.counts) == len(found.edges) <= 20
    assert list(found.edges) == sorted(set(found.edges))
    steps = np.diff(found.edges)
    assert steps == pytest.approx(steps[0], rel=1e-6)
    assert f"{float(f'{steps[0]:.6g}'):e}"[0] in "125"
    # To the rounding of an edge.
    slack = 1e-9 * max(values)
    for edge, below in zip(found.edges, np.cumsum([0, *found.counts[:-1]]), strict=True):
        assert sum(value < edge - slack for value in values) <= below <= sum(value < edge + slack for value in values)


def test_edges_are_round_and_the_few_far_above_are_counted_together() -> None:
    found = histogram("seconds", np.array([*np.linspace(1, 15.9, 1000), 400.0]))
    assert found.edges[:3] == (1.0, 2.0, 3.0)
    assert found.counts[-1] == 1
    lines = str(found).splitlines()
    assert lines[0] == "seconds"
    assert lines[1].split()[:3] == ["1", "to", "2"]
    assert lines[-1].split()[0] == "above"
    assert max(line.count("█") for line in lines) == 40


def test_a_few_are_seen_beside_many() -> None:
    found = histogram("seconds", np.array([1.5] * 10_000 + [15.0] * 60))
    assert [line.count("█") for line in str(found).splitlines() if "█" in line] == [40, 1]


def test_a_single_value_has_a_bin() -> None:
    for value in (3.0, 0.0, 1e-7):
        found = histogram("values", np.array([value]))
        assert sum(found.counts) == 1
        assert not found.counts[-1]
        assert all(map(math.isfinite, found.edges))
