"""A sweep's trainings are runs below one run; what was killed goes on, and nothing is trained twice."""

import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from optuna.distributions import BaseDistribution
from optuna.trial import Trial

from project import Project, make_project, with_artifacts
from sonosco_mlflow import sweep
from sonosco_mlflow.config import Config
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.search_space import Space, combination, draw, read_space
from sonosco_mlflow.sweep import SweepResult
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.tags import STATE

LONGEST_WAIT = 60.0  # only a test that fails waits so long
SONOSCO = [sys.executable, "-m", "sonosco_mlflow"]
SWEEP = [*SONOSCO, "sweep", "--name", "sizes", "--over", "model.settings.hidden_size=4,6"]


# ---------------------------------------------------------------------- two that come at once, and one that is cut off


def begin(folder: Path, space: Space) -> SweepResult:
    return sweep.sweep(Config.resolve({}, {"tracking.experiment": folder.name}), space, folder, name="both", trials=1)


@pytest.mark.usefixtures("tracking_store")
def test_a_trial_that_was_cut_off_while_it_was_noted_is_trained_with_all_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = read_space(["optimizer.lr=0.1..0.9", "training.seed=0..1000000"])
    tried: list[Mapping[str, object]] = []
    monkeypatch.setattr(sweep, "_train", lambda run_id, settings, recipe, project: tried.append(settings))
    with monkeypatch.context() as patch:
        note = Trial._suggest

        def killed(trial: Trial, name: str, distribution: BaseDistribution) -> object:
            if name == "training.seed" and trial.study.study_name == "both":
                raise SystemExit(137)
            return note(trial, name, distribution)

        patch.setattr(Trial, "_suggest", killed)
        with pytest.raises(SystemExit):
            begin(tmp_path, space)
    assert tried == []
    begin(tmp_path, space)
    assert tried == [draw(space, 0, seed=0)]


@pytest.mark.usefixtures("tracking_store")
@pytest.mark.parametrize("trials", [None, 4], ids=["grid", "drawn"])
def test_a_sweep_that_goes_on_tries_the_same_in_whatever_order_its_keys_are_given(
    trials: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dimensions = ["training.seed=1,2", "optimizer.lr=0.1,0.2"]
    tried: list[dict[str, object]] = []
    goes_on = threading.Event()

    def train(run_id: str, settings: dict[str, object], *_: object) -> None:
        if len(tried) == 2 and not goes_on.is_set():
            raise KeyboardInterrupt
        tried.append(settings)
        mlflow.MlflowClient().log_metric(run_id, sweep.OBJECTIVE, 0.25)
        mlflow.MlflowClient().set_tag(run_id, STATE, "finished")

    def begin_with(dimensions: list[str]) -> SweepResult:
        recipe = Config.resolve({}, {"tracking.experiment": tmp_path.name})
        return sweep.sweep(recipe, read_space(dimensions), tmp_path, name="turned", trials=trials)

    monkeypatch.setattr(sweep, "_train", train)
    with pytest.raises(KeyboardInterrupt):
        begin_with(dimensions)
    goes_on.set()
    result = begin_with(dimensions[::-1])
    space = read_space(dimensions)
    expected = [combination(space, n) if trials is None else draw(space, n, seed=0) for n in range(4)]
    assert tried == expected
    assert [trial.settings for trial in result.trials] == expected


@pytest.mark.usefixtures("tracking_store")
def test_a_trial_whose_run_was_deleted_has_its_value_and_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run_id: str, *_: object) -> None:
        mlflow.MlflowClient().log_metric(run_id, sweep.OBJECTIVE, 0.25)
        mlflow.MlflowClient().set_tag(run_id, STATE, "finished")

    monkeypatch.setattr(sweep, "_train", train)
    space = read_space(["training.seed=0..1000000"])
    (trained,) = begin(tmp_path, space).trials
    assert (trained.state, trained.value) == ("finished", 0.25)
    mlflow.delete_run(trained.run_id)
    monkeypatch.setattr(sweep, "_train", lambda *_: pytest.fail("it has been trained"))
    result = begin(tmp_path, space)
    (told,) = result.trials
    assert (told.run_id, told.state, told.value) == (trained.run_id, "deleted", 0.25)
    assert mlflow.search_runs(experiment_names=[tmp_path.name]).run_id.tolist() == [result.run_id]


@pytest.mark.usefixtures("tracking_store")
def test_two_that_begin_a_sweep_of_one_name_at_once_have_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = read_space(["training.seed=0..1000000"])
    training, may_end = threading.Event(), threading.Event()

    def train(*_: object) -> None:
        training.set()
        assert may_end.wait(LONGEST_WAIT)

    opened = TrackedRun.open

    def slowly(*arguments: Any, **options: Any) -> TrackedRun:
        # Both have seen by now that there is no such sweep yet, if they could.
        time.sleep(0.5)
        return opened(*arguments, **options)

    monkeypatch.setattr(sweep, "_train", train)
    monkeypatch.setattr(TrackedRun, "open", slowly)
    with ThreadPoolExecutor(2) as executor:
        both = [executor.submit(begin, tmp_path, space) for _ in range(2)]
        assert training.wait(LONGEST_WAIT)
        refused = next(as_completed(both))
        with pytest.raises(UserError, match="is being trained by"):
            refused.result()
        may_end.set()
        (done,) = [other.result() for other in both if other is not refused]
    experiment = mlflow.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    found = mlflow.MlflowClient().search_runs([experiment.experiment_id], "tags.`sonosco.kind` = 'sweep'")
    assert [run.info.run_id for run in found] == [done.run_id]


@pytest.mark.usefixtures("tracking_store")
def test_another_sweep_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_train", lambda *_: None)
    space = read_space(["training.seed=1,2"])
    begin(tmp_path, space)
    other = Config.resolve({}, {"tracking.experiment": tmp_path.name, "optimizer.lr": "0.1"})
    with pytest.raises(UserError, match="the sweep 'both' was begun with another recipe and objective"):
        sweep.sweep(other, space, tmp_path, name="both", trials=1, objective="val_loss")


@pytest.mark.usefixtures("tracking_store")
def test_a_metric_that_no_training_has_is_refused_before_the_first(tmp_path: Path) -> None:
    config = Config.resolve({}, {"tracking.experiment": tmp_path.name})
    with pytest.raises(UserError, match="--objective val_wer: no recipe's training has it"):
        sweep.sweep(config, read_space(["training.seed=1,2"]), tmp_path, name="new", objective="val_wer")
    assert mlflow.get_experiment_by_name(tmp_path.name) is None


# ---------------------------------------------------------------------- the trainings


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Project:
    folder = tmp_path_factory.mktemp("sweep")
    made = make_project(folder / "project")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with_artifacts(folder)
    return Project(made, folder / "mlflow.db")


@pytest.mark.slow
def test_a_sweep_that_is_killed_finishes_only_what_is_missing(project: Project) -> None:
    first = project.begin(SWEEP)
    # Of the sweep nothing is left; its training goes on for a while.
    children = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    for child in children:
        child.kill()
    (cut_off,) = project.trainings()
    assert cut_off.data.tags["sonosco.state"] == "running"

    said = project.run(SWEEP)
    trainings = project.trainings()
    assert [item.data.params["config.model.settings.hidden_size"] for item in trainings] == ["4", "6"]
    assert trainings[0].info.run_id == cut_off.info.run_id
    assert [item.data.tags.get("sonosco.segments") for item in trainings] == ["2", None]
    assert {item.data.tags["sonosco.state"] for item in trainings} == {"finished"}
    (parent,) = [item for item in project.runs() if item.data.tags["sonosco.kind"] == "sweep"]
    assert {item.data.tags["mlflow.parentRunId"] for item in trainings} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    rates = [item.data.metrics["val_word_error_rate"] for item in trainings]
    assert parent.data.metrics["best_val_word_error_rate"] == min(rates)
    assert all(
        item.info.run_id in said and item.info.run_id in parent.data.tags["mlflow.note.content"] for item in trainings
    )

    count = len(project.runs())
    project.run(SWEEP)
    assert len(project.runs()) == count, "a finished sweep has nothing to do"


@pytest.mark.slow
def test_a_training_of_a_sweep_is_made_again_like_any_other(project: Project) -> None:
    made = project.trainings()[1].info.run_id
    assert "**bit-identical**" in project.run([*SONOSCO, "reproduce", made, "--env-manager", "local"])


@pytest.mark.slow
def test_an_interrupt_lets_the_training_save_its_state(project: Project) -> None:
    command = [
        *SONOSCO,
        "sweep",
        "--name",
        "interrupted",
        "--over",
        "training.seed=1,2",
        "--set",
        "training.epochs=200",
    ]
    process = project.begin(command)
    process.terminate()
    assert process.wait(timeout=120) == 143
    newest = project.trainings()[-1]
    assert newest.data.tags["sonosco.state"] == "interrupted"
