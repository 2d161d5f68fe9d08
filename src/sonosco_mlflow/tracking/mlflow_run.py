"""One run in MLflow: opened or found, fed in batches, ended with its state.

Inside ``mlflow run`` the launcher has made a run and named it in ``MLFLOW_RUN_ID``: that one is used. Elsewhere a new
one is made. The launcher overwrites a run's status, so what became of a run also stands in the tag ``sonosco.state``.
"""

import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import mlflow
from mlflow.data import sources
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from sonosco_mlflow.errors import UserError, describe_failure
from sonosco_mlflow.tracking.journal import Row
from sonosco_mlflow.tracking.pipeline import locked

STATE = "sonosco.state"
ERROR = "sonosco.error"
KIND = "sonosco.kind"
DATA_DIGEST = "sonosco.data_digest"
# Ours beside those that `mlflow run -P` logs in the user's own spelling: parameters cannot be changed.
PARAMETER_PREFIX = "config."
LONGEST_PARAMETER = 6000
LONGEST_TAG = 8000
LARGEST_BATCH = 1000


def connect(project: Path) -> None:
    """Settle the tracking store: ``MLFLOW_TRACKING_URI``, or MLflow's own default made absolute.

    ``dvc exp run --temp`` runs in a copy that is deleted afterwards; the default store of such a copy is the one of
    the project that it was made from.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        root = project.resolve()
        parts = root.parts
        for i in range(len(parts) - 2):
            if parts[i : i + 3] == (".dvc", "tmp", "exps"):
                root = Path(*parts[:i])
        # Stages and other children inherit it.
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root / 'mlflow.db'}"
    _quieten()
    # Two processes that create the database at once can break it for good.
    with _store_lock(os.environ["MLFLOW_TRACKING_URI"]):
        mlflow.MlflowClient().search_experiments(max_results=1)


def _quieten() -> None:
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


class TrackedRun:
    """A run that is open for writing; a context manager that records how it ended.

    Args:
        run: MLflow's run, active.
    """

    def __init__(self, run: Run) -> None:
        self.id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.artifact_uri: str = run.info.artifact_uri
        self._client = mlflow.MlflowClient()

    @classmethod
    def open(cls, experiment: str, kind: str, name: str | None = None) -> "TrackedRun":
        """Open the run that MLflow's launcher made for this process, or a new one in ``experiment``.

        Args:
            experiment: name of the MLflow experiment for a new run; made if need be.
            kind: ``train``, ``data`` or ``evaluate``, kept as a tag.
            name: how the UI calls it; a short piece of the id is added, so that it is unique.
        """
        nested = mlflow.active_run() is not None
        launched = os.environ.pop("MLFLOW_RUN_ID", None)
        if launched:
            active = mlflow.start_run(run_id=launched, nested=nested, log_system_metrics=kind == "train")
        else:
            mlflow.set_experiment(experiment)
            active = mlflow.start_run(nested=nested, log_system_metrics=kind == "train")
        run = cls(active)
        run.set_tags({KIND: kind, STATE: "running", MLFLOW_RUN_NAME: f"{name or kind}-{run.id[:6]}"})
        return run

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a value that is too long for the store is cut, visibly."""
        for key, value in tags.items():
            cut = value if len(value) <= LONGEST_TAG else value[: LONGEST_TAG - 4] + " ..."
            self._client.set_tag(self.id, key, cut)

    def describe(self, markdown: str) -> None:
        """Set the run's description, shown by the UI as Markdown."""
        self.set_tags({MLFLOW_RUN_NOTE: markdown})

    def make_child_of(self, parent: str) -> None:
        """Nest this run below run ``parent`` in the UI."""
        self.set_tags({MLFLOW_PARENT_RUN_ID: parent})

    def adopt_data_runs(self, data_digest: str) -> None:
        """Nest below this run those ``data`` runs that made its data and belong to none yet."""
        condition = f"tags.`{KIND}` = 'data' and tags.`{DATA_DIGEST}` = '{data_digest}'"
        for run in self._client.search_runs([self.experiment_id], condition):
            if MLFLOW_PARENT_RUN_ID not in run.data.tags:
                self._client.set_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID, self.id)

    def newest_training_on(self, data_digest: str) -> str | None:
        """Return the id of the newest training run of this experiment on the data of that digest."""
        condition = f"tags.`{KIND}` = 'train' and tags.`{DATA_DIGEST}` = '{data_digest}'"
        runs = self._client.search_runs([self.experiment_id], condition, max_results=1)
        return runs[0].info.run_id if runs else None

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Log the recipe's keys, each under ``config.<key>``."""
        logged = [Param(PARAMETER_PREFIX + key, str(value)[:LONGEST_PARAMETER]) for key, value in parameters.items()]
        self._client.log_batch(self.id, params=logged)

    def log_rows(self, rows: list[Row]) -> None:
        """Log rows of metrics with their own timestamps; a row that is sent again changes nothing."""
        metrics = [Metric(name, value, row.timestamp, row.step) for row in rows for name, value in row.metrics.items()]
        for first in range(0, len(metrics), LARGEST_BATCH):
            self._client.log_batch(self.id, metrics=metrics[first : first + LARGEST_BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics now."""
        for name, value in metrics.items():
            self._client.log_metric(self.id, name, value, step=step)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Upload one file into an artifact folder."""
        self._client.log_artifact(self.id, str(path), folder or None)

    def log_bytes(self, content: bytes, name: str) -> None:
        """Upload ``content`` as the artifact ``name`` (slashes make folders)."""
        folder, _, base = name.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / base
            path.write_bytes(content)
            self.log_file(path, folder)

    def log_text(self, text: str, name: str) -> None:
        """Upload a text as an artifact."""
        self.log_bytes(text.encode(), name)

    def log_folder(self, folder: Path, name: str) -> None:
        """Upload every file below ``folder``, one by one: a file either stands whole in the store or not at all."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.log_file(path, "/".join([name, *path.parent.relative_to(folder).parts]))

    def log_table(self, rows: list[dict[str, object]], name: str) -> None:
        """Upload rows of equal keys as a table that the UI shows."""
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        self._client.log_table(self.id, columns, name)

    def keep_only(self, folder: str, names: set[str]) -> None:
        """Delete from an artifact folder whatever is not in ``names``."""
        repository = get_artifact_repository(self.artifact_uri)
        for item in repository.list_artifacts(folder):
            if item.path.rpartition("/")[2] not in names:
                repository.delete_artifacts(item.path)  # type: ignore[no-untyped-call]

    def log_dataset(self, name: str, digest: str, path: Path, context: str) -> None:
        """Show data in the UI as an input of this run; ``digest`` holds at most 36 characters."""
        # MLflow makes the class when it is imported, which a type checker cannot see.
        source = sources.LocalArtifactDatasetSource(str(path.resolve()))  # type: ignore[attr-defined]
        dataset = MetaDataset(source, name=name, digest=digest[:36])  # type: ignore[abstract]
        mlflow.log_input(dataset, context=context)

    def __enter__(self) -> "TrackedRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.end("finished")
        elif isinstance(error, Exception):
            self.end("failed", describe_failure(error))
        else:
            self.end("stopped")

    def end(self, state: str, message: str = "") -> None:
        """End the run as ``finished``, ``stopped`` (resumable) or ``failed``."""
        if message:
            self.set_tags({ERROR: message})
        self.set_tags({STATE: state})
        mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[state])


def mark_launched_run_failed(message: str) -> None:
    """Tag the run that MLflow's launcher made for this process with ``message``, if nothing has opened it yet."""
    launched = os.environ.pop("MLFLOW_RUN_ID", None)
    if launched is None:
        return
    client = mlflow.MlflowClient()
    client.set_tag(launched, ERROR, message[:LONGEST_TAG])
    client.set_tag(launched, STATE, "failed")
    client.set_terminated(launched, "FAILED")


def find_run(run_id: str) -> Run:
    """Return a run by its id.

    Raises:
        UserError: there is no such run in the tracking store.
    """
    client = mlflow.MlflowClient()
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise UserError(
            f"run '{run_id}' is not in the tracking store {mlflow.get_tracking_uri()}; "
            "`mlflow runs list --experiment-id 0` lists runs, MLFLOW_TRACKING_URI names another store"
        ) from error


def experiment_name(run: Run) -> str:
    """Return the name of the MLflow experiment that ``run`` belongs to."""
    name: str = mlflow.get_experiment(run.info.experiment_id).name
    return name


def download(run_id: str, artifact: str, folder: Path) -> Path:
    """Bring an artifact (file or folder) of a run into ``folder`` and return where it lies.

    Raises:
        UserError: the run has no such artifact.
    """
    try:
        return Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{artifact}", dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise UserError(f"run {run_id} has no artifact '{artifact}': {error}") from error
