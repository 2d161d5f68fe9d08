from hypothesis import given
from hypothesis import strategies as st

from sonosco_mlflow.data.corpora.splitting import cut_missing
from sonosco_mlflow.data.manifest import Utterance

NAMES = st.integers(0, 10_000)


def utterance(number: int, speakers: int) -> Utterance:
    return Utterance(f"u{number}", f"{number}.wav", 1.0, "yes", f"s{number % speakers}")


def split_of(splits: dict[str, list[Utterance]]) -> dict[str, str]:
    return {utterance.id: split for split, utterances in splits.items() for utterance in utterances}


@given(
    numbers=st.sets(NAMES, min_size=40, max_size=120),
    speakers=st.integers(1, 40),
    given_splits=st.sets(st.sampled_from(["dev", "test"])),
)
def test_what_is_cut_is_a_partition_by_speaker(numbers: set[int], speakers: int, given_splits: set[str]) -> None:
    train = [utterance(number, speakers) for number in sorted(numbers)]
    own = {split: [Utterance(f"{split}{n}", "x.wav", 1.0, "no", split) for n in range(3)] for split in given_splits}
    cut = cut_missing({"train": train, **own}, "a test")
    assert {split: cut[split] for split in given_splits} == own
    assert sorted(u.id for split in {"train", "dev", "test"} - given_splits for u in cut[split]) == sorted(
        u.id for u in train
    )
    assert all(cut.values())
    if len({u.speaker for u in train}) >= 10:
        heard = [{u.speaker for u in utterances} for utterances in cut.values()]
        assert sum(map(len, heard)) == len(set.union(*heard))


@given(numbers=st.sets(NAMES, min_size=60, max_size=120), more=st.sets(NAMES, max_size=60))
def test_new_utterances_move_no_old_one_unless_a_split_was_empty(numbers: set[int], more: set[int]) -> None:
    def cut(chosen: set[int]) -> dict[str, str]:
        return split_of(cut_missing({"train": [utterance(number, 1) for number in sorted(chosen)]}, "a test"))

    before, after = cut(numbers), cut(numbers | more)
    # A split that would be empty takes its nearest, which may stay behind when there are others.
    moved = [name for name, split in before.items() if after[name] != split]
    assert all(list(before.values()).count(before[name]) == 1 for name in moved)
