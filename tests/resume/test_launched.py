"""Killed with its launcher, `mlflow run` or `dvc repro`, and continued by it: in the same run, and no other is left."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from project import DATA_STAGES, Project, make_project, move_corpus, run, with_artifacts

MLFLOW = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local"]
DVC = [sys.executable, "-m", "dvc"]
SONOSCO = [sys.executable, "-m", "sonosco_mlflow"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A project with its data, and with one undisturbed run in the store beside it."""
    folder = tmp_path_factory.mktemp("launched")
    project = make_project(folder / "project")
    # A clone has what was made of the recordings from DVC's remote, or makes it again.
    move_corpus(project, folder / "tones")
    recipe = YAML().load((project / "params.yaml").read_text())
    recipe["training"]["epochs"] = 4
    recipe["checkpoint"]["every_steps"] = 1
    with (project / "params.yaml").open("w") as file:
        YAML().dump(recipe, file)
    run([*DVC, "remote", "add", "--default", "kept", str(folder / "remote")], project)
    run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--all", "-m", "recipe"], project)
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with_artifacts(folder)
    Project(project, folder / "mlflow.db").run([*SONOSCO, "train"])
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Project:
    """The project with a store of its own: what one test has killed is not to be continued by another."""
    shutil.copy(template / "mlflow.db", tmp_path)
    return Project(template / "project", tmp_path / "mlflow.db")


def by_parameter(run_id: str) -> list[str]:
    return [*MLFLOW, "-e", "resume", "-P", f"run_id={run_id}"]


def by_option(run_id: str) -> list[str]:
    return [*MLFLOW, "-e", "resume", "--run-id", run_id]


@pytest.mark.parametrize(
    ("resume", "segments"), [(by_parameter, 1), pytest.param(by_option, 0, marks=pytest.mark.slow)]
)
def test_mlflow_run_continues_the_run_and_leaves_no_orphan(
    resume: Callable[[str], list[str]], segments: int, project: Project
) -> None:
    expected = project.trainings()[0].info.run_id
    killed = project.begin_and_kill(MLFLOW).info.run_id
    before = {item.info.run_id for item in project.runs()}
    project.run(resume(killed))
    project.assert_equal(killed, expected)
    added = [item for item in project.runs() if item.info.run_id not in before]
    assert len(added) == segments
    for item in added:
        assert item.data.tags["mlflow.parentRunId"] == killed
        assert (item.info.status, item.data.tags["sonosco.kind"]) == ("FINISHED", "segment")
        assert not item.data.metrics


@pytest.mark.slow
def test_a_launched_resume_that_is_refused_says_so_and_leaves_the_run_as_it_was(project: Project) -> None:
    killed = project.begin_and_kill(MLFLOW)
    said = project.run([*by_parameter(killed.info.run_id), "-P", "optimizer.lr=0.5"], status=1)
    assert "optimizer.lr was 0.002, is 0.5" in said
    assert "Traceback" not in said
    segment = project.runs()[-1]
    assert segment.data.tags["mlflow.parentRunId"] == killed.info.run_id
    assert (segment.info.status, segment.data.tags["sonosco.state"]) == ("FAILED", "failed")
    left = project.client.get_run(killed.info.run_id)
    assert (left.info.status, left.data.tags["sonosco.state"]) == ("RUNNING", "running")


@pytest.mark.slow
def test_dvc_repro_continues_the_run_that_its_stage_had_begun(project: Project) -> None:
    expected = project.trainings()[0].info.run_id
    killed = project.begin_and_kill([*DVC, "repro"]).info.run_id
    count = len(project.trainings())
    said = project.run([*DVC, "repro"])
    assert f"continuing run {killed}" in said
    project.assert_equal(killed, expected)
    assert len(project.trainings()) == count
    results = project.folder / "results" / "train"
    assert json.loads((results / "mlflow_run.json").read_text()) == {"run_id": killed}
    rows = (results / "steps.csv").read_text().splitlines()
    assert len(rows) == len(project.history(killed, "train_loss")) + 1


@pytest.mark.slow
def test_where_dvc_alone_is_killed_its_training_lives_and_no_second_one_begins(project: Project) -> None:
    shutil.rmtree(project.folder / "results", ignore_errors=True)
    process = project.begin([*DVC, "repro", "--force", "--single-item", "train"])
    trainer = next(
        child for child in psutil.Process(process.pid).children(recursive=True) if "sonosco_mlflow" in child.cmdline()
    )
    process.kill()
    process.wait()
    trainer.suspend()
    alive = project.trainings()[-1].info.run_id
    try:
        said = project.run([*SONOSCO, "resume", alive], status=1)
    finally:
        trainer.resume()
    assert f"run {alive} is being trained by process {trainer.pid}" in said
    trainer.wait(240)
    assert project.client.get_run(alive).data.tags["sonosco.state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("is_pushed", [True, False], ids=["remote", "made again"])
def test_another_clone_on_an_empty_disk_needs_only_the_store_and_the_remote(
    project: Project, tmp_path: Path, is_pushed: bool
) -> None:
    expected = project.trainings()[0].info.run_id
    killed = project.begin_and_kill([*SONOSCO, "train"]).info.run_id
    clone = tmp_path / "elsewhere"
    run(["git", "clone", "--quiet", str(project.folder), str(clone)], tmp_path)
    place = project.folder.parent
    if is_pushed:
        project.run([*DVC, "push", *DATA_STAGES])
        (place / "tones").rename(place / "away")
    else:
        shutil.rmtree(place / "remote", ignore_errors=True)
    elsewhere = Project(clone, Path(project.variables["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")))
    try:
        elsewhere.run([*SONOSCO, "resume", killed])
    finally:
        if is_pushed:
            (place / "away").rename(place / "tones")
    project.assert_equal(killed, expected)
