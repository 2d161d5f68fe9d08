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
from sonosco_mlflow.data.stages import DataFolder, make_manifests
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
