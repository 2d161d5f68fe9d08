import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sonosco_mlflow.data.corpora import bring_corpus
from sonosco_mlflow.data.corpora.audio import write_wave
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError

SECOND = np.zeros(8_000, np.int16)


def record(audio: Path, transcript: Path | None = None, text: str = "hello") -> None:
    audio.parent.mkdir(parents=True, exist_ok=True)
    if audio.suffix == ".opus":
        soundfile.write(audio, SECOND, 8_000, format="OGG", subtype="OPUS")
    else:
        soundfile.write(audio, SECOND, 8_000)
    transcript = transcript or audio.with_suffix(".txt")
    transcript.parent.mkdir(parents=True, exist_ok=True)
    transcript.write_text(text, encoding="utf-8")


def bring(tmp_path: Path, source: Path) -> dict[str, Manifest]:
    return bring_corpus("folder", tmp_path / "corpus", source=str(source))


def ids(manifests: dict[str, Manifest]) -> dict[str, str]:
    return {utterance.id: split for split, manifest in manifests.items() for utterance in manifest}


def test_wav_and_txt_in_folders_of_their_own(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a", "b", "deep/c"):
        record(source / "wav" / f"{name}.wav", source / "txt" / f"{name}.txt", "  two\n words ")
    manifests = bring(tmp_path, source)
    everything = {utterance.id: utterance for manifest in manifests.values() for utterance in manifest}
    assert everything.keys() == {"a", "b", "deep-c"}
    assert everything["deep-c"].speaker == "deep"
    assert everything["a"].speaker == "unknown"
    assert everything["a"].text == "two words"
    assert everything["a"].duration == 1.0
    assert everything["a"].audio_filepath == str(source / "wav" / "a.wav")
    assert not (tmp_path / "corpus" / "wav").exists()


def test_any_audio_with_its_transcript_beside_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("x.wav", "s1/x.flac", "s2/x.ogg", "s2/y.WAV", "s3/z.opus"):
        record(source / name)
    (source / "README.txt").write_text("about")
    (source / "notes").mkdir()
    (source / "notes" / "diary.txt").write_text("no recording lies here")
    (source / "s1" / "._x.flac").write_text("what some systems leave behind")
    assert ids(bring(tmp_path, source)).keys() == {"x", "s1-x", "s2-x", "s2-y", "s3-z"}


def test_folders_named_after_splits_are_the_splits(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for n in range(3):
        record(source / "train" / f"{n}.flac")
    record(source / "dev" / "wav" / "1.wav", source / "dev" / "txt" / "1.txt")
    record(source / "test" / "1.flac")
    assert ids(bring(tmp_path, source)) == {
        "train-0": "train",
        "train-1": "train",
        "train-2": "train",
        "dev-1": "dev",
        "test-1": "test",
    }


def test_manifests_are_taken_and_a_missing_split_is_cut_by_speaker(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for speaker in range(40):
        for n in range(3):
            record(source / f"s{speaker}" / f"{n}.wav")
    made = bring(tmp_path, source)
    parts = [[*made["train"], *made["test"]], [*made["dev"]]]
    given = tmp_path / "given"
    given.mkdir()
    Manifest(parts[0], tmp_path).write(given / "train.jsonl")
    Manifest(parts[1], tmp_path).write(given / "dev.jsonl")
    again = bring(tmp_path, given)
    assert ids(again) == ids(made)
    speakers = [set(manifest.speakers) for manifest in again.values()]
    assert not speakers[0] & speakers[1]
    assert not speakers[0] & speakers[2]
    assert not speakers[1] & speakers[2]
    assert all(1 <= len(again[split].speakers) <= 9 for split in ("dev", "test"))


def test_new_recordings_move_no_old_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for n in range(60):
        record(source / f"{n}.wav")
    before = ids(bring(tmp_path, source))
    for n in range(60, 150):
        record(source / f"{n}.wav")
    after = ids(bring(tmp_path, source))
    assert {name: after[name] for name in before} == before
    assert {"dev", "test"} <= {after[name] for name in after.keys() - before.keys()}


@pytest.mark.parametrize("count", [3, 4, 8])
def test_no_split_of_a_small_folder_is_empty(tmp_path: Path, count: int) -> None:
    for n in range(count):
        record(tmp_path / "source" / f"{n}.wav")
    manifests = bring(tmp_path, tmp_path / "source")
    assert all(len(manifest) for manifest in manifests.values())
    assert sum(len(manifest) for manifest in manifests.values()) == count


def test_too_few_to_cut_is_said(tmp_path: Path) -> None:
    record(tmp_path / "source" / "1.wav")
    record(tmp_path / "source" / "2.wav")
    with pytest.raises(UserError, match="2 utterances to train on, too few to cut dev and test"):
        bring(tmp_path, tmp_path / "source")


def test_files_without_their_partner_are_named_five_and_counted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for n in range(10):
        record(source / f"{n}.wav")
        if n >= 3:
            (source / f"{n}.txt").unlink()
    with pytest.raises(UserError, match=r"without a transcript: .*3\.wav, .*7\.wav, \.\.\. \(7 in all\)"):
        bring(tmp_path, source)


@pytest.mark.parametrize("separate", [True, False])
def test_a_transcript_without_its_recording_is_named(tmp_path: Path, separate: bool) -> None:
    source = tmp_path / "source"
    audio, texts = (source / "wav", source / "txt") if separate else (source, source)
    for n in range(3):
        record(audio / f"{n}.wav", texts / f"{n}.txt")
    (audio / "1.wav").unlink()
    with pytest.raises(UserError, match=r"transcripts without a recording: \S*1\.txt\."):
        bring(tmp_path, source)


def test_empty_and_undecodable_transcripts_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    record(source / "a.wav", text=" \n")
    with pytest.raises(UserError, match=r"of no use: \S*a\.wav has an empty text\. Mend"):
        bring(tmp_path, source)
    (source / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"a\.txt: found bytes that are not UTF-8"):
        bring(tmp_path, source)


def test_audio_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a.wav", "b.wav", "c.wav"):
        record(source / name)
    (source / "a.wav").write_bytes(b"no audio")
    write_wave(source / "b.wav", SECOND[:0], 8_000)
    with pytest.raises(
        UserError, match=r"of no use: (\S*(a|b)\.wav is empty or cannot be read as audio(, |\. Mend)){2}"
    ):
        bring(tmp_path, source)


def test_a_manifest_that_names_missing_audio_or_no_words_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    line = '{{"audio_filepath": "{}.wav", "duration": 1, "text": "{}"}}\n'
    (source / "train.jsonl").write_text(line.format("a", "yes"))
    with pytest.raises(UserError, match=r"of no use: \S*source/a\.wav is not there\."):
        bring(tmp_path, source)
    record(source / "a.wav")
    (source / "train.jsonl").write_text(line.format("a", " "))
    with pytest.raises(UserError, match=r"of no use: \S*source/a\.wav has an empty text\."):
        bring(tmp_path, source)


def test_durations_come_from_the_recordings(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a", "b", "c"):
        record(source / f"{name}.wav")
    lines = [f'{{"audio_filepath": "{name}.wav", "duration": 9, "text": "yes"}}\n' for name in ("a", "b", "c")]
    (source / "train.jsonl").write_text("".join(lines))
    manifests = bring(tmp_path, source)
    assert {utterance.duration for manifest in manifests.values() for utterance in manifest} == {1.0}


def test_an_utterance_in_two_splits_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    record(source / "a.wav")
    for split in ("train", "dev", "test"):
        (source / f"{split}.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1, "text": "yes"}\n')
    with pytest.raises(UserError, match=r"these ids stand in train and in dev: a\."):
        bring(tmp_path, source)


def test_an_empty_or_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source: the folder corpus needs one"):
        bring_corpus("folder", tmp_path / "corpus")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        bring(tmp_path, tmp_path / "nowhere")
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match="has no recordings with transcripts"):
        bring(tmp_path, tmp_path / "source")


def test_linked_folders_and_hidden_files_are_taken_as_they_look(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("here/a", "here/b"):
        record(source / f"{name}.wav")
        (source / f"{name}.txt").write_text("yes")
    record(tmp_path / "disk" / "c.wav")
    (tmp_path / "disk" / "c.txt").write_text("no")
    (source / "linked").symlink_to(tmp_path / "disk")
    # What macOS leaves on other file systems.
    (source / "here" / "._a.wav").write_bytes(b"x")
    (source / "here" / "._a.txt").write_bytes(b"x")
    manifests = bring(tmp_path, source)
    found = {utterance.id: utterance.speaker for manifest in manifests.values() for utterance in manifest}
    assert found == {"here-a": "here", "here-b": "here", "linked-c": "linked"}


@pytest.mark.parametrize("name", [b"caf\xe9.wav", b"two\nlines.wav"])
def test_a_name_that_no_list_can_hold_is_refused(tmp_path: Path, name: bytes) -> None:
    source = tmp_path / "source"
    record(source / "a.wav")
    (source / "a.txt").write_text("yes")
    record(source / "b.wav")
    os.rename(source / "b.wav", os.fsencode(source) + b"/" + name)  # noqa: PTH104 - no Path can be of such bytes
    with pytest.raises(UserError, match=r"its name has bytes that are not UTF-8, or a control character.*Rename it"):
        bring(tmp_path, source)
