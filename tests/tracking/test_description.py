"""What a run says of itself, in the UI and in the terminal."""

from functools import partialmethod
from pathlib import Path

import mlflow
import pytest

from experiments import go_on, new_project, run_experiment, toy_trainer, vanish
from sonosco_mlflow import overview
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.tracking.description import RunLine, describe_run, list_trainings
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.store import find_run
from sonosco_mlflow.training.callbacks import Callback
from sonosco_mlflow.training.trainer import ModelTrainer

pytestmark = pytest.mark.usefixtures("tracking_store")


class Fails(Callback):
    def on_step_end(self, trainer: ModelTrainer) -> None:
        raise ValueError("no luck")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return new_project(folder)


def note(run_id: str) -> str:
    return str(mlflow.get_run(run_id).data.tags["mlflow.note.content"])


def test_a_finished_run_says_what_it_is_and_how_to_make_it_again(tone_manifest: Manifest, project: Path) -> None:
    run_id = run_experiment(toy_trainer(tone_manifest), project).run.id
    said = note(run_id)
    assert f"**toy-{run_id[:6]}** is finished" in said
    assert "kept up to step 12" in said
    assert "- recipe: size 1" in said
    assert "- code: commit none with uncommitted changes" in said
    metrics = mlflow.get_run(run_id).data.metrics
    assert f"| test_word_error_rate | {metrics['test_word_error_rate']:.4g} |" in said
    assert "| train | 20 |" in said
    assert f"sonosco reproduce {run_id}" in said
    assert f'Experiment.resume("{run_id}")    # in the program that began it, with more epochs' in said
    assert "sonosco resume" not in said
    assert "seconds" not in said
    assert ", took 0:0" in said
    assert describe_run(find_run(run_id)) == said


def test_a_run_that_was_continued_with_a_change_says_so(tone_manifest: Manifest, project: Path) -> None:
    run_id = run_experiment(toy_trainer(tone_manifest, stop_at=5), project).run.id
    said = note(run_id)
    assert "is interrupted" in said
    assert "kept up to step 5" in said
    assert f'Experiment.resume("{run_id}")    # in the program that began it, should it not' in said
    go_on(run_id, toy_trainer(tone_manifest), project, config={"size": 2}, allowed_changes=["config"])
    assert "in 2 segments (changed: config)" in note(run_id)


def test_a_failure_is_told(tone_manifest: Manifest, project: Path) -> None:
    trainer = toy_trainer(tone_manifest, Fails())
    with pytest.raises(ValueError, match="no luck"):
        run_experiment(trainer, project)
    line = list_trainings()[0]
    assert line.state == "failed"
    assert "is failed" in note(line.run_id)
    assert "Error: ValueError: no luck" in note(line.run_id)


def test_a_description_that_fails_keeps_no_run_from_its_end(
    tone_manifest: Manifest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment.create({"size": 1}, project=project, name="toy")
    experiment.setup_model_trainer(toy_trainer(tone_manifest))

    def refuse(run: object) -> str:
        raise mlflow.exceptions.MlflowException("away")

    monkeypatch.setattr("sonosco_mlflow.tracking.open_run.describe_run", refuse)
    monkeypatch.setattr(experiment.run, "close_ledger", lambda: refuse(None))
    experiment.start()
    run = find_run(experiment.run.id)
    assert (run.info.status, RunLine.of(run).state) == ("FINISHED", "finished")


def test_a_run_whose_process_is_gone_is_seen_to_have_vanished(
    tone_manifest: Manifest, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = Experiment.create({"size": 1}, project=project, name="toy")
    trainer = toy_trainer(tone_manifest)
    experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    run_id = experiment.run.id
    assert RunLine.of(find_run(run_id)).state == "running"
    assert "is running" in note(run_id)
    assert "| train | 20 |" in note(run_id)
    vanish(experiment)
    overview.show_run(run_id, project)
    said = capsys.readouterr().out
    assert "is vanished" in said
    assert "showed life last at 20" in said
    assert f'Experiment.resume("{run_id}")' in said
    overview.show_runs(project)
    (row,) = [row for row in capsys.readouterr().out.splitlines() if run_id in row]
    assert row.split()[:3] == [run_id, f"toy-{run_id[:6]}", "vanished"]


def test_the_list_has_all_runs_however_many_the_store_gives_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {line.run_id for line in list_trainings()}
    made = set()
    for _ in range(5):
        with TrackedRun.open("Default", "train") as run:
            made.add(run.id)
    few = partialmethod(mlflow.MlflowClient.search_runs, max_results=2)
    monkeypatch.setattr(mlflow.MlflowClient, "search_runs", few)
    assert {line.run_id for line in list_trainings()} == before | made


@pytest.mark.parametrize("width", [None, 80])
def test_a_name_is_shown_as_it_is_and_an_id_whole(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int | None
) -> None:
    name = f"a [/x] b [red] {'c' * (10 if width else 300)}"
    with TrackedRun.open("Default", "train", name) as run:
        pass
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    overview.show_runs(project)
    said = capsys.readouterr().out
    assert run.id in said
    assert "[/x]" in said
    assert width or name in said


def test_an_evaluation_is_not_offered_to_be_continued() -> None:
    with TrackedRun.open("Default", "evaluate") as run:
        pass
    said = describe_run(find_run(run.id))
    assert "is finished" in said
    assert "sonosco" not in said


def test_what_is_no_run_is_said(project: Path) -> None:
    with pytest.raises(UserError, match="run 'nonsense' is not in the tracking store"):
        overview.show_run("nonsense", project)


def test_an_empty_store_says_how_to_fill_it(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    overview.show_runs(tmp_path)
    assert capsys.readouterr().out.startswith("no run yet: `make train`")
