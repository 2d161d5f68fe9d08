import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from sonosco_mlflow.data.corpora.base import bring_corpus
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.data.manifest_tools.editing import (
    RATIOS,
    Limits,
    create,
    dropped_text,
    keep_within,
    merge,
    parse_ratios,
    read,
    split,
    write_new,
)
from sonosco_mlflow.errors import UserError


def utterance(identifier: str, duration: float = 1.0, text: str = "YES", speaker: str = "x") -> Utterance:
    return Utterance(identifier, f"wav/{identifier}.wav", duration, text, speaker)


def record(path: Path, seconds: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(8000 * seconds)), 8000)
    path.with_suffix(".txt").write_text("yes")


def silent(done: int, total: int) -> None:
    pass


# ---------------------------------------------------------------------- create


def test_a_folder_becomes_a_manifest_that_moves_with_it(tmp_path: Path) -> None:
    record(tmp_path / "one" / "audio" / "s1" / "a.wav")
    record(tmp_path / "one" / "audio" / "b.flac")
    into = tmp_path / "one" / "all.jsonl"
    made = create(tmp_path / "one" / "audio", into, "p-", 1, silent)
    write_new(made, into)
    shutil.move(tmp_path / "one", tmp_path / "two")
    manifest = Manifest.read(tmp_path / "two" / "all.jsonl")
    assert [(u.id, u.audio_filepath, u.duration, u.text, u.speaker) for u in manifest] == [
        ("p-b", "audio/b.flac", 0.5, "yes", "unknown"),
        ("p-s1-a", "audio/s1/a.wav", 0.5, "yes", "s1"),
    ]
    assert all(manifest.audio_path(made).is_file() for made in manifest)


def test_recordings_elsewhere_are_named_by_absolute_paths(tmp_path: Path) -> None:
    record(tmp_path / "audio" / "a.wav")
    made = create(tmp_path / "audio", tmp_path / "lists" / "all.jsonl", "", 1, silent)
    assert [u.audio_filepath for u in made] == [str(tmp_path / "audio" / "a.wav")]


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recordings"):
        create(tmp_path, tmp_path / "m.jsonl", "", 1, silent)
    with pytest.raises(UserError, match="none: is not a folder"):
        create(tmp_path / "none", tmp_path / "m.jsonl", "", 1, silent)


def test_a_folder_with_what_is_of_no_use_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        record(tmp_path / f"{name}.wav")
    (tmp_path / "a.wav").write_bytes(b"no audio")
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(
        UserError, match=r"of no use: \S+a\.wav is empty or cannot .*, \S+b\.wav has an empty text\. Mend"
    ):
        create(tmp_path, tmp_path / "m.jsonl", "", 1, silent)


def test_what_stands_there_is_kept_unless_it_is_the_same(tmp_path: Path) -> None:
    into = tmp_path / "m.jsonl"
    write_new(Manifest([utterance("a")], tmp_path), into)
    before = into.read_bytes()
    write_new(Manifest([utterance("a")], tmp_path), into)
    with pytest.raises(UserError, match=r"m\.jsonl: something else stands there already"):
        write_new(Manifest([utterance("b")], tmp_path), into)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="something else stands there"):
        write_new(Manifest([utterance("b")], tmp_path), tmp_path / "folder")
    assert into.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"m.jsonl", "folder"}


# ----------------------------------------------------------------------- merge


def test_merged_paths_lead_to_the_same_files_from_the_new_place(tmp_path: Path) -> None:
    for name in ("one/wav/a.wav", "two/b.wav", "c.wav"):
        record(tmp_path / name)
    one, two = tmp_path / "one" / "m.jsonl", tmp_path / "two" / "lists" / "m.jsonl"
    Manifest([utterance("a")], one.parent).write(one)
    outside = str(tmp_path / "c.wav")
    two.parent.mkdir()
    Manifest([Utterance("b", "../b.wav", 1, "", "x"), Utterance("c", outside, 1, "", "x")], two.parent).write(two)
    into = tmp_path / "new" / "place" / "all.jsonl"
    write_new(merge([two, one], into), into)
    merged = Manifest.read(into)
    assert [u.audio_filepath for u in merged] == ["../../one/wav/a.wav", "../../two/b.wav", outside]
    assert all(merged.audio_path(made).is_file() for made in merged)


def test_paths_stay_valid_behind_links(tmp_path: Path) -> None:
    record(tmp_path / "deep" / "down" / "data" / "a.wav")
    (tmp_path / "deep" / "down" / "lists").mkdir()
    Manifest([Utterance("a", "../data/a.wav", 1, "", "x")], tmp_path).write(tmp_path / "m.jsonl")
    real = tmp_path / "deep" / "down" / "lists" / "m.jsonl"
    real.write_text('{"id": "a", "audio_filepath": "../data/a.wav", "duration": 1, "text": ""}\n')
    (tmp_path / "link").symlink_to(real.parent)
    for into in (tmp_path / "new" / "m.jsonl", tmp_path / "link" / "n.jsonl"):
        for made in (merge([tmp_path / "link" / "m.jsonl"], into), read(tmp_path / "link" / "m.jsonl")):
            into.unlink(missing_ok=True)
            write_new(made, into)
            found = Manifest.read(into)
            assert found.audio_path(found[0]).is_file()


def test_an_id_in_two_manifests_is_refused_with_both_lines(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    Manifest([utterance("a"), utterance("b"), utterance("c")], tmp_path).write(one)
    Manifest([utterance("c"), utterance("b")], tmp_path).write(two)
    with pytest.raises(UserError, match=rf"'b' in {one}:2 and {two}:1, 'c' in {one}:3 and {two}:2\. Rename"):
        merge([one, two], tmp_path / "all.jsonl")


# ---------------------------------------------------------------------- filter


def test_limits_keep_what_lies_on_them_and_say_what_they_cost() -> None:
    rows = {
        "a": (1.0, 10),
        "b": (0.5, 5),
        "c": (2.0, 20),
        "d": (0.4, 1),
        "e": (2.5, 100),
        "f": (1.0, 21),
        "g": (1.0, 2),
    }
    manifest = Manifest([utterance(name, seconds, "x" * count) for name, (seconds, count) in rows.items()], Path("r"))
    kept, dropped = keep_within(manifest, Limits(0.5, 2.0, 3.0, 20.0))
    assert [made.id for made in kept] == ["a", "b", "c"]
    assert kept.root == Path("r")
    assert list(dropped_text(dropped)) == [
        "dropped 1 utterances, 0.00 h: below 0.5 s",
        "dropped 1 utterances, 0.00 h: above 2 s",
        "dropped 1 utterances, 0.00 h: above 20 characters a second",
        "dropped 1 utterances, 0.00 h: below 3 characters a second",
    ]
    assert dropped["above 2 s"].seconds == 2.5
    assert list(keep_within(manifest, Limits())[0]) == list(manifest)
    with pytest.raises(UserError, match=r"no utterance is within the limits \(below 9 s\)"):
        keep_within(manifest, Limits(min_duration=9))


# ----------------------------------------------------------------------- split

speakers = st.sampled_from(["unknown", *"abcdefghijklmnopqrstuvwxyz"])
rows = st.lists(
    st.tuples(st.text("abcdef", min_size=1, max_size=6), speakers), max_size=60, unique_by=lambda row: row[0]
)


def cut(made: list[tuple[str, str]], by: str, seed: int) -> dict[str, str]:
    """The split of each id; nothing where one would be empty."""
    manifest = Manifest([utterance(name, speaker=speaker) for name, speaker in made], Path())
    try:
        splits = split(manifest, {"dev": 0.2, "test": 0.3, "train": 0.5}, by, seed)  # type: ignore[arg-type]
    except UserError:
        return {}
    assert sorted(u.id for part in splits.values() for u in part) == [u.id for u in manifest]
    assert all(len(part) for part in splits.values())
    if by == "speaker":
        known = [set(part.speakers) - {"unknown"} for part in splits.values()]
        assert not known[0] & known[1] | known[0] & known[2] | known[1] & known[2]
    return {u.id: name for name, part in splits.items() for u in part}


@settings(deadline=None)
@given(rows, st.randoms(use_true_random=False), st.sampled_from(["speaker", "utterance"]), st.integers(0, 3))
def test_added_rows_move_none_that_was_there(made: list[tuple[str, str]], order: object, by: str, seed: int) -> None:
    after = cut(made, by, seed)
    before = cut(order.sample(made, len(made) * 2 // 3), by, seed)  # type: ignore[attr-defined]
    if after and before:
        assert {name: after[name] for name in before} == before


def test_shares_come_out_about_as_asked_and_another_seed_cuts_otherwise() -> None:
    made = [(f"{i:04d}", f"s{i % 400}") for i in range(4000)]
    one, other = cut(made, "utterance", 0), cut(made, "utterance", 1)
    for found in (one, other, cut(made, "speaker", 5)):
        counts = [list(found.values()).count(name) / 4000 for name in ("dev", "test", "train")]
        assert counts == pytest.approx([0.2, 0.3, 0.5], abs=0.06)
    assert sum(one[name] != other[name] for name in one) > 1000


def test_utterances_of_unknown_speakers_go_each_by_itself() -> None:
    unknown = [(f"{i:03d}", "unknown") for i in range(100)]
    assert cut(unknown, "speaker", 0) == cut(unknown, "utterance", 0) != {}


def test_by_default_it_cuts_as_the_folder_corpus_does(tmp_path: Path) -> None:
    for speaker in range(40):
        record(tmp_path / "source" / f"s{speaker}" / "a.wav")
    corpus = bring_corpus("folder", tmp_path / "corpus", source=str(tmp_path / "source"))
    everything = create(tmp_path / "source", tmp_path / "m.jsonl", "", 1, silent)
    splits = split(everything, RATIOS, "speaker", 0)
    assert {name: [u.id for u in part] for name, part in splits.items()} == {
        name: [u.id for u in part] for name, part in corpus.items()
    }


def test_shares_that_are_none_and_splits_that_would_be_empty_are_refused() -> None:
    manifest = Manifest([utterance("a"), utterance("b")], Path())
    with pytest.raises(UserError, match=r"nothing falls to .*: 2 utterances of 1 speakers are too few for dev=0\.1,"):
        split(manifest, RATIOS, "speaker", 0)
    with pytest.raises(UserError, match=r"found dev=0\.5,train=0\.6, expected shares above 0 that sum to 1"):
        split(manifest, {"dev": 0.5, "train": 0.6}, "speaker", 0)
    for wrong in ("dev", "dev=x", "dev=0", "dev=nan", "../dev=0.1", "=0.1", "dev=0.1,dev=0.9", ""):
        with pytest.raises(UserError, match=r"--ratios: found .* expected like dev=0\.1,test=0\.1,train=0\.8"):
            parse_ratios(wrong)
    assert parse_ratios("a-b=0.25, c=0.75") == {"a-b": 0.25, "c": 0.75}
