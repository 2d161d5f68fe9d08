import hashlib
import json
import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from sonosco_mlflow.data.batching import BatchPlan
from sonosco_mlflow.data.corpora import bring_corpus
from sonosco_mlflow.data.processor import AudioDataProcessor
from sonosco_mlflow.errors import UserError

AN4 = Path(__file__).parents[3] / "shared/corpora/an4.tar.gz"
LENGTHS = st.lists(st.integers(1, 2000), max_size=60)


def realistic_frames(count: int, seed: int = 0) -> list[int]:
    """Utterances of 2 to 15 s, ten milliseconds a frame."""
    return np.random.default_rng(seed).integers(200, 1500, count).tolist()


def librispeech_like_frames(count: int, seed: int = 0) -> list[int]:
    """Lengths as LibriSpeech's are, though none of them: 1 to 35 s, 12.3 on average, most between 10 and 16."""
    stream = np.random.default_rng(seed)
    # Of uniform draws alone: those are the same on every machine.
    most, few, fewest, kind = stream.random((3, count)).sum(axis=0), *stream.random((3, count))
    seconds = np.where(kind < 0.74, 9.2 + 3 * most, 1 + 14 * few)
    return (100 * np.where(kind > 0.995, 17 + 18 * fewest, seconds)).astype(int).tolist()


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


@given(LENGTHS, st.integers(1, 5000), st.integers(0, 9), st.integers(1, 4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_each_epoch_of_a_curriculum_has_every_utterance_of_its_share_once(
    frames: list[int], budget: int, seed: int, epochs: int, sorta_grad: bool
) -> None:
    plan = BatchPlan(frames, budget, seed, sorta_grad=sorta_grad, curriculum_epochs=epochs)
    before: set[int] = set()
    for epoch in range(epochs):
        batches = plan.batches(epoch)
        seen = [position for batch in batches for position in batch]
        assert len(seen) == len(set(seen)) == math.ceil(len(frames) * math.sqrt((epoch + 1) / (epochs + 1)))
        assert before <= set(seen)
        left = set(range(len(frames))) - set(seen)
        assert all(frames[one] <= frames[other] for one in seen for other in left)
        assert all(len(batch) == 1 or len(batch) * max(frames[p] for p in batch) <= budget for batch in batches)
        padded = sum(len(batch) * max(frames[position] for position in batch) for batch in batches)
        spoken = sum(frames[position] for position in seen)
        assert plan.padding(epoch) == pytest.approx(1 - spoken / padded if padded else 0)
        before = set(seen)
    plain = BatchPlan(frames, budget, seed)
    assert [plan.batches(epoch) for epoch in (epochs, epochs + 3)] == [
        plain.batches(epoch) for epoch in (epochs, epochs + 3)
    ]


def test_an_epoch_of_a_curriculum_needs_none_before_it() -> None:
    frames = realistic_frames(300)
    plan = BatchPlan(frames, 6000, seed=1, curriculum_epochs=4)
    later = plan.batches(2)
    assert BatchPlan(frames, 6000, seed=1, curriculum_epochs=4).batches(2) == later
    assert BatchPlan(frames, 6000, seed=2, curriculum_epochs=4).batches(2) != later
    assert BatchPlan(frames, 6000, seed=1, curriculum_epochs=3).batches(2) != later


def test_a_curriculum_is_shuffled_unless_its_first_epoch_is_sorted() -> None:
    frames = realistic_frames(600)
    plan = BatchPlan(frames, 6000, seed=1, curriculum_epochs=2)
    longest = [max(frames[position] for position in batch) for batch in plan.batches(0)]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.4
    in_order = BatchPlan(frames, 6000, seed=1, sorta_grad=True, curriculum_epochs=2)
    assert sorted(in_order.batches(0)) == sorted(plan.batches(0))
    longest = [max(frames[position] for position in batch) for batch in in_order.batches(0)]
    assert longest == sorted(longest)


def test_evaluation_sees_everything_whatever_the_curriculum() -> None:
    frames = realistic_frames(100)
    assert BatchPlan(frames, 3000, curriculum_epochs=5).batches(0) == BatchPlan(frames, 3000).batches(0)


# Written down before anything of it was made faster.
EXPECTED_DIGESTS = {
    "evaluation": "6c05796b295d04383cd33a39185609768216e001e274865b63a3c575b9263ab3",
    "training": "725fa34311470f1df263275925025bbc6310cfc3a66883df8ad55f14cd690547",
    "sorta_grad": "baba8eeb3a5b44593ac1b1137786973a93cea20ad5979f70a9745e2407d2080e",
}


def test_the_batches_of_many_utterances_stand() -> None:
    frames = librispeech_like_frames(20_000)
    found = {
        "evaluation": BatchPlan(frames, 12_000).batches(3),
        "training": BatchPlan(frames, 12_000, seed=0).batches(3),
        "sorta_grad": BatchPlan(frames, 12_000, seed=0, sorta_grad=True).batches(0),
    }
    digests = {name: hashlib.sha256(json.dumps(batches).encode()).hexdigest() for name, batches in found.items()}
    assert digests == EXPECTED_DIGESTS


def test_plans_without_what_came_later_have_the_digest_that_they_always_had() -> None:
    """Written down once; another digest would refuse to continue any run that was made before."""
    assert BatchPlan([1, 2], 10, 0).digest == "32f5bfe878c561bb78c1a2e5241a037c7db1dd1449afdd3281483fbeccfd22d4"
    sorted_first = BatchPlan([1, 2], 10, 0, sorta_grad=True)
    assert sorted_first.digest == "3e367136e73127431efe5db0e84804cfd4ef3137898de6ea3eb34ea977704649"


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


@pytest.mark.parametrize("frames_per_batch", [6000, 12_000, 24_000])
def test_of_lengths_like_librispeechs_less_than_5_percent_is_padding(frames_per_batch: int) -> None:
    frames = librispeech_like_frames(28_539)
    seconds = np.array(frames) / 100
    assert seconds.mean() == pytest.approx(12.3, abs=0.1)
    assert np.mean((seconds > 10) & (seconds < 16)) > 0.6
    assert 1 <= seconds.min() < 2
    assert 34 < seconds.max() <= 35
    for epoch in range(4):
        assert BatchPlan(frames, frames_per_batch, seed=0).padding(epoch) < 0.05
        assert BatchPlan(frames, frames_per_batch, seed=0, curriculum_epochs=3).padding(epoch) < 0.05


@pytest.mark.corpora
@pytest.mark.skipif(not AN4.is_file(), reason="no ../shared/corpora/an4.tar.gz beside this checkout")
def test_of_an4_less_than_5_percent_is_padding(tmp_path: Path) -> None:
    processor = AudioDataProcessor()
    train = bring_corpus("an4", tmp_path, source=str(AN4))["train"]
    frames = [processor.frames(round(utterance.duration * 16000)) for utterance in train]
    for frames_per_batch in (2400, 3200):  # of params.yaml, and of recipes/an4
        for epoch in range(4):
            assert BatchPlan(frames, frames_per_batch, seed=0).padding(epoch) < 0.05


def test_the_digest_follows_all_that_the_batches_depend_on() -> None:
    digests = {
        plan.digest
        for plan in (
            *(BatchPlan([1, 2], 10, 0), BatchPlan([2, 1], 10, 0), BatchPlan([1, 2], 11, 0)),
            *(BatchPlan([1, 2], 10, 1), BatchPlan([1, 2], 10, None), BatchPlan([1, 2], 10, 0, jitter=0.2)),
            *(BatchPlan([1, 2], 10, 0, sorta_grad=True), BatchPlan([1, 2], 10, 0, curriculum_epochs=1)),
            *(
                BatchPlan([1, 2], 10, 0, sorta_grad=True, curriculum_epochs=2),
                BatchPlan([1, 2], 10, 0, curriculum_epochs=2),
            ),
        )
    }
    assert len(digests) == 10
    assert BatchPlan([1, 2], 10, 0).digest == BatchPlan([1, 2], 10, 0).digest


def test_an_empty_manifest_has_no_batches() -> None:
    assert BatchPlan([], 10, 0).batches(0) == []
    assert BatchPlan([], 10, 0).padding(0) == 0


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="frames_per_batch is 0"):
        BatchPlan([1], 0)
