"""The tracking store: where it is, whether it answers, and what is read from it.

It is MLflow's own default, or what ``MLFLOW_TRACKING_URI`` names; never one of ours.
"""

import logging
import os
import re
import tempfile
from contextlib import AbstractContextManager, chdir, nullcontext
from http import HTTPStatus
from pathlib import Path

import mlflow
import requests
from mlflow.entities import LoggedModel, Run
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.file_lock import locked
from sonosco_mlflow.tracking.secrecy import without_secrets
from sonosco_mlflow.tracking.tags import KIND

_COPIES = (".dvc", "tmp", "exps")
# Of a run that there is not, and of an id that can be none's.
_UNKNOWN = {
    databricks_pb2.ErrorCode.Name(code)
    for code in (databricks_pb2.RESOURCE_DOES_NOT_EXIST, databricks_pb2.INVALID_PARAMETER_VALUE)
}


def connect(project: Path) -> None:
    """Settle the tracking store: ``MLFLOW_TRACKING_URI``, or MLflow's own default in ``project``, made absolute.

    ``dvc exp run --temp`` runs in a copy that is deleted afterwards; the store of such a copy is the one of the project
    that it was made from, with its artifacts.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    folder = _kept(Path.cwd() if given else project.resolve())
    # Stages and other children inherit it, wherever they run.
    os.environ["MLFLOW_TRACKING_URI"] = _absolute(given or "sqlite:///mlflow.db", folder)
    _quieten()
    # Two processes that create the database at once can break it for good. A store that MLflow makes for the first time
    # remembers the current folder: below that lie the artifacts of all experiments to come.
    with _store_lock(os.environ["MLFLOW_TRACKING_URI"]), chdir(folder):
        mlflow.MlflowClient().search_experiments(max_results=1)


def _kept(folder: Path) -> Path:
    """Return ``folder``, or, where DVC deletes it afterwards, the one that it is a copy of."""
    parts = folder.parts
    for i in range(len(parts) - 3):
        if parts[i : i + 3] == _COPIES:
            return Path(*parts[:i], *parts[i + 4 :])
    return folder


def _absolute(uri: str, folder: Path) -> str:
    """Return where a store is; one on this machine by an absolute path."""
    for start in ("sqlite:///", "file:"):
        if uri.startswith(start) and not uri.removeprefix(start).startswith(("/", ":memory:")):
            return f"{start}{folder / uri.removeprefix(start)}"
    return uri if ":" in uri or uri.startswith("databricks") or uri == "uc" else str(folder / uri)


def _quieten() -> None:
    # Waiting for a server is done here, beside the training, and must not keep a stopped run for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # What MLflow tells of its own doings would stand between the lines of the training.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow.store", "mlflow.tracking", "mlflow.system_metrics", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns where there is no pip, as in an environment of uv's.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)


def _store_lock(uri: str) -> AbstractContextManager[None]:
    if not uri.startswith("sqlite:///"):
        return nullcontext()
    database = Path(uri.removeprefix("sqlite:///"))
    return locked(database.with_name(database.name + ".lock"))


def is_away(error: Exception) -> bool:
    """Return whether ``error`` means that the tracking server is away or busy, and worth asking again."""
    if isinstance(error, UserError):
        return isinstance(error.__cause__, Exception) and is_away(error.__cause__)
    if isinstance(error, MlflowException):
        # What a server, or one before it, answers in no words of MLflow's has a status in its text only.
        answer = re.search(r"^API request to endpoint .* failed with error code (\d{3}) ", str(error))
        if answer:
            return _is_busy(int(answer[1]))
        codes = (databricks_pb2.TEMPORARILY_UNAVAILABLE, databricks_pb2.REQUEST_LIMIT_EXCEEDED)
        names = {databricks_pb2.ErrorCode.Name(code) for code in codes}
        # A connection that fails has no code of its own, nor has the download of a folder that fails with it.
        return error.error_code in names or bool(re.search("^API request to|HTTPS?ConnectionPool", str(error)))
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return _is_busy(error.response.status_code)
    return isinstance(error, requests.RequestException | ConnectionError | TimeoutError)


def _is_busy(status: int) -> bool:
    return status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def find_run(run_id: str) -> Run:
    """Return a run by its id.

    Raises:
        UserError: there is no such run in the tracking store, or the store does not answer.
    """
    client = mlflow.MlflowClient()
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if is_away(error):
            raise UserError(f"the tracking store {_address()} does not answer: {error}") from error
        if error.error_code in _UNKNOWN:
            raise UserError(
                f"run '{run_id}' is not in the tracking store {_address()}; `sonosco show` lists the trainings there, "
                "MLFLOW_TRACKING_URI names another store"
            ) from error
        raise UserError(
            f"the tracking store {_address()} does not tell of run '{run_id}': {without_secrets(str(error))}; if it "
            "wants to know who asks, set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
        ) from error


def find_training(run_id: str) -> Run:
    """Return a training run by its id.

    Raises:
        UserError: as :func:`find_run`, or the run is another one: an evaluation, a sweep, none of ours.
    """
    run = find_run(run_id)
    if run.data.tags.get(KIND) != "train":
        raise UserError(
            f"run {run_id} is no training: its tag {KIND} is {run.data.tags.get(KIND)!r}; `sonosco show` lists those "
            "that are"
        )
    return run


def _address() -> str:
    """Return where the tracking store is, for a message."""
    return without_secrets(mlflow.get_tracking_uri())


def search_runs(experiments: list[str], condition: str, order_by: list[str] | None = None) -> list[Run]:
    """Return all runs of experiments that meet a condition, however many there are."""
    client = mlflow.MlflowClient()
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs(experiments, condition, order_by=order_by, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def experiment_name(run: Run) -> str:
    """Return the name of the MLflow experiment that ``run`` belongs to."""
    name: str = mlflow.get_experiment(run.info.experiment_id).name
    return name


def models_of(run_id: str) -> list[LoggedModel]:
    """Return the models that a run has logged, the newest first."""
    client = mlflow.MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    found: list[LoggedModel] = []
    token = None
    while True:
        page = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def artifact_names(run_id: str, folder: str) -> list[str]:
    """Return the names of what stands in an artifact folder of a run; none where there is no such folder."""
    return [item.path.rpartition("/")[2] for item in mlflow.MlflowClient().list_artifacts(run_id, folder)]


def artifact_bytes(run_id: str, name: str) -> bytes:
    """Return the content of an artifact of a run, a file.

    Raises:
        UserError: the run has no such artifact.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return download(run_id, name, Path(scratch)).read_bytes()


def download(run_id: str, artifact: str, folder: Path) -> Path:
    """Bring an artifact (file or folder) of a run into ``folder`` and return where it lies.

    Raises:
        UserError: the run has no such artifact.
    """
    try:
        return Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{artifact}", dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise UserError(f"run {run_id} has no artifact '{artifact}': {error}") from error
