import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from sonosco_mlflow.data.batching import BatchPlan
from sonosco_mlflow.errors import UserError

LENGTHS = st.lists(st.integers(1, 2000), max_size=60)


def realistic_frames(count: int, seed: int = 0) -> list[int]:
    """Utterances of 2 to 15 s, ten milliseconds a frame."""
    return np.random.default_rng(seed).integers(200, 1500, count).tolist()


@given(LENGTHS, st.integers(1, 5000), st.none() | st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_utterance_is_in_one_batch_and_no_batch_is_over_the_budget(
    frames: list[int], budget: int, seed: int | None, epoch: int
) -> None:
    batches = BatchPlan(frames, budget, seed).batches(epoch)
    assert sorted(position for batch in batches for position in batch) == list(range(len(frames)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(frames[position] for position in batch) <= budget


def test_batches_are_a_function_of_lengths_seed_and_epoch() -> None:
    frames = realistic_frames(300)
    plan = BatchPlan(frames, 6000, seed=1)
    later = plan.batches(7)
    assert BatchPlan(frames, 6000, seed=1).batches(7) == later, "no epoch before it is needed"
    assert plan.batches(8) != later
    assert BatchPlan(frames, 6000, seed=2).batches(7) != later


EXPECTED_BATCHES = [[0, 5], [3], [4, 1, 2]]


def test_the_batches_of_this_version_stand() -> None:
    """Written down once; a change here would break every run that was made before."""
    assert BatchPlan([300, 100, 120, 310, 90, 305], 650, seed=0).batches(2) == EXPECTED_BATCHES


def test_epochs_mix_neighbours_anew() -> None:
    plan = BatchPlan(realistic_frames(300), 6000, seed=1)
    together = [{frozenset(batch) for batch in plan.batches(epoch)} for epoch in (0, 1)]
    assert len(together[0] & together[1]) < 0.2 * len(together[0])


def test_training_is_not_in_the_order_of_length() -> None:
    frames = np.array(realistic_frames(600))
    longest = [frames[batch].max() for batch in BatchPlan(frames.tolist(), 6000, seed=1).batches(0)]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3


def test_sorta_grad_orders_the_batches_of_the_first_epoch_alone() -> None:
    frames = realistic_frames(300)
    plan, plain = BatchPlan(frames, 6000, seed=1, sorta_grad=True), BatchPlan(frames, 6000, seed=1)
    longest = [max(frames[position] for position in batch) for batch in plan.batches(0)]
    assert longest == sorted(longest)
    assert sorted(plan.batches(0)) == sorted(plain.batches(0)), "the same utterances share a batch"
    assert plan.batches(1) == plain.batches(1)


def test_sorta_grad_changes_nothing_in_evaluation() -> None:
    frames = realistic_frames(100)
    assert BatchPlan(frames, 3000, sorta_grad=True).batches(0) == BatchPlan(frames, 3000).batches(0)


def test_plans_without_sorta_grad_have_the_digest_that_they_always_had() -> None:
    """Written down once; another digest would refuse to continue any run that was made before."""
    assert BatchPlan([1, 2], 10, 0).digest == "32f5bfe878c561bb78c1a2e5241a037c7db1dd1449afdd3281483fbeccfd22d4"


def test_evaluation_is_in_the_order_of_length_in_every_epoch() -> None:
    frames = realistic_frames(100)
    plan = BatchPlan(frames, 3000, seed=None)
    order = [frames[position] for batch in plan.batches(0) for position in batch]
    assert order == sorted(frames)
    assert plan.batches(5) == plan.batches(0)


@pytest.mark.parametrize("frames_per_batch", [12_000, 32 * 850])
def test_little_is_spent_on_padding(frames_per_batch: int) -> None:
    frames = realistic_frames(2000)
    for epoch in range(3):
        plan = BatchPlan(frames, frames_per_batch, seed=0)
        batches = plan.batches(epoch)
        padded = sum(len(batch) * max(frames[position] for position in batch) for batch in batches)
        assert plan.padding(epoch) == pytest.approx(1 - sum(frames) / padded)
        assert plan.padding(epoch) < 0.06
    assert BatchPlan(frames, frames_per_batch, seed=None).padding(0) < 0.02


def test_the_digest_follows_all_that_the_batches_depend_on() -> None:
    digests = {
        plan.digest
        for plan in (
            *(BatchPlan([1, 2], 10, 0), BatchPlan([2, 1], 10, 0), BatchPlan([1, 2], 11, 0)),
            *(BatchPlan([1, 2], 10, 1), BatchPlan([1, 2], 10, None), BatchPlan([1, 2], 10, 0, jitter=0.2)),
            BatchPlan([1, 2], 10, 0, sorta_grad=True),
        )
    }
    assert len(digests) == 7
    assert BatchPlan([1, 2], 10, 0).digest == BatchPlan([1, 2], 10, 0).digest


def test_an_empty_manifest_has_no_batches() -> None:
    assert BatchPlan([], 10, 0).batches(0) == []
    assert BatchPlan([], 10, 0).padding(0) == 0


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="frames_per_batch is 0"):
        BatchPlan([1], 0)
