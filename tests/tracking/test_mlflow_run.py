import json
import os
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlflow
import pytest
import requests
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.journal import Row, storable
from sonosco_mlflow.tracking.mlflow_run import (
    TrackedRun,
    connect,
    download,
    find_run,
    is_away,
    mark_launched_run_failed,
    recorded_settings,
)

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
        records = run.records()
    assert records.keys() == {*((name, step) for name in values for step in (1, 2)), ("systematic", 2)}
    for name, value in values.items():
        assert records[name, 2].value.hex() == storable(value).hex()
        assert records[name, 2].timestamp == 1_700_000_000_002


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


def test_a_copy_that_dvc_made_for_an_experiment_uses_the_projects_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "project" / ".dvc" / "tmp" / "exps" / "temporary"
    copy.mkdir(parents=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(mlflow, "MlflowClient", Mock())
    connect(copy)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path / 'project' / 'mlflow.db'}"


# ---------------------------------------------------------------------- a run that goes on


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


def test_the_recipe_of_a_run_is_read_again() -> None:
    with TrackedRun.open("Default", "train") as run:
        with pytest.raises(UserError, match=r"has no artifact 'config/params\.yaml'"):
            recorded_settings(run.id)
        run.log_text("optimizer:\n  lr: 3e-4\n", "config/params.yaml")
        assert recorded_settings(run.id) == {"optimizer": {"lr": 3e-4}}
        for broken in ("- a\n- b\n", "a: [", "7\n"):
            run.log_text(broken, "config/params.yaml")
            with pytest.raises(UserError, match=f"runs:/{run.id}/config/params.yaml: not a recipe"):
                recorded_settings(run.id)
        run.log_text("", "config/params.yaml")
        assert recorded_settings(run.id) == {}


# ---------------------------------------------------------------------- a server that is away


class Answer(BaseHTTPRequestHandler):
    """Answers everything alike."""

    status = 200
    body = b""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server that answers as :class:`Answer` says."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a port at which nobody listens."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{reserved.getsockname()[1]}"


def answer(monkeypatch: pytest.MonkeyPatch, status: int, body: bytes | dict[str, str]) -> None:
    monkeypatch.setattr(Answer, "status", status)
    monkeypatch.setattr(Answer, "body", body if isinstance(body, bytes) else json.dumps(body).encode())


def error_of(task: Callable[[], object]) -> Exception:
    try:
        task()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def requests_to(address: str, folder: Path) -> dict[str, Callable[[], object]]:
    """What a delivery asks of a server and of its artifact proxy."""
    client = mlflow.MlflowClient(address)
    repository: Any = get_artifact_repository(f"{address}/api/2.0/mlflow-artifacts/artifacts/0/abc/artifacts")
    (folder / "file.txt").write_text("x")
    return {
        "log_batch": lambda: client.log_batch("abc", metrics=[mlflow.entities.Metric("a", 1.0, 1, 1)]),
        "set_tag": lambda: client.set_tag("abc", "key", "value"),
        "get_run": lambda: client.get_run("abc"),
        "upload": lambda: repository.log_artifact(str(folder / "file.txt"), "checkpoints"),
        "list": lambda: repository.list_artifacts("checkpoints"),
        "delete": lambda: repository.delete_artifacts("checkpoints/x"),
        "download": lambda: repository.download_artifacts("checkpoints/x", str(folder)),
    }


def test_a_server_that_does_not_listen_is_away(closed: str, tmp_path: Path) -> None:
    asked = requests_to(closed, tmp_path)
    assert {name: is_away(error_of(task)) for name, task in asked.items()} == dict.fromkeys(asked, True)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_cannot_answer_now_is_away(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    answer(monkeypatch, status, b"<html>busy</html>")
    asked = requests_to(address, tmp_path)
    assert {name: is_away(error_of(task)) for name, task in asked.items()} == dict.fromkeys(asked, True)


def test_an_answer_of_the_server_that_it_is_overloaded_is_away() -> None:
    for code in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):
        error = mlflow.exceptions.RestException({"error_code": code, "message": "later"})
        assert is_away(error)
    response = requests.Response()
    for status, expected in ((503, True), (404, False)):
        response.status_code = status
        assert is_away(requests.HTTPError(response=response)) == expected


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is no run 'abc'"}),
        (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "a name is blocked"}),
        (403, {"error_code": "PERMISSION_DENIED", "message": "not yours"}),
        (400, b"<html>Bad Request</html>"),
        (401, b"You are not authenticated"),
        (403, b"<html>Forbidden</html>"),
        (404, b"<html>Not Found</html>"),
        (413, b"<html>Request Entity Too Large</html>"),
    ],
)
def test_a_server_that_refuses_is_not_away(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes | dict[str, str]
) -> None:
    answer(monkeypatch, status, body)
    asked = requests_to(address, tmp_path)
    assert {name: is_away(error_of(task)) for name, task in asked.items()} == dict.fromkeys(asked, False)


def test_what_hides_behind_our_own_message_is_seen(closed: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(closed)
    try:
        assert is_away(error_of(lambda: download("abc", "checkpoints/x/manifest.json", tmp_path)))
        found = error_of(lambda: find_run("abc"))
        assert is_away(found)
        assert "is not in the tracking store" not in str(found), "nobody can know"
    finally:
        mlflow.set_tracking_uri(None)


def test_a_locked_database_is_away_and_a_missing_run_is_not(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(empty_database.read_bytes())
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    run_id = client.create_run("0").info.run_id

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "before_cursor_execute", retval=True)
    def wait_less(
        connection: object, cursor: object, statement: str, parameters: object, *more: object
    ) -> tuple[str, object]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 50"), parameters

    other = sqlite3.connect(database)
    try:
        other.execute("BEGIN EXCLUSIVE")
        error = error_of(lambda: client.set_tag(run_id, "key", "value"))
        other.rollback()
    finally:
        other.close()
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", wait_less)
    assert isinstance(error, MlflowException)
    assert "database is locked" in str(error)
    assert is_away(error)
    client.set_tag(run_id, "key", "value")
    assert not is_away(error_of(lambda: client.set_tag("nonsense", "key", "value")))
    assert not is_away(error_of(lambda: client.log_metric(run_id, "a blocked, locked name!", 1.0)))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError("peer"), True),
        (TimeoutError("slow"), True),
        (requests.ConnectionError("gone"), True),
        (requests.Timeout("slow"), True),
        (OSError(28, "No space left on device"), False),
        (PermissionError("mine"), False),
        (UserError("wrong"), False),
        (ValueError("wrong"), False),
    ],
)
def test_errors_of_this_machine_are_no_absence(error: Exception, expected: bool) -> None:
    assert is_away(error) == expected
