"""One thing is changed, as small as it can be, and `diff` and `reproduce` name that and nothing else."""

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML
from uv import find_uv_bin

from project import REPOSITORY, Project, make_project, move_corpus, run, with_artifacts
from sonosco_mlflow.data.features import FeatureStore
from toy import change_a_sample

# The quick ones stand in test_difference.py, with runs of a toy.
pytestmark = pytest.mark.slow
SONOSCO = [sys.executable, "-m", "sonosco_mlflow"]
ANOTHER_TQDM = "4.67.1"
DVC = [sys.executable, "-m", "dvc"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Project:
    """A project with one finished run."""
    folder = tmp_path_factory.mktemp("causes")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with_artifacts(folder)
    made = make_project(folder / "project")
    move_corpus(made, folder / "tones")
    project = Project(made, folder / "mlflow.db")
    project.run([*SONOSCO, "train"])
    return project


@pytest.fixture
def copy(world: Project, tmp_path: Path) -> Iterator[Project]:
    """The project and its corpus, to be changed, where they lie; afterwards they are as they were."""
    for folder in (world.folder, world.folder.parent / "tones"):
        shutil.copytree(folder, tmp_path / folder.name, symlinks=True)
    yield world
    for folder in (world.folder, world.folder.parent / "tones"):
        shutil.rmtree(folder)
        (tmp_path / folder.name).rename(folder)


def original(project: Project) -> str:
    return str(project.trainings()[0].info.run_id)


def newest(project: Project) -> str:
    return str(project.trainings()[-1].info.run_id)


def reproduce(project: Project, status: int = 0) -> dict[str, Any]:
    """Make the run again, and return the certificate."""
    project.run([*SONOSCO, "reproduce", original(project), "--env-manager", "local"], status)
    return certificate(project)


def certificate(project: Project) -> dict[str, Any]:
    """Return the certificate of the newest reproduction."""
    path = project.client.download_artifacts(newest(project), "reproduction/certificate.json")
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


def causes(project: Project, other: str) -> list[str]:
    """Return the lines of `diff` that name what differs in the inputs."""
    said = project.run([*SONOSCO, "diff", original(project), other])
    return [line.strip() for line in said.splitlines() if line.startswith("  ")]


def cached_features(project: Project) -> dict[str, Path]:
    """Return the files in DVC's cache with the features that lie in the project, by their paths; "" is their list."""
    lock = YAML(typ="safe").load((project.folder / "dvc.lock").read_text())
    (output,) = lock["stages"]["features@tones"]["outs"]
    cache = project.folder / ".dvc" / "cache" / "files" / "md5"

    def place(digest: str) -> Path:
        return cache / digest[:2] / digest[2:]

    files = {entry["relpath"]: place(entry["md5"]) for entry in json.loads(place(output["md5"]).read_text())}
    return {"": place(output["md5"]), **files}


def test_a_sample_of_a_recording(copy: Project) -> None:
    recording = copy.folder.parent / "tones" / "tone-005.wav"
    features = cached_features(copy)
    change_a_sample(recording)
    copy.run([*SONOSCO, "train"])
    assert causes(copy, newest(copy)) == [
        f"recording {recording}: other bytes",
        "data/features/tones/train/shard-00000.npy: the features of utterance tone-005 differ",
        "data/dataset/statistics.json: other bytes",
    ]
    # While DVC has the run's data, that is what it is made from again.
    assert reproduce(copy)["bit_identical"] is True
    for path in features.values():
        path.unlink(missing_ok=True)
    found = reproduce(copy, status=1)
    assert found["bit_identical"] is False
    assert found["differing_inputs"].keys() == {"data"}
    assert found["differing_inputs"]["data"].split(", ")[0] == f"recording {recording}: other bytes"


def test_a_byte_of_a_feature_shard(copy: Project) -> None:
    shard = "train/shard-00000.npy"
    cached = cached_features(copy)[shard]
    path = copy.folder / "data" / "features" / "tones" / shard
    content = np.load(path)
    content[-1, 0] = np.nextafter(content[-1, 0], np.float32(9.0), dtype=np.float32)
    np.save(path, content)
    run([*DVC, "commit", "--force", "features", "dataset"], copy.folder)
    copy.run([*SONOSCO, "train", "--no-prepare"])
    last = FeatureStore(path.parent).ids[-1]
    assert causes(copy, newest(copy)) == [f"data/features/tones/{shard}: the features of utterance {last} differ"]
    found = reproduce(copy)
    assert (found["bit_identical"], found["differing_inputs"]) == (True, {}), "by digest, not what lies there now"

    whole = cached.read_bytes()
    cached.chmod(0o644)
    cached.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = copy.run([*SONOSCO, "reproduce", original(copy), "--env-manager", "local"], 1)
    assert f"features/tones/{shard}: DVC's cache has other bytes than it says, in {cached}; delete that file" in said
    cached.unlink()
    found = reproduce(copy)
    assert (found["bit_identical"], found["differing_inputs"]) == (True, {}), "made again"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An interpreter with this environment's distributions, one of them in another release."""
    pins = (REPOSITORY / "requirements.txt").read_text()
    (tmp_path / "requirements.txt").write_text(pins.replace(f"tqdm=={version('tqdm')}", f"tqdm=={ANOTHER_TQDM}"))
    uv, python = find_uv_bin(), tmp_path / "environment" / "bin" / "python"
    run([uv, "venv", "--quiet", "--python", sys.executable, "environment"], tmp_path)
    run([uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), "-r", "requirements.txt"], tmp_path)
    return python


def test_a_distribution_of_another_version(world: Project, elsewhere: Path) -> None:
    command = [str(elsewhere), *SONOSCO[1:], "reproduce", original(world), "--env-manager", "local"]
    said = world.run([*command, "--until-step", "1"])
    change = f"tqdm {version('tqdm')} -> {ANOTHER_TQDM}"
    assert "**bit-identical**" in said
    assert certificate(world)["differing_inputs"] == {"environment": change}
    assert causes(world, newest(world)) == [change]
