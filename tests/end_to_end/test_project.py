"""The project as people launch it: by MLflow and by DVC, in processes of their own."""

import json
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from project import make_project, run

MLFLOW = [sys.executable, "-m", "mlflow", "run"]
DVC = [sys.executable, "-m", "dvc"]
LOCAL = ["--env-manager", "local"]


def new_project(folder: Path, database: Path) -> Path:
    """Make a project whose store exists already: making its tables takes seconds."""
    project = make_project(folder)
    (project / "mlflow.db").write_bytes(database.read_bytes())
    return project


def runs_of(project: Path) -> list[Run]:
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    return sorted(client.search_runs(["0"]), key=lambda item: int(item.info.start_time))


def runs_before_and_after(project: Path, command: list[str], status: int = 0) -> list[Run]:
    """Run ``command`` and return the runs that it added."""
    before = {item.info.run_id for item in runs_of(project)}
    run(command, project, status=status)
    return [item for item in runs_of(project) if item.info.run_id not in before]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    return new_project(tmp_path_factory.mktemp("launched") / "project", empty_database)


@pytest.fixture(scope="module")
def trained(project: Path) -> Run:
    """The run of one `mlflow run .`, with keys of the recipe changed by -P."""
    data = runs_before_and_after(project, [*MLFLOW, ".", *LOCAL, "-e", "data"])
    command = [*MLFLOW, ".", *LOCAL, "-P", "model=deepspeech2", "-P", "optimizer.lr=3e-4", "-P", "training.epochs=2"]
    (launched,) = runs_before_and_after(project, command)
    assert [item.data.tags["sonosco.kind"] for item in data] == ["data"]
    return launched


def test_mlflow_run_trains_in_the_run_that_it_made(trained: Run) -> None:
    assert trained.info.status == "FINISHED"
    tags, params = trained.data.tags, trained.data.params
    assert tags["sonosco.state"] == "finished"
    assert tags["mlflow.project.entryPoint"] == "main"
    assert params["config.optimizer.lr"] == "0.0003"
    assert params["config.training.epochs"] == "2"
    assert params["optimizer.lr"] == "3e-4"
    assert {"test_word_error_rate", "test_character_error_rate", "val_loss"} <= trained.data.metrics.keys()
    assert {"sonosco.code_digest", "sonosco.commit", "sonosco.config_digest", "sonosco.data_digest"} <= tags.keys()
    assert tags["sonosco.commit"] == tags["mlflow.source.git.commit"]
    assert tags["sonosco.dirty"] == "false"


def test_the_runs_of_data_and_evaluation_belong_to_the_training(project: Path, trained: Run) -> None:
    data = next(item for item in runs_of(project) if item.data.tags["sonosco.kind"] == "data")
    assert data.info.status == "FINISHED"
    assert data.data.tags["mlflow.parentRunId"] == trained.info.run_id
    assert data.data.tags["sonosco.data_digest"] == trained.data.tags["sonosco.data_digest"]

    command = [*MLFLOW, ".", *LOCAL, "-e", "evaluate", "-P", f"run_id={trained.info.run_id}"]
    (evaluated,) = runs_before_and_after(project, command)
    assert evaluated.info.status == "FINISHED"
    assert evaluated.data.tags["mlflow.parentRunId"] == trained.info.run_id
    assert evaluated.data.tags["sonosco.reproduced"] == "true"
    assert evaluated.data.metrics["test_loss"] == trained.data.metrics["test_loss"]


def test_a_wrong_key_fails_the_run_with_its_message(project: Path, trained: Run) -> None:
    before = len(runs_of(project))
    result = run([*MLFLOW, ".", *LOCAL, "-P", "optimzer.lr=1"], project, status=1)
    assert "Traceback" not in result.stdout + result.stderr
    assert "optimzer.lr: unknown key; did you mean 'optimizer.lr'?" in result.stderr
    failed = runs_of(project)[-1]
    assert len(runs_of(project)) == before + 1
    assert failed.info.status == "FAILED"
    assert failed.data.tags["sonosco.error"] == "optimzer.lr: unknown key; did you mean 'optimizer.lr'?"


def test_an_edited_source_is_what_runs(project: Path, trained: Run) -> None:
    source = project / "src" / "sonosco_mlflow" / "errors.py"
    before = source.read_text()
    source.write_text(before + "\nraise SystemExit('the edited code ran')\n")
    try:
        result = run([*MLFLOW, ".", *LOCAL], project, status=1)
    finally:
        source.write_text(before)
    assert "the edited code ran" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("manager", ["uv", "virtualenv"])
def test_an_edited_source_is_what_runs_in_an_environment_of_mlflows(project: Path, trained: Run, manager: str) -> None:
    source = project / "src" / "sonosco_mlflow" / "errors.py"
    before = source.read_text()
    for number in range(2):
        source.write_text(f"{before}\nraise SystemExit('edition {number} ran')\n")
        try:
            result = run([*MLFLOW, ".", "--env-manager", manager], project, status=1)
        finally:
            source.write_text(before)
        assert f"edition {number} ran" in result.stderr


@pytest.mark.slow
def test_a_git_address_is_cloned_and_run(project: Path, trained: Run) -> None:
    # MLflow runs an existing path in place; a letter in its percent form makes it clone the address.
    address = f"file://{project.parent}/p%72oject"
    command = [*MLFLOW, address, *LOCAL, "-P", f"data.source={project / 'tones'}"]
    (cloned,) = runs_before_and_after(project, command)
    assert cloned.info.status == "FINISHED"
    assert cloned.data.tags["sonosco.weights_digest"] != trained.data.tags["sonosco.weights_digest"]
    assert cloned.data.tags["mlflow.source.git.commit"] == trained.data.tags["sonosco.commit"]


@pytest.mark.slow
def test_dvc_runs_what_changed_and_brings_old_runs_back(tmp_path: Path, empty_database: Path) -> None:
    project = new_project(tmp_path / "project", empty_database)
    run_file = project / "results" / "train" / "mlflow_run.json"
    params = (project / "params.yaml").read_text()

    run([*DVC, "repro"], project)
    first = json.loads(run_file.read_text())["run_id"]
    assert run([*DVC, "repro"], project).stdout.count("didn't change, skipping") == 5
    assert [item.data.tags["sonosco.kind"] for item in runs_of(project)] == ["train", "evaluate"]
    trained, evaluated = runs_of(project)
    assert evaluated.data.tags["mlflow.parentRunId"] == trained.info.run_id == first
    assert evaluated.data.tags["sonosco.reproduced"] == "true"
    assert "val_word_error_rate" in run([*DVC, "metrics", "show"], project).stdout
    assert run([*DVC, "plots", "show"], project).stdout.strip().endswith(".html")

    (project / "params.yaml").write_text(params.replace("lr: 0.002", "lr: 0.003"))
    assert "optimizer.lr" in run([*DVC, "params", "diff"], project).stdout
    second_output = run([*DVC, "repro"], project).stdout
    assert second_output.count("didn't change, skipping") == 3
    second = json.loads(run_file.read_text())["run_id"]
    assert second != first

    (project / "params.yaml").write_text(params)
    run([*DVC, "repro"], project)
    assert json.loads(run_file.read_text())["run_id"] == first
    assert len([item for item in runs_of(project) if item.data.tags["sonosco.kind"] == "train"]) == 2

    (project / "params.yaml").write_text(params.replace("n_mels: 8", "n_mels: 6"))
    status = run([*DVC, "status"], project).stdout
    assert "features:" in status
    assert "manifests:" not in status
    (project / "params.yaml").write_text(params)

    run(["git", "add", "--all"], project)
    run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "results"], project)
    run([*DVC, "exp", "run", "-S", "optimizer.lr=1e-3"], project)
    third = json.loads(run_file.read_text())["run_id"]
    found = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}").get_run(third)
    assert found.data.params["config.optimizer.lr"] == "0.001"
