"""One run in MLflow: opened or found, fed in batches, ended with its state.

Inside ``mlflow run`` the launcher has made a run and named it in ``MLFLOW_RUN_ID``: that one is used. Elsewhere a new
one is made. The launcher overwrites a run's status, so what became of a run also stands in the tag ``sonosco.state``.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import mlflow
from mlflow.data import sources
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_REPO_URL,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
)

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import CHECKPOINTS
from sonosco_mlflow.tracking.active_run import SECONDS_FOR_THE_MONITOR, Activation, active_here
from sonosco_mlflow.tracking.journal import Row
from sonosco_mlflow.tracking.lease import condition
from sonosco_mlflow.tracking.ledger import LEDGER, Entry, Ledger
from sonosco_mlflow.tracking.secrecy import describe_without_secrets, without_secrets
from sonosco_mlflow.tracking.segment_record import SegmentRecord
from sonosco_mlflow.tracking.store import artifact_names, find_run
from sonosco_mlflow.tracking.tags import (
    DATA_DIGEST,
    DESCRIPTION_DIGEST,
    DVC_BASELINE,
    DVC_EXPERIMENT,
    ERROR,
    HOST,
    KIND,
    LEDGER_DIGEST,
    OWNER,
    PID,
    SEGMENTS,
    STATE,
    STATUS,
    WEIGHTS_DIGEST,
    number_of,
)

# Ours beside those that `mlflow run -P` logs in the user's own spelling: parameters cannot be changed.
PARAMETER_PREFIX = "config."
LONGEST_PARAMETER = 6000
LONGEST_TAG = 8000
LARGEST_BATCH = 1000
_EXPERIMENT = {"DVC_EXP_NAME": DVC_EXPERIMENT, "DVC_EXP_BASELINE_REV": DVC_BASELINE}
_ADDRESSES = (MLFLOW_SOURCE_NAME, MLFLOW_GIT_REPO_URL)


class TrackedRun:
    """A run that is open for writing; a context manager that records how it ended.

    Args:
        run: MLflow's run.
        record: of the process that continues ``run``; by default none.

    Attributes:
        segment: 1 in the process that made the run, one more each time that it was continued.
    """

    def __init__(self, run: Run, record: SegmentRecord | None = None) -> None:
        self.id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.artifact_uri: str = run.info.artifact_uri
        self.segment = number_of(run, SEGMENTS, 1)
        self._run = run
        self._record = record or SegmentRecord(self.id)
        self._ledger = Ledger(self.id)
        self._client = mlflow.MlflowClient()
        self._activation: Activation | None = None
        # Runs of the user's that were opened within this one, and left open.
        self._above: list[str] = []

    @classmethod
    def open(cls, experiment: str, kind: str, name: str | None = None, run_id: str | None = None) -> "TrackedRun":
        """Open the run that MLflow's launcher made for this process, or a new one in ``experiment``.

        Args:
            experiment: name of the MLflow experiment for a new run; made if need be.
            kind: ``train``, ``data``, ``evaluate`` or ``sweep``, kept as a tag.
            name: how the UI calls it; a short piece of the id is added, so that it is unique.
            run_id: an older run that is to go on, whose lease the caller has.
        """
        launched = os.environ.pop("MLFLOW_RUN_ID", None) or None
        if run_id is None and launched is not None:
            _require_unused(launched)
        elif run_id is None:
            mlflow.set_experiment(experiment)
        activation = Activation(run_id or launched, monitored=kind == "train")
        run = cls(activation.run)
        run._activation = activation
        try:
            if run_id is not None:
                run.forget_end()
            run.set_tags({KIND: kind, STATE: "running", MLFLOW_RUN_NAME: f"{name or kind}-{run.id[:6]}"})
            # `dvc exp run` says which of its experiments this is.
            run.set_tags({tag: os.environ[variable] for variable, tag in _EXPERIMENT.items() if variable in os.environ})
            # The launcher notes the address of the repository as it was given.
            given = activation.run.data.tags
            addresses = {key: given[key] for key in _ADDRESSES if key in given}
            clean = {key: without_secrets(address) for key, address in addresses.items()}
            run.set_tags({key: clean[key] for key in clean if clean[key] != addresses[key]})
        except BaseException as error:
            with suppress(Exception):
                run.end_after(error)
            raise
        return run

    @classmethod
    def find(cls, run: Run) -> "TrackedRun":
        """Return an older run, to be read, and to be written to once it is reopened.

        Where MLflow's launcher has made a run for this process, that one becomes the record of this segment, below it.
        """
        segment = number_of(run, SEGMENTS, 1) + 1
        return cls(run, SegmentRecord.find(run.info.run_id, segment))

    def reopen(self) -> None:
        """Open the run for writing again, as its next segment; the caller has its lease."""
        os.environ.pop("MLFLOW_RUN_ID", None)
        self._activation = Activation(self.id, monitored=True)
        self.segment += 1
        self.set_tags({STATE: "running", SEGMENTS: str(self.segment)})
        self.forget_end()
        self._record.begin()

    def forget_end(self) -> None:
        """Take back what the run says of the end that it had before."""
        self.open_ledger()
        self.forget_tags(ERROR, WEIGHTS_DIGEST)

    def forget_tags(self, *outdated: str) -> None:
        """Delete those of these tags that the run has."""
        for key in {*outdated} & {*self._client.get_run(self.id).data.tags}:
            self._client.delete_tag(self.id, key)

    def leave(self) -> None:
        """Leave the run as it is; there was nothing to do."""
        os.environ.pop("MLFLOW_RUN_ID", None)
        self._record.end("finished")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a value that is too long for the store is cut, visibly."""
        for key, value in tags.items():
            self._client.set_tag(self.id, key, _cut(value))

    def describe(self, markdown: str) -> None:
        """Set the run's description, shown by the UI as Markdown, unless the user has written another."""
        tags = self._client.get_run(self.id).data.tags
        if MLFLOW_RUN_NOTE in tags and _text_digest(tags[MLFLOW_RUN_NOTE]) != tags.get(DESCRIPTION_DIGEST):
            return
        text = _cut(markdown)
        written = {MLFLOW_RUN_NOTE: text, DESCRIPTION_DIGEST: _text_digest(text)}
        # At once: one without the other would make it the user's.
        self._client.log_batch(self.id, tags=[RunTag(key, value) for key, value in written.items()])

    def rename(self, name: str) -> None:
        """Give the run another name in the UI; a short piece of its id is added."""
        self.set_tags({MLFLOW_RUN_NAME: f"{name}-{self.id[:6]}"})

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
        entry = Entry.of(path)
        self._client.log_artifact(self.id, str(path), folder or None)
        self._ledger.entries[f"{folder}/{path.name}" if folder else path.name] = entry

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

    def replace_folder(self, folder: Path, name: str) -> None:
        """Make the artifact folder ``name`` hold the files of ``folder``, and no others.

        They go one by one: a file either stands whole in the store or not at all.
        """
        paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        for path in paths:
            self.log_file(path, name)
        for other in sorted({*self.artifacts_in(name)} - {path.name for path in paths}):
            self.delete_artifact(f"{name}/{other}")

    def log_table(self, rows: list[dict[str, object]], name: str) -> None:
        """Upload rows of equal keys as a table that the UI shows, in the place of one of that name."""
        folder, _, base = name.rpartition("/")
        if base in self.artifacts_in(folder):
            # MLflow would append to it: a run that was killed at its end would show its rows twice.
            self.delete_artifact(name)
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        self._client.log_table(self.id, columns, name)

    def artifacts_in(self, folder: str) -> list[str]:
        """Return the names of what stands in an artifact folder."""
        return artifact_names(self.id, folder)

    def delete_artifact(self, name: str) -> None:
        """Delete an artifact, file or folder."""
        get_artifact_repository(self.artifact_uri).delete_artifacts(name)  # type: ignore[no-untyped-call]
        self._ledger.forget(name)

    def open_ledger(self) -> None:
        """Go on with the ledger of an earlier process: while files are written it is none, until it is closed again."""
        digest = self._client.get_run(self.id).data.tags.get(LEDGER_DIGEST)
        if digest is None:
            # That process was killed: what it wrote last stands in no ledger.
            return
        with suppress(UserError):
            # Checkpoints are large, and nobody else writes there; all else is read again at the end.
            self._ledger = Ledger.read(self.id, digest).only(CHECKPOINTS)
        self._client.delete_tag(self.id, LEDGER_DIGEST)

    def close_ledger(self) -> None:
        """Keep the digest of every file of this run; nothing is to be uploaded after it."""
        content = self._ledger.complete()
        self.log_bytes(content, LEDGER)
        self.set_tags({LEDGER_DIGEST: hashlib.sha256(content).hexdigest()})

    def log_dataset(self, name: str, digest: str, path: Path, context: str) -> None:
        """Show data in the UI as an input of this run; ``digest`` holds at most 36 characters."""
        # MLflow makes the class when it is imported, which a type checker cannot see.
        source = sources.LocalArtifactDatasetSource(str(path.resolve()))  # type: ignore[attr-defined]
        dataset = MetaDataset(source, name=name, digest=digest[:36])  # type: ignore[abstract]
        with self.active():
            mlflow.log_input(dataset, context=context)

    def active(self) -> AbstractContextManager[None]:
        """Return a block that logs to this run what it logs to MLflow's active run, in whichever thread it runs."""
        return active_here(self._run)

    def __enter__(self) -> "TrackedRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.close_ledger()
        except BaseException as failure:
            self.end_after(failure)
            raise
        self.end_after(error)

    def end_after(self, error: BaseException | None) -> None:
        """End the run as what ``error`` says: failed, interrupted, or, without one, finished."""
        if error is None:
            self.end("finished")
        elif isinstance(error, Exception):
            self.end("failed", describe_without_secrets(error))
        else:
            self.end("interrupted")

    def end(self, state: str, message: str = "") -> None:
        """End the run as ``finished``, ``interrupted`` (by a signal; it can be continued) or ``failed``."""
        self.deactivate()
        if message:
            self.set_tags({ERROR: message})
        for run_id in [*self._above, self.id]:
            self._client.set_terminated(run_id, STATUS[state])
        # Last: a process that is killed before it leaves a run that is seen to have vanished, and can be continued.
        self.set_tags({STATE: state})
        self._record.end(state)

    def abandon(self, error: BaseException) -> None:
        """End the run as what ``error`` says, unless another process has it: how it ends is that one's to say."""
        self.deactivate()
        if not self._client.get_run(self.id).data.tags.get(OWNER):
            self.end_after(error)

    def deactivate(self, patience: float = SECONDS_FOR_THE_MONITOR) -> None:
        """Make it MLflow's active run no more; the tracking store is told nothing. See :meth:`Activation.leave`."""
        if self._activation is not None:
            self._above += self._activation.leave(patience)


def _require_unused(run_id: str) -> None:
    """Return unless another process trains the run: a variable is inherited by children that know nothing of it."""
    run = find_run(run_id)
    tags = run.data.tags
    if tags.get(OWNER) and condition(run) == "running":
        raise UserError(
            f"run {run_id}, which MLFLOW_RUN_ID names, is being trained by process {tags.get(PID)} on "
            f"{tags.get(HOST)}; unset MLFLOW_RUN_ID to begin another"
        )


def _cut(value: str) -> str:
    return value if len(value) <= LONGEST_TAG else value[: LONGEST_TAG - 4] + " ..."


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def mark_launched_run_failed(error: Exception) -> None:
    """Tag the run that MLflow's launcher made for this process with ``error``, if nothing has opened it yet."""
    launched = os.environ.pop("MLFLOW_RUN_ID", None)
    if launched is None:
        return
    client = mlflow.MlflowClient()
    client.set_tag(launched, ERROR, _cut(describe_without_secrets(error)))
    client.set_tag(launched, STATE, "failed")
    client.set_terminated(launched, "FAILED")
