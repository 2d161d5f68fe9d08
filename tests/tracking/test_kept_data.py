"""The data of runs as DVC keeps it: what differs is named down to the utterance."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from project import make_project, run
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.changes import lineage_changes
from sonosco_mlflow.tracking.data_lock import lock_text, stage_outputs
from sonosco_mlflow.tracking.kept_data import KeptData, kept_data_changes
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.pipeline import prepare_data
from toy import change_a_sample

DVC = ["python", "-m", "dvc"]


class Versions:
    """Several versions of one project's data, each with the ``dvc.lock`` that a run on it would have kept."""

    def __init__(self, folder: Path) -> None:
        self.project = make_project(folder / "project")
        # Another recipe than the project's own: its workspace knows the recordings as an input.
        self.config = Config.resolve(Config.load(self.project / "params.yaml").model_dump(), {"features.n_mels": "9"})
        self.locks: dict[str, str] = {}
        self.lineages: dict[str, str] = {}

    def make(self, name: str) -> DataFolder:
        folder = prepare_data(self.config, self.project)
        self.note(name, folder)
        return folder

    def note(self, name: str, folder: DataFolder) -> None:
        lock = lock_text(folder)
        assert lock is not None
        self.locks[name] = lock
        self.lineages[name] = DataLineage.of_folder(folder).to_json()

    def changes(self, one: str, other: str, scratch: Path) -> list[str]:
        sides = [KeptData(self.locks[name], self.project, scratch / name) for name in (one, other)]
        return kept_data_changes(*sides)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    made = Versions(tmp_path_factory.mktemp("versions"))
    folder = made.make("first")
    shard = folder.features("tones") / "train" / "shard-00000.npy"
    content = np.load(shard)
    content[-1, 0] = np.nextafter(content[-1, 0], np.float32(9.0), dtype=np.float32)
    np.save(shard, content)
    run([*DVC, "commit", "--force", *stage_outputs(folder)], folder.root.parent)
    made.note("a byte of a feature", folder)
    tones = made.project / "tones"
    change_a_sample(tones / "tone-005.wav")
    (tones / "tone-004.txt").write_text("ABBA")
    (tones / "tone-000.wav").unlink()
    (tones / "tone-000.txt").unlink()
    shutil.copyfile(tones / "tone-001.wav", tones / "tone-900.wav")
    (tones / "tone-900.txt").write_text("ACE")
    made.make("recordings")
    return made


def test_equal_data_differs_in_nothing(versions: Versions, tmp_path: Path) -> None:
    one, other = (KeptData(versions.locks["first"], versions.project, tmp_path / name) for name in "ab")
    assert kept_data_changes(one, other) == []
    assert {"data/dataset/train.jsonl", "data/features/tones/train/shard-00000.npy"} <= one.digests.keys()


def test_one_byte_of_a_feature_is_found_with_its_utterance(versions: Versions, tmp_path: Path) -> None:
    kept = KeptData(versions.locks["first"], versions.project, tmp_path / "x")
    store = kept.features("data/features/tones/train", ["shard-00000.npy"])
    assert versions.changes("first", "a byte of a feature", tmp_path) == [
        f"data/features/tones/train/shard-00000.npy: the features of utterance {store.ids[-1]} differ"
    ]


def test_recordings_and_transcripts_that_changed_are_named(versions: Versions, tmp_path: Path) -> None:
    found = versions.changes("first", "recordings", tmp_path)
    tones = versions.project / "tones"
    assert found[0] == f"recording {tones / 'tone-005.wav'}: other bytes"
    assert {
        "train: utterance tone-000 was removed",
        "train: utterance tone-900 was added",
    } <= {line.replace("dev:", "train:").replace("test:", "train:") for line in found}
    assert any(line.startswith("train: utterance tone-004: text was ") and line.endswith("is 'ABBA'") for line in found)
    assert "data/features/tones/train/shard-00000.npy: the features of utterance tone-005 differ" in found
    assert not any("tone-002" in line or "audio.sha256" in line for line in found)


def test_what_dvc_has_lost_is_told_by_the_digests(versions: Versions, tmp_path: Path) -> None:
    cache = versions.project / ".dvc" / "cache"
    sides = [(versions.lineages[name], versions.locks[name]) for name in ("first", "a byte of a feature")]
    cache.rename(tmp_path / "cache")
    try:
        kept = KeptData(versions.locks["first"], versions.project, tmp_path / "kept")
        with pytest.raises(UserError, match=r"data/dataset/train\.jsonl is neither in DVC's cache nor in a remote"):
            kept.read("data/dataset/train.jsonl")
        assert lineage_changes(sides[0], sides[1], versions.project) == ["data/features/tones of DVC"]
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        (tmp_path / "cache").rename(cache)


def test_without_a_lock_the_manifests_digests_tell(versions: Versions) -> None:
    one, other = versions.lineages["first"], versions.lineages["recordings"]
    found = lineage_changes((one, None), (other, None), versions.project)
    assert any(line.startswith("the train manifest (") for line in found)
    assert "data/features/tones of DVC" in found
