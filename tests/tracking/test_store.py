import json
import os
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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
from sonosco_mlflow.tracking import store
from sonosco_mlflow.tracking.store import connect, download, find_run, is_away

pytestmark = pytest.mark.usefixtures("tracking_store")


@pytest.mark.parametrize("given", [None, "sqlite:///mlflow.db"])
def test_a_copy_that_dvc_made_for_an_experiment_uses_the_projects_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    project = tmp_path / "my project"
    copy = project / ".dvc" / "tmp" / "exps" / "temporary"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    if given is None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    connect(Path())
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{project / 'mlflow.db'}"
    # The artifacts of what is made there stay as well, and so do those of the experiment that MLflow makes itself.
    mlflow.set_experiment("new")
    places = [mlflow.get_experiment_by_name(name).artifact_location for name in ("new", "Default")]
    assert [Path(place.removeprefix("file://")).parent for place in places] == [project / "mlruns"] * 2
    assert Path.cwd() == copy


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///a.db", "sqlite:///HERE/a.db"),
        ("sqlite:////data/a.db", "sqlite:////data/a.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("./mlruns", "HERE/mlruns"),
        ("file:./mlruns", "file:HERE/mlruns"),
        ("file:///data/mlruns", "file:///data/mlruns"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("databricks", "databricks"),
    ],
)
def test_a_store_on_this_machine_is_the_same_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    monkeypatch.setattr(mlflow, "MlflowClient", Mock())
    monkeypatch.setattr(store, "_store_lock", lambda uri: nullcontext())
    connect(Path())
    assert os.environ["MLFLOW_TRACKING_URI"] == expected.replace("HERE", str(tmp_path))


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


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_folder_whose_download_fails_with_the_connection_is_away(
    closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    root = closed.replace("http:", f"{scheme}:") + "/api/2.0/mlflow-artifacts/artifacts/0/abc/artifacts"
    repository: Any = get_artifact_repository(root)
    listed = mlflow.entities.FileInfo("checkpoints/x", is_dir=False, file_size=1)
    monkeypatch.setattr(repository, "list_artifacts", lambda path: [listed] if path == "checkpoints" else [])
    error = error_of(lambda: repository.download_artifacts("checkpoints", str(tmp_path)))
    assert is_away(error), error


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


@pytest.mark.parametrize(("status", "code"), [(401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED")])
def test_a_store_that_wants_to_know_who_asks_is_told_from_one_without_the_run(
    monkeypatch: pytest.MonkeyPatch, address: str, status: int, code: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    answer(monkeypatch, status, {"error_code": code, "message": "not you"})
    with pytest.raises(UserError, match=r"does not tell of run 'abc': .*not you; .* set MLFLOW_TRACKING_USERNAME"):
        find_run("abc")
