import os
from pathlib import Path
from unittest.mock import Mock

import mlflow
import pytest

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.journal import Row
from sonosco_mlflow.tracking.mlflow_run import TrackedRun, connect, download, find_run, mark_launched_run_failed

pytestmark = pytest.mark.usefixtures("tracking_store")


def test_a_run_ends_as_it_went() -> None:
    with TrackedRun.open("Default", "data", "first") as run:
        run.log_parameters({"optimizer.lr": 0.001})
    found = find_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == f"first-{run.id[:6]}"
    assert found.data.params == {"config.optimizer.lr": "0.001"}
    assert found.data.tags["sonosco.state"] == "finished"

    with pytest.raises(UserError, match="no such"), TrackedRun.open("Default", "data") as run:
        raise UserError("no such corpus")
    assert find_run(run.id).info.status == "FAILED"
    assert find_run(run.id).data.tags["sonosco.error"] == "no such corpus"

    with pytest.raises(KeyboardInterrupt), TrackedRun.open("Default", "data") as run:
        raise KeyboardInterrupt
    assert find_run(run.id).info.status == "KILLED"
    assert find_run(run.id).data.tags["sonosco.state"] == "stopped"


def test_the_launchers_run_is_used_and_its_own_parameters_do_not_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow.MlflowClient()
    launched = client.create_run("0").info.run_id
    client.log_param(launched, "optimizer.lr", "1e-3")
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    with TrackedRun.open("Default", "data") as run:
        run.log_parameters({"optimizer.lr": 0.001})
    assert run.id == launched
    assert find_run(launched).data.params == {"optimizer.lr": "1e-3", "config.optimizer.lr": "0.001"}


def test_rows_sent_again_change_nothing() -> None:
    rows = [Row(step, 1_700_000_000_000 + step, {"train_loss": 1 / step}) for step in range(1, 1201)]
    with TrackedRun.open("Default", "data") as run:
        run.log_rows(rows)
        run.log_rows(rows[600:])
    history = mlflow.MlflowClient().get_metric_history(run.id, "train_loss")
    assert [(item.step, item.timestamp, item.value) for item in history] == [
        (row.step, row.timestamp, row.metrics["train_loss"]) for row in rows
    ]


def test_a_run_that_failed_before_it_was_opened_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = mlflow.MlflowClient().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    mark_launched_run_failed("optimzer.lr: unknown key")
    assert find_run(launched).info.status == "FAILED"
    assert find_run(launched).data.tags["sonosco.error"] == "optimzer.lr: unknown key"
    assert "MLFLOW_RUN_ID" not in os.environ


def test_a_data_run_belongs_to_the_first_training_on_its_data() -> None:
    with TrackedRun.open("Default", "data") as data:
        data.set_tags({"sonosco.data_digest": "d1"})
        assert data.newest_training_on("d1") is None
    with TrackedRun.open("Default", "data") as other:
        other.set_tags({"sonosco.data_digest": "d2"})
    for _ in range(2):
        with TrackedRun.open("Default", "train") as train:
            train.set_tags({"sonosco.data_digest": "d1"})
            train.adopt_data_runs("d1")
    first = find_run(data.id).data.tags["mlflow.parentRunId"]
    assert first != train.id
    assert "mlflow.parentRunId" not in find_run(other.id).data.tags
    with TrackedRun.open("Default", "data") as late:
        assert late.newest_training_on("d1") == train.id


def test_artifacts_come_back(tmp_path: Path) -> None:
    with TrackedRun.open("Default", "data") as run:
        run.log_text("hello", "notes/a.txt")
        run.log_text("bye", "notes/b.txt")
        run.keep_only("notes", {"a.txt"})
    assert (download(run.id, "notes", tmp_path / "back") / "a.txt").read_text() == "hello"
    assert not (tmp_path / "back" / "notes" / "b.txt").exists()
    with pytest.raises(UserError, match="has no artifact 'missing'"):
        download(run.id, "missing", tmp_path)
    with pytest.raises(UserError, match="'nonsense' is not in the tracking store"):
        find_run("nonsense")


def test_a_copy_that_dvc_made_for_an_experiment_uses_the_projects_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "project" / ".dvc" / "tmp" / "exps" / "temporary"
    copy.mkdir(parents=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(mlflow, "MlflowClient", Mock())
    connect(copy)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path / 'project' / 'mlflow.db'}"
