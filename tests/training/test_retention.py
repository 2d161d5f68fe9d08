import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonosco_mlflow.training.callbacks.retention import Retention

scores = st.lists(st.none() | st.sampled_from([0.0, 1.0, 2.0, math.inf, math.nan]) | st.floats(), max_size=12)


def counted(retention: Retention, rows: list[tuple[int, float | None]]) -> Retention:
    for step, score in rows:
        if score is not None:
            retention.rate(step, score)
        retention.add(step)
    return retention


@given(scores, st.integers(2, 4), st.integers(0, 3), st.none() | st.integers(1, 5))
def test_what_is_kept_is_what_all_that_ever_stood_would_leave(
    found: list[float | None], last: int, best: int, every: int | None
) -> None:
    rows = [(3 * number, score) for number, score in enumerate(found)]
    retention = counted(Retention(last, best, every), rows)
    worth = {step: math.inf if math.isnan(score) else score for step, score in rows if score is not None}
    expected = {step for step, _ in rows[-last:]}
    expected |= set(sorted(worth, key=lambda step: (worth[step], step))[:best])
    expected |= {step for step, _ in rows if every and step % every == 0}
    assert retention.steps == sorted(expected)
    assert set(retention.state_dict()["scores"]) <= expected
    assert retention.best_steps(best) == sorted(worth, key=lambda step: (worth[step], step))[:best]


@given(scores, st.integers(0, 12))
def test_one_that_was_continued_keeps_the_same(found: list[float | None], moment: int) -> None:
    rows = [(step, score) for step, score in enumerate(found, start=1)]
    whole = counted(Retention(2, 2), rows)
    continued = Retention(2, 2)
    continued.load_state_dict(counted(Retention(2, 2), rows[:moment]).state_dict())
    assert repr(counted(continued, rows[moment:]).state_dict()) == repr(whole.state_dict())


@pytest.mark.parametrize(("score", "is_kept"), [(0.5, True), (1.0, False), (math.nan, False), (None, False)])
def test_a_step_is_among_the_best_by_its_score(score: float | None, is_kept: bool) -> None:
    retention = counted(Retention(last=2, best=1), [(1, 1.0), (2, None), (3, None)])
    assert retention.steps == [1, 2, 3]
    if score is not None:
        retention.rate(4, score)
    assert retention.is_among_best(4) is is_kept
