"""What the stages make of a recipe, in this process."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from project import make_after_corpus
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.stages import DataFolder, make_corpus, make_manifests
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.lineage import DataLineage
from toy import SAMPLE_RATE, tone_corpus, tone_texts

RECIPE = {"features": {"n_mels": 8}, "data": {"processes": 1}}


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    """Data with a silent recording and a clipped one, one of each text in every split."""
    folder = DataFolder(tmp_path / "data")
    corpus = folder.corpus("default")
    for split in ("train", "dev", "test"):
        tone_corpus(corpus / split, tone_texts(6)).write(corpus / f"{split}.jsonl")
    for number, level in ((1, 0.0), (3, 1.0)):
        path = corpus / "train" / f"tone-00{number}.wav"
        soundfile.write(path, np.full(soundfile.info(path).frames, level), SAMPLE_RATE, subtype="PCM_16")
    return folder


def train_ids(folder: DataFolder) -> list[str]:
    return [utterance.id for utterance in Manifest.read(folder.manifests("default") / "train.jsonl")]


def test_nothing_is_skipped_unasked(folder: DataFolder) -> None:
    config = Config.resolve(RECIPE, {})
    assert make_manifests(config, "default", folder) == []
    make_after_corpus(config, folder)
    assert len(train_ids(folder)) == 6
    assert folder.skipped("default").read_bytes() == b""
    assert DataLineage.of_folder(folder).to_markdown().splitlines()[0] == "| split | utterances | hours | speakers |"


def test_what_is_skipped_is_named_and_counted(folder: DataFolder) -> None:
    config = Config.resolve(RECIPE, {"data.skip": "[silence, clipping]"})
    seen: list[tuple[str, int, int]] = []
    found = make_manifests(config, "default", folder, lambda *progress: seen.append(progress))
    assert [(finding.id, finding.line, finding.check) for finding in found] == [
        ("tone-001", 2, "silence"),
        ("tone-003", 4, "clipping"),
    ]
    assert seen[-1] == ("recordings of default", 18, 18)
    assert train_ids(folder) == ["tone-000", "tone-002", "tone-004", "tone-005"]
    told = [json.loads(line) for line in folder.skipped("default").read_text().splitlines()]
    assert [(row["id"], row["check"]) for row in told] == [("tone-001", "silence"), ("tone-003", "clipping")]
    make_after_corpus(config, folder)
    lineage = DataLineage.of_folder(folder)
    assert [count.get("skipped", 0) for count in lineage.counts.values()] == [2, 0, 0]
    header, _, first, second, _ = lineage.to_markdown().splitlines()
    assert (header.split(" | ")[-1], first.split(" | ")[-1], second.split(" | ")[-1]) == ("skipped |", "2 |", "0 |")


def test_each_check_is_asked_for_by_its_name(folder: DataFolder) -> None:
    make_manifests(Config.resolve(RECIPE, {"data.skip": "[silence]"}), "default", folder)
    assert train_ids(folder) == ["tone-000", "tone-002", "tone-003", "tone-004", "tone-005"]
    # The same recordings lie in every split, under other names of folders.
    make_manifests(Config.resolve(RECIPE, {"data.skip": "[same-audio]"}), "default", folder)
    assert len(Manifest.read(folder.manifests("default") / "test.jsonl")) == 0
    assert len(train_ids(folder)) == 6


def test_rows_alone_open_no_recording(folder: DataFolder) -> None:
    for path in folder.corpus("default").rglob("*.wav"):
        path.unlink()
    path = folder.corpus("default") / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(re.sub('"text": "[A-E]+"', '"text": ""', lines[0]) + "".join(lines[1:]))
    (found,) = make_manifests(Config.resolve(RECIPE, {"data.skip": "[text]"}), "default", folder)
    assert (found.check, found.id, len(train_ids(folder))) == ("text", "tone-000", 5)
    shortened = re.sub('"duration": [0-9.]+', '"duration": 0.04', lines[1])
    path.write_text("".join([lines[0], shortened, *lines[2:]]))
    (found,) = make_manifests(Config.resolve(RECIPE, {"data.skip": "[short, text]"}), "default", folder)
    assert (found.check, found.id, len(train_ids(folder))) == ("short", "tone-001", 5)


def of_folder(source: Path, **keys: str) -> Config:
    given = {"data.corpus": "folder", "data.source": str(source), **keys}
    return Config.resolve(RECIPE, given)


def test_what_is_of_no_use_is_refused_until_the_recipe_leaves_it_out(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", DataFolder(tmp_path / "data")
    manifest = tone_corpus(source, tone_texts(30))
    (source / "tone-001.wav").write_bytes(b"")
    (source / "tone-002.wav").write_bytes(b"no audio")
    (source / "tone-003.wav").unlink()
    manifest.write(source / "train.jsonl")
    lines = (source / "train.jsonl").read_text().splitlines(keepends=True)
    lines[4] = re.sub('"text": "[A-E]+"', '"text": ""', lines[4])
    (source / "train.jsonl").write_text("".join(lines))

    config = of_folder(source)
    found = make_corpus(config, "folder", folder)
    assert {finding.id: finding.check for finding in found} == {
        "tone-001": "audio",
        "tone-002": "audio",
        "tone-003": "file",
        "tone-004": "text",
    }
    told = [str(finding) for finding in found if finding.id == "tone-003"]
    assert re.fullmatch(
        rf"\S+/(train|dev|test)\.unusable\.jsonl:\d: tone-003: {source}/tone-003\.wav is not there; put the .*", told[0]
    )
    with pytest.raises(UserError, match=r"of no use: .*or leave them out with data\.skip: \[audio, file, text\]"):
        make_manifests(config, "folder", folder)
    with pytest.raises(UserError, match=r"tone-003\.wav is not there\. Mend .* data\.skip: \[audio, file, text\]"):
        make_manifests(of_folder(source, **{"data.skip": "[audio, text]"}), "folder", folder)

    config = of_folder(source, **{"data.skip": "[audio, file, text]"})
    skipped = make_manifests(config, "folder", folder)
    assert sorted(finding.id for finding in skipped) == ["tone-001", "tone-002", "tone-003", "tone-004"]
    make_after_corpus(config, folder)
    lineage = DataLineage.of_folder(folder)
    assert sum(count.get("skipped", 0) for count in lineage.counts.values()) == 4
    assert sum(count["utterances"] for count in lineage.counts.values()) == 26

    # Mended, they come back, and move no other one.
    splits = {split: {row.id for row in Manifest.read(folder.manifest(split))} for split in ("train", "dev", "test")}
    tone_corpus(source, tone_texts(30)).write(source / "train.jsonl")
    assert make_corpus(config, "folder", folder) == []
    assert make_manifests(config, "folder", folder) == []
    for split, before in splits.items():
        assert before <= {row.id for row in Manifest.read(folder.manifests("folder") / f"{split}.jsonl")}


def test_a_corpus_may_be_there_for_one_split_alone(tmp_path: Path) -> None:
    folder, corpora = DataFolder(tmp_path / "data"), {}
    for name, splits in {"all": ("train", "dev", "test"), "more": ("train",), "other": ("test",)}.items():
        for split in splits:
            tone_corpus(tmp_path / name, tone_texts(6)).write(tmp_path / name / f"{split}.jsonl")
            change = (tmp_path / name / f"{split}.jsonl").read_text().replace('"id": "', f'"id": "{split}-')
            (tmp_path / name / f"{split}.jsonl").write_text(change)
        corpora[name] = {"kind": "folder", "source": str(tmp_path / name), "hold_out": name == "all"}
    config = Config.resolve({**RECIPE, "data": {"processes": 1, "corpora": corpora}}, {})
    for name in corpora:
        assert make_corpus(config, name, folder) == []
    make_after_corpus(config, folder)
    found = {
        split: {row.id.split("-")[0] for row in Manifest.read(folder.manifest(split))}
        for split in ("train", "dev", "test")
    }
    assert found == {"train": {"all", "more"}, "dev": {"all"}, "test": {"all", "other"}}
    assert folder.store("test").n_mels == 8

    asked = Config.resolve(
        {**RECIPE, "data": {"processes": 1, "corpora": corpora}}, {"data.corpora.other.hold_out": "true"}
    )
    with pytest.raises(
        UserError,
        match=r"^corpus other: data\.source: \S+other has no utterances to train on, only for test\. .*hold_out: false",
    ):
        make_corpus(asked, "other", folder)


def test_rows_of_two_corpora_are_counted_apart(tmp_path: Path) -> None:
    folder, names = DataFolder(tmp_path / "data"), ("one", "other")
    for name in names:
        for split in ("train", "dev", "test"):
            tone_corpus(folder.corpus(name) / split, tone_texts(4)).write(folder.corpus(name) / f"{split}.jsonl")
        path = folder.corpus(name) / "train" / "tone-001.wav"
        soundfile.write(path, np.zeros(soundfile.info(path).frames), SAMPLE_RATE, subtype="PCM_16")
    corpora = {name: {"kind": "folder", "source": "x"} for name in names}
    config = Config.resolve({**RECIPE, "data": {"processes": 1, "corpora": corpora, "skip": ["silence"]}}, {})
    make_after_corpus(config, folder)
    assert folder.count_skipped() == {"train": 2}
