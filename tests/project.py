"""A whole project in a folder of its own: the repository's files, a corpus of tones, a model that learns it fast."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import mlflow
import psutil
from mlflow.entities import Run
from ruamel.yaml import YAML

from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder, make_corpus, make_dataset, make_features, make_manifests
from toy import tone_corpus, tone_texts

PATIENCE = 240.0
REPOSITORY = Path(__file__).parents[1]
DATA_STAGES = ("corpus", "manifests", "features", "dataset")
FILES = ("MLproject", "python_env.yaml", "dvc.yaml", ".dvcignore", ".gitignore", "requirements.txt")
RECIPE = {
    "data": {"corpora": {"tones": {"kind": "folder", "source": "tones", "parts": {}}}, "frames_per_batch": 400},
    "features": {"n_mels": 8},
    "model": {
        "name": "deepspeech2",
        "preset": "small",
        "settings": {"channels": [2, 2], "hidden_size": 8, "recurrent_layers": 1},
    },
    "training": {"epochs": 1, "threads": 1},
}


def make_project(folder: Path, utterances: int = 30) -> Path:
    """Write the project into ``folder`` and commit it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "src", ".dvc", *FILES]
    listed = run(command, REPOSITORY).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    for utterance in tone_corpus(folder / "tones", tone_texts(utterances)):
        (folder / "tones" / f"{utterance.id}.txt").write_text(utterance.text)
    recipe = YAML(typ="safe").load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    for section, keys in RECIPE.items():
        recipe[section].update(keys)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(recipe, file)
    stages = YAML().load((folder / "dvc.yaml").read_text(encoding="utf-8"))
    stages["stages"]["corpus"]["do"]["deps"].append("${item.source}")
    with (folder / "dvc.yaml").open("w") as file:
        YAML().dump(stages, file)
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "first"]):
        run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], folder)
    return folder


def make_data(project: Path) -> Path:
    """Bring the project's data, as its stages do, in this process; return the project."""
    config, data = Config.load(project / "params.yaml"), DataFolder(project / "data")
    # Paths of a recipe start from the current folder.
    with contextlib.chdir(project):
        for name in config.data.corpora:
            make_corpus(config, name, data)
        make_after_corpus(config, data)
    return project


def make_after_corpus(config: Config, data: DataFolder) -> None:
    """Make of corpora that lie there what training needs, as the stages do, in this process."""
    for name in config.data.corpora:
        make_manifests(config, name, data)
        make_features(config, name, data)
    make_dataset(config, data)


def move_corpus(project: Path, folder: Path) -> None:
    """Let the project's corpus lie in ``folder``: it is no part of the repository, whose snapshot would keep it."""
    (project / "tones").rename(folder)
    text = (project / "params.yaml").read_text()
    assert "source: tones" in text
    (project / "params.yaml").write_text(text.replace("source: tones", f"source: {folder}"))


def run(
    command: list[str], folder: Path, *, status: int = 0, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``folder`` with this interpreter first on PATH, and require its exit status."""
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment(variables),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == status, f"{command} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of a process of this interpreter's, without those that would lead it elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "PYTHONPATH"))}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, **(variables or {})}


class Project:
    """A project in which runs are begun, killed and continued; its store lies outside it."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder = folder
        self.variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{store}", "PYTHONPATH": str(folder / "src")}
        self.client = mlflow.MlflowClient(self.variables["MLFLOW_TRACKING_URI"])

    def runs(self) -> list[Run]:
        return sorted(self.client.search_runs(["0"]), key=lambda item: int(item.info.start_time))

    def trainings(self) -> list[Run]:
        return [item for item in self.runs() if item.data.tags.get("sonosco.kind") == "train"]

    def run(self, command: list[str], status: int = 0) -> str:
        result = run(command, self.folder, status=status, variables=self.variables)
        return result.stdout + result.stderr

    def begin(self, command: list[str], segment: int = 1) -> "subprocess.Popen[bytes]":
        """Start ``command``, and return when the training that it begins, or continues, has a new checkpoint in MLflow.

        Args:
            command: what starts the training.
            segment: of the run; above 1 the newest training is continued.
        """
        known = {item.info.run_id: item.data.tags.get("sonosco.checkpoint", "") for item in self.trainings()}
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment(self.variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            for item in self.trainings():
                checkpoint = item.data.tags.get("sonosco.checkpoint", "")
                before = known.get(item.info.run_id, "checkpoints/step-00000000")
                if item.data.tags.get("sonosco.segments", "1") == str(segment) and checkpoint > before:
                    return process
            time.sleep(0.05)
        process.kill()
        raise AssertionError("the training did not come to its first checkpoint")

    def begin_and_kill(self, command: list[str]) -> Run:
        """Start ``command``, and kill it with all that it started; return the run that is left."""
        process = self.begin(command)
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.wait()
        left = self.trainings()[-1]
        assert (left.info.status, left.data.tags["sonosco.state"]) == ("RUNNING", "running")
        return left

    def history(self, run_id: str, name: str) -> list[tuple[int, str]]:
        return [(item.step, item.value.hex()) for item in self.client.get_metric_history(run_id, name)]

    def assert_equal(self, found: str, expected: str) -> None:
        """Demand that run ``found`` came to the end of run ``expected``, bit for bit."""
        one, other = self.client.get_run(found), self.client.get_run(expected)
        assert (one.info.status, one.data.tags["sonosco.state"]) == ("FINISHED", "finished")
        assert one.data.tags["sonosco.segments"] == "2"
        assert one.data.tags["sonosco.weights_digest"] == other.data.tags["sonosco.weights_digest"]
        for name in ("train_loss", "val_loss", "val_word_error_rate", "test_loss"):
            assert self.history(found, name) == self.history(expected, name), name


def with_artifacts(folder: Path, location: str | None = None) -> None:
    """Let artifacts lie at ``location``; by default beside the store, outside every project."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("UPDATE experiments SET artifact_location = ?", [location or str(folder / "artifacts")])
    database.close()
