"""Runs with artifacts behind a server or in an object store, and data in one, are continued and made again.

Nothing of the first clone is left each time: what goes on has the store, DVC's remote and the code.
"""

import shutil
import sys
from pathlib import Path

import mlflow
import pytest

from project import DATA_STAGES, Project, make_project, run, with_artifacts
from servers import ObjectStore, TrackingServer

SONOSCO = [sys.executable, "-m", "sonosco_mlflow"]
DVC = [sys.executable, "-m", "dvc"]
GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]


def world(folder: Path, object_store: ObjectStore, tracking_uri: str) -> Project:
    """A project whose DVC remote is a bucket."""
    made = make_project(folder / "project")
    run([*DVC, "remote", "add", "--default", "kept", f"s3://kept/{folder.name}/dvc"], made)
    run([*DVC, "remote", "modify", "kept", "endpointurl", object_store.address], made)
    run([*GIT, "commit", "--quiet", "--all", "-m", "remote"], made)
    project = Project(made, folder / "unused.db")
    project.variables |= {**object_store.client_variables(), "MLFLOW_TRACKING_URI": tracking_uri}
    project.client = mlflow.MlflowClient(tracking_uri)
    return project


def continued_by_a_clone(project: Project, folder: Path) -> str:
    """Kill a training, lose its project, and have a fresh clone continue it; return its run."""
    epochs = ["--set", "training.epochs=3"]
    killed = project.begin_and_kill([*SONOSCO, "train", *epochs]).info.run_id
    project.run([*DVC, "push", *DATA_STAGES])
    clone = folder / "clone"
    run(["git", "clone", "--quiet", str(project.folder), str(clone)], folder)
    shutil.rmtree(project.folder)
    project.folder, project.variables["PYTHONPATH"] = clone, str(clone / "src")

    assert "finished" not in project.client.get_run(killed).data.tags["sonosco.state"]
    project.run([*SONOSCO, "resume", killed])
    ended = project.client.get_run(killed)
    assert (ended.info.status, ended.data.tags["sonosco.segments"]) == ("FINISHED", "2")
    for name in ("train_loss", "val_loss"):
        steps = [step for step, _ in project.history(killed, name)]
        assert len(steps) == len({*steps}) > 0
    models = project.client.search_logged_models([ended.info.experiment_id], f"source_run_id = '{killed}'")
    assert {"model"} < {model.name for model in models}
    return killed


def assert_proven(project: Project, run_id: str, *options: str) -> None:
    """Demand that the run verifies and is made again; ``options`` are of ``sonosco reproduce``."""
    assert "all is as recorded" in project.run([*SONOSCO, "verify", run_id])
    said = project.run([*SONOSCO, "reproduce", run_id, "--env-manager", "local", *options])
    assert "**bit-identical**" in said


@pytest.mark.parametrize("is_proven", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_artifacts_behind_a_server_that_keeps_them_in_an_object_store(
    tmp_path: Path, object_store: ObjectStore, empty_database: Path, is_proven: bool
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    with_artifacts(tmp_path, "mlflow-artifacts:/artifacts")
    server = TrackingServer(tmp_path, "s3://kept/proxied", object_store.client_variables())
    server.start()
    try:
        project = world(tmp_path, object_store, server.address)
        continued = continued_by_a_clone(project, tmp_path)
        if is_proven:
            assert_proven(project, continued, "--until-step", "1")
    finally:
        server.kill()
    assert object_store.names("proxied/artifacts")


@pytest.mark.slow
def test_artifacts_in_an_object_store(tmp_path: Path, object_store: ObjectStore, empty_database: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    with_artifacts(tmp_path, "s3://kept/direct")
    project = world(tmp_path, object_store, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert_proven(project, continued_by_a_clone(project, tmp_path))
    assert object_store.names("direct")
