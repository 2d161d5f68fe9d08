"""A token that lies in a project, in its remote's address and in the environment leaves with no part of a run."""

import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from experiments import SETTINGS, new_project, run_experiment, toy_trainer, train
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.runs import bring_data
from sonosco_mlflow.runs import train as train_recipe
from sonosco_mlflow.tracking.code_archive import unpack
from sonosco_mlflow.tracking.store import find_run
from sonosco_mlflow.training.callbacks import Callback
from sonosco_mlflow.training.trainer import ModelTrainer

# Put together: this file is code that the run imports, and so it is among what the run keeps.
TOKENS = {
    "in a file that git ignores not": "tok-untracked-" + "5f1c9a",
    "in a file that git knows, changed since": "tok-tracked-" + "77ab02",
    "in the remote's address": "tok-remote-" + "c0ffee",
    "in a variable": "tok-variable-" + "91d2e3",
    "in a name that says nothing": "hf_" + "k9Zq" * 9,
    "in a file that was committed and is gone": "tok-committed-" + "3e8d17",
    "in an address that is printed": "tok-printed-" + "60b4f2",
    "in the message of a failure": "tok-failure-" + "2d71e6",
}


class Talkative(Callback):
    """Prints what it should not."""

    def on_epoch_end(self, trainer: ModelTrainer, epoch: int) -> None:
        token = TOKENS["in an address that is printed"]
        print(f"with {os.environ['MY_SERVICE_TOKEN']} to https://me:{token}@example.org/api?key={token}")


class Unlucky(Callback):
    """Fails, and says too much of why."""

    def on_step_end(self, trainer: ModelTrainer) -> None:
        token = TOKENS["in the message of a failure"]
        raise RuntimeError(f"with {os.environ['MY_SERVICE_TOKEN']}: https://me:{token}@example.org/api is gone")


def git(project: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=project, check=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    new_project(folder)
    untracked, tracked, remote, variable, plain, gone, *_ = TOKENS.values()
    (folder / "service.env").write_text("TOKEN=before\n")
    (folder / "old.env").write_text(f"TOKEN={gone}\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "first")
    git(folder, "remote", "add", "origin", f"https://user:{remote}@example.org/project.git?access_token={remote}")
    (folder / "service.env").write_text(f"TOKEN={tracked}\n")
    (folder / ".env").write_text(f"TOKEN={untracked}\n")
    (folder / "notes.txt").write_text(f"the one of the hub is {plain}\n")
    (folder / "old.env").unlink()
    (folder / "model.py").write_text("x = 2\n")
    monkeypatch.setenv("MY_SERVICE_TOKEN", variable)
    return folder


def everything(folder: Path, artifacts: Path, database: Path) -> dict[str, bytes]:
    """All that a run left, by where it lies; archives both as they are and unpacked."""
    found = {str(path): path.read_bytes() for root in (folder, artifacts) for path in root.rglob("*") if path.is_file()}
    with sqlite3.connect(database) as store:
        tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found |= {f"{table}": repr(list(store.execute(f"SELECT * FROM {table}"))).encode() for table in tables}
    store.close()
    return found


def artifact_folder(experiment: Experiment) -> Path:
    return Path(find_run(experiment.run.id).info.artifact_uri.removeprefix("file://"))


def assert_nowhere(left: dict[str, bytes]) -> None:
    where = {
        place: [name for name, content in left.items() if token.encode() in content] for place, token in TOKENS.items()
    }
    assert where == {place: [] for place in TOKENS}


def test_a_token_leaves_with_no_part_of_a_run(
    project: Path, tone_manifest: Manifest, tracking_store: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"\.env"):
        experiment = run_experiment(toy_trainer(tone_manifest, Talkative()), project)
    artifacts = artifact_folder(experiment)
    left = everything(experiment.folder, artifacts, Path(tracking_store.removeprefix("sqlite:///")))
    unpacked = tmp_path / "unpacked"
    unpack((artifacts / "code" / "snapshot.zip").read_bytes(), unpacked)
    left |= {str(path): path.read_bytes() for path in unpacked.rglob("*") if path.is_file()}
    assert b"x = 2" in left[str(unpacked / "model.py")], "the snapshot is not what is looked at"
    assert b"x = 2" in left[str(artifacts / "code" / "uncommitted.patch")]
    assert any(b"example.org/project.git" in content for content in left.values())
    assert b"with *** to https://example.org/api\n" in left[str(artifacts / "logs" / "console.log")]
    assert_nowhere(left)
    assert mlflow.get_run(experiment.run.id).info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore:left out of the run's code")
def test_a_failure_is_told_without_tokens(project: Path, tone_manifest: Manifest, tracking_store: str) -> None:
    experiment = Experiment.create(SETTINGS, project=project)
    with pytest.raises(RuntimeError, match="is gone"):
        train(experiment, toy_trainer(tone_manifest, Unlucky()))
    told = "RuntimeError: with ***: https://example.org/api is gone"
    tags = find_run(experiment.run.id).data.tags
    assert tags["sonosco.error"] == told
    assert told in tags["mlflow.note.content"]
    artifacts = artifact_folder(experiment)
    left = everything(experiment.folder, artifacts, Path(tracking_store.removeprefix("sqlite:///")))
    assert told.encode() in left[str(artifacts / "logs" / "console.log")]
    assert_nowhere(left)


@pytest.mark.parametrize(
    "begin",
    [
        lambda config, project: Experiment.create({"url": config.data.corpora["default"].source}, project=project),
        lambda config, project: Experiment.create(config, project=project),
        train_recipe,
        bring_data,
    ],
    ids=["settings of a program's own", "recipe", "train", "data"],
)
def test_settings_with_credentials_open_no_run(
    begin: Callable[[Config, Path], object], project: Path, tracking_store: str
) -> None:
    address = f"https://me:{TOKENS['in the message of a failure']}@example.org/a.tar.gz"
    config = Config.load(Path(__file__).parents[1] / "params.yaml", {"data.source": address})
    before = len(mlflow.search_runs(search_all_experiments=True))
    with pytest.raises(
        UserError, match=r"(url|data\.corpora\.default\.source): found an address with credentials in it"
    ):
        begin(config, project)
    assert len(mlflow.search_runs(search_all_experiments=True)) == before
