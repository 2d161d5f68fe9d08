import json
import os
from pathlib import Path
from unittest.mock import Mock

import mlflow
import pytest

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.journal import Row, storable
from sonosco_mlflow.tracking.metric_rows import metric_records
from sonosco_mlflow.tracking.mlflow_run import TrackedRun, mark_launched_run_failed
from sonosco_mlflow.tracking.store import download, find_run

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
    assert find_run(run.id).data.tags["sonosco.state"] == "interrupted"


def test_the_launchers_run_is_used_and_its_own_parameters_do_not_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow.MlflowClient()
    launched = client.create_run("0").info.run_id
    client.log_param(launched, "optimizer.lr", "1e-3")
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    with TrackedRun.open("Default", "data") as run:
        run.log_parameters({"optimizer.lr": 0.001})
    assert run.id == launched
    assert find_run(launched).data.params == {"optimizer.lr": "1e-3", "config.optimizer.lr": "0.001"}


def test_the_launchers_note_of_an_address_loses_its_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://me:token@example.org/project.git#part"
    tags = dict.fromkeys(("mlflow.source.name", "mlflow.source.git.repoURL"), address)
    launched = mlflow.MlflowClient().create_run("0", tags=tags).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    with TrackedRun.open("Default", "data"):
        pass
    found = find_run(launched).data.tags
    assert {found[key] for key in tags} == {"https://example.org/project.git#part"}


def test_rows_sent_again_change_nothing() -> None:
    rows = [Row(2 * step, step, 1_700_000_000_000 + step, {"train_loss": 1 / step}) for step in range(1, 1201)]
    rows.append(Row(2400, 1200, 1_700_000_001_300, {"val_loss": 0.5}, {"samples": "not a metric"}))
    with TrackedRun.open("Default", "data") as run:
        run.log_rows(rows)
        run.log_rows(rows[600:])
        run.log_rows([])
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run.id, "train_loss")
    assert [(item.step, item.timestamp, item.value) for item in history] == [
        (row.step, row.timestamp, row.metrics["train_loss"]) for row in rows[:-1]
    ]
    assert [item.step for item in client.get_metric_history(run.id, "val_loss")] == [1200]


def test_the_records_are_all_rows_but_those_of_the_machine_and_of_resumes() -> None:
    values = {"a": 0.1, "b": float("nan"), "c": -0.0, "d": float("inf")}
    with TrackedRun.open("Default", "data") as run:
        run.log_rows([Row(1, step, 1_700_000_000_000 + step, values) for step in (1, 2)])
        run.log_metrics({"resume.verified_steps": 3.0, "system/cpu": 1.0, "systematic": 2.0}, step=2)
        records = metric_records(run.id)
    assert records.keys() == {*((name, step) for name in values for step in (1, 2)), ("systematic", 2)}
    for name, value in values.items():
        assert records[name, 2].value.hex() == storable(value).hex()
        assert records[name, 2].timestamp == 1_700_000_000_002


def test_a_run_that_failed_before_it_was_opened_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = mlflow.MlflowClient().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    mark_launched_run_failed(UserError("optimzer.lr: unknown key; see https://me:token@example.org/"))
    assert find_run(launched).info.status == "FAILED"
    assert find_run(launched).data.tags["sonosco.error"] == "optimzer.lr: unknown key; see https://example.org/"
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


def test_artifacts_come_back_and_go(tmp_path: Path) -> None:
    with TrackedRun.open("Default", "data") as run:
        run.log_text("hello", "notes/a.txt")
        run.log_text("bye", "notes/b.txt")
        run.log_text("deep", "notes/deep/c.txt")
        assert sorted(run.artifacts_in("notes")) == ["a.txt", "b.txt", "deep"]
        assert run.artifacts_in("nothing") == []
        run.delete_artifact("notes/b.txt")
        run.delete_artifact("notes/deep")
        assert run.artifacts_in("notes") == ["a.txt"]
    assert (download(run.id, "notes", tmp_path / "back") / "a.txt").read_text() == "hello"
    with pytest.raises(UserError, match="has no artifact 'missing'"):
        download(run.id, "missing", tmp_path)
    with pytest.raises(UserError, match="'nonsense' is not in the tracking store"):
        find_run("nonsense")


def test_a_tag_that_is_too_long_is_cut_visibly() -> None:
    with TrackedRun.open("Default", "data") as run:
        run.set_tags({"exact": "x" * 8000, "long": "x" * 8001})
    tags = find_run(run.id).data.tags
    assert tags["exact"] == "x" * 8000
    assert tags["long"] == "x" * 7996 + " ..."


def test_a_run_that_is_opened_again_is_running_in_its_next_segment() -> None:
    with pytest.raises(UserError), TrackedRun.open("Default", "train", "first") as run:
        raise UserError("the first reason")
    assert run.segment == 1
    assert "sonosco.segments" not in find_run(run.id).data.tags

    found = TrackedRun.find(find_run(run.id))
    assert find_run(run.id).info.status == "FAILED", "only looking changes nothing"
    found.reopen()
    again = find_run(run.id)
    assert again.info.status == "RUNNING"
    assert again.data.tags["sonosco.state"] == "running"
    assert again.data.tags["sonosco.segments"] == "2"
    assert again.data.tags["sonosco.kind"] == "train"
    assert "sonosco.error" not in again.data.tags
    assert again.info.run_name == f"first-{run.id[:6]}"
    found.end("finished")

    third = TrackedRun.find(find_run(run.id))
    third.reopen()
    third.end("interrupted")
    assert third.segment == 3
    ended = find_run(run.id)
    assert ended.info.status == "KILLED"
    assert (ended.data.tags["sonosco.segments"], ended.data.tags["sonosco.state"]) == ("3", "interrupted")


def interrupted_run() -> str:
    run = TrackedRun.open("Default", "train")
    run.end("interrupted")
    return run.id


@pytest.mark.parametrize(("state", "status"), [("finished", "FINISHED"), ("failed", "FAILED")])
def test_the_launchers_run_becomes_the_record_of_a_segment(
    monkeypatch: pytest.MonkeyPatch, state: str, status: str
) -> None:
    run_id = interrupted_run()
    client = mlflow.MlflowClient()
    launched = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    found = TrackedRun.find(find_run(run_id))
    record = find_run(launched)
    assert record.data.tags["mlflow.parentRunId"] == run_id
    assert record.data.tags["sonosco.kind"] == "segment"
    assert record.info.run_name == f"segment-2-of-{run_id[:6]}"
    assert f"Segment 2 of run `{run_id}`" in record.data.tags["mlflow.note.content"]
    # Until it goes on, a refusal is to be told by the launcher's run.
    assert os.environ["MLFLOW_RUN_ID"] == launched

    found.reopen()
    assert "MLFLOW_RUN_ID" not in os.environ
    assert find_run(launched).data.tags["sonosco.state"] == "running"
    assert mlflow.active_run().info.run_id == run_id
    found.end(state, "reason" if state == "failed" else "")
    for ended in (find_run(launched), find_run(run_id)):
        assert ended.info.status == status
        assert ended.data.tags["sonosco.state"] == state
    assert find_run(run_id).data.tags["sonosco.segments"] == "2"
    assert "sonosco.segments" not in find_run(launched).data.tags


@pytest.mark.parametrize("launched_again", [False, True])
def test_the_record_of_a_segment_that_was_killed_with_its_launcher_is_ended_by_the_next(
    monkeypatch: pytest.MonkeyPatch, launched_again: bool
) -> None:
    run_id, client = interrupted_run(), mlflow.MlflowClient()
    # In whichever experiment the launcher was told to.
    records = [client.create_run(client.create_experiment(f"of {run_id} {number}")).info.run_id for number in (1, 2)]
    monkeypatch.setenv("MLFLOW_RUN_ID", records[0])
    killed = TrackedRun.find(find_run(run_id))
    killed.reopen()
    killed.deactivate()
    if launched_again:
        monkeypatch.setenv("MLFLOW_RUN_ID", records[1])
    found = TrackedRun.find(find_run(run_id))
    assert find_run(records[0]).info.status == "RUNNING", "until the run goes on, nobody knows"
    found.reopen()
    record = find_run(records[0])
    assert (record.info.status, record.data.tags["sonosco.state"]) == ("KILLED", "interrupted")
    found.end("finished")
    if launched_again:
        assert find_run(records[1]).info.status == "FINISHED"
        # One that has told its own end, or is deleted, is left alone.
        for spoil in (lambda: None, lambda: client.delete_run(records[1])):
            spoil()
            again = TrackedRun.find(find_run(run_id))
            again.reopen()
            again.end("interrupted")
            assert find_run(records[1]).info.status == "FINISHED"


def test_a_launcher_that_names_the_run_itself_makes_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = interrupted_run()
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    found = TrackedRun.find(find_run(run_id))
    # Refused, the run is not to be marked as failed by the command line.
    assert "MLFLOW_RUN_ID" not in os.environ
    tags = find_run(run_id).data.tags
    assert tags["sonosco.kind"] == "train"
    assert "mlflow.parentRunId" not in tags
    found.reopen()
    found.end("finished")
    assert find_run(run_id).info.status == "FINISHED"


def test_a_run_that_is_left_alone_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = interrupted_run()
    launched = mlflow.MlflowClient().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    before = find_run(run_id)
    TrackedRun.find(before).leave()
    after = find_run(run_id)
    assert (after.info.status, after.data.tags) == (before.info.status, before.data.tags)
    assert find_run(launched).info.status == "FINISHED"
    assert find_run(launched).data.tags["sonosco.state"] == "finished"
    assert "MLFLOW_RUN_ID" not in os.environ


def test_a_table_that_is_logged_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    with TrackedRun.open("Default", "data") as run:
        for text in ("one", "two"):
            run.log_table([{"id": "a", "text": text}], "evaluation/texts.json")
    table = json.loads(download(run.id, "evaluation/texts.json", tmp_path).read_text())
    assert table["data"] == [["a", "two"]]


def test_a_folder_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    with TrackedRun.open("Default", "data") as run:
        run.replace_folder(folder, "tensorboard")
        assert run.artifacts_in("tensorboard") == []
        for name in ("first", "second"):
            (folder / name).write_text(name)
            run.replace_folder(folder, "tensorboard")
            (folder / name).unlink()
        assert run.artifacts_in("tensorboard") == ["second"]


def test_a_process_that_is_killed_in_the_very_end_leaves_no_run_that_says_it_is_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = TrackedRun.open("Default", "train")
    monkeypatch.setattr(run, "set_tags", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.end("finished")
    found = find_run(run.id)
    assert (found.info.status, found.data.tags["sonosco.state"]) == ("FINISHED", "running")


def test_what_dvc_has_started_names_its_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "wary-moth")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "c0ffee")
    with TrackedRun.open("Default", "train") as run:
        pass
    tags = mlflow.get_run(run.id).data.tags
    assert (tags["dvc.experiment"], tags["dvc.baseline"]) == ("wary-moth", "c0ffee")
