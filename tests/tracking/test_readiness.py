import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from ruamel.yaml import YAML

from project import make_project, move_corpus, run
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.runs import train
from sonosco_mlflow.tracking import readiness
from sonosco_mlflow.tracking.changes import data_changes
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.pipeline import prepare_data
from sonosco_mlflow.tracking.readiness import require_current, require_recordings
from toy import change_a_sample


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    project = make_project(tmp_path_factory.mktemp("readiness") / "project")
    return prepare_data(Config.load(project / "params.yaml"), project)


@pytest.fixture
def folder(prepared: DataFolder) -> Iterator[DataFolder]:
    """The data as its stages made it; put back afterwards."""
    files = [path for path in prepared.root.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in (*files, prepared.root.parent / "dvc.lock")}
    yield prepared
    for path in prepared.root.rglob("*"):
        if path.is_file() and path not in before:
            path.unlink()
    for path, content in before.items():
        replace(path, content)


def replace(path: Path, content: bytes) -> None:
    # Not in place: it may be a link into DVC's cache.
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def test_what_the_stages_made_can_be_trained_on(folder: DataFolder) -> None:
    require_current(folder)


def test_data_that_dvc_does_not_version_has_digests_of_its_own(folder: DataFolder) -> None:
    """As the verbs make it one by one."""
    versioned = DataLineage.of_folder(folder)
    assert (versioned.contents, len(versioned.outputs) > 0) == ({}, True)
    (folder.root.parent / "dvc.lock").unlink()
    own = DataLineage.of_folder(folder)
    assert (own.contents.keys(), own.outputs) == ({"train", "dev", "test"}, {})
    shard = folder.features("tones") / "dev" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    replace(shard, bytes(content))
    changed = DataLineage.of_folder(folder)
    assert changed.digest != own.digest
    assert data_changes(own.to_json(), changed.to_json()) == ["the dev recordings"]


def test_files_that_are_not_those_of_the_lock_are_named(folder: DataFolder) -> None:
    shard = folder.features("tones") / "train" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    replace(shard, bytes(content))
    (folder.manifests("tones") / "extra.jsonl").touch()
    with pytest.raises(UserError, match=r"dvc\.lock: the data differs from it: (.*); `dvc repro`") as raised:
        require_current(folder)
    named = "data/features/tones/train/shard-00000.npy, data/manifests/tones/extra.jsonl"
    assert f"differs from it: {named}; " in str(raised.value)


def test_features_of_other_manifests_are_refused(folder: DataFolder) -> None:
    lock = folder.root.parent / "dvc.lock"
    content = YAML(typ="safe").load(lock.read_text())
    for dependency in content["stages"]["features@tones"]["deps"]:
        if dependency["path"] == "data/manifests/tones":
            dependency["md5"] = "f" * 32 + ".dir"
    with lock.open("w") as file:
        YAML().dump(content, file)
    with pytest.raises(
        UserError, match="features@tones was made of another data/manifests/tones than lies there; `dvc"
    ):
        require_current(folder)


def test_a_dataset_of_other_features_is_refused(folder: DataFolder) -> None:
    """Its dependency is the folder of all corpora's features, of which dvc.lock knows no output."""
    shard = folder.features("tones") / "train" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    replace(shard, bytes(content))
    run([sys.executable, "-m", "dvc", "commit", "--force", "features"], folder.root.parent)
    with pytest.raises(UserError, match="data: dataset was made of another data/features than lies there; `dvc repro"):
        require_current(folder)


def test_where_dvc_cannot_tell_nothing_is_trained(folder: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 255, "", "not a DVC repository")
    monkeypatch.setattr(readiness, "dvc", lambda *_, **__: failed)
    with pytest.raises(UserError, match="DVC cannot tell"):
        require_current(folder)


def test_without_dvc_the_clock_tells(folder: DataFolder, tmp_path: Path) -> None:
    (folder.root.parent / "dvc.lock").unlink()
    require_current(DataFolder(tmp_path / "nothing"))
    index = folder.features("tones") / "dev" / "index.jsonl"
    for path in folder.root.rglob("*.json*"):
        os.utime(path, (1000, 1000))
    require_current(folder)
    os.utime(index, (999, 999))
    with pytest.raises(UserError, match=r"tones/dev/index\.jsonl: is older than .*data/manifests/tones/dev\.jsonl"):
        require_current(folder)


@pytest.mark.usefixtures("tracking_store")
def test_a_training_on_other_data_than_the_lock_names_makes_no_step(folder: DataFolder) -> None:
    project = folder.root.parent
    replace(folder.statistics, folder.statistics.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"differs from it: data/dataset/statistics\.json"):
        train(Config.load(project / "params.yaml"), project, prepare=False)
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    (made,) = (run for run in found if "statistics" in run.data.tags.get("sonosco.error", ""))
    assert made.data.tags["sonosco.state"] == "failed"
    assert "train_loss" not in made.data.metrics


@pytest.mark.usefixtures("tracking_store")
def test_a_training_that_reads_recordings_makes_no_step_on_changed_ones(tmp_path: Path) -> None:
    """They lie outside of what DVC versions, and their digests in it."""
    project, tones = make_project(tmp_path / "project"), tmp_path / "tones"
    move_corpus(project, tones)
    config = Config.load(project / "params.yaml", {"augment.speeds": "[0.9, 1.0]"})
    folder = prepare_data(config, project)
    require_recordings(folder)
    change_a_sample(tones / "tone-005.wav")
    (tones / "tone-007.wav").unlink()
    with pytest.raises(UserError, match=r"tones/tone-005.wav, \S*tones/tone-007.wav; put them back"):
        train(config, project, prepare=False)
