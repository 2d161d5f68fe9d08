"""Each kept checkpoint as a model in MLflow, with the metrics of its step: by them the UI ranks a run's checkpoints.

Such a model has no weights of its own. It names its checkpoint, goes when that goes, and holds what else transcribing
needs; where this package can be imported, it is used like any other::

    model = mlflow.pyfunc.load_model("models:/m-...")        # the id that the UI shows
    model.predict(waveforms)                                 # as in :mod:`.pyfunc`
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.models import Model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from sonosco_mlflow.serialization.checkpoint import CHECKPOINTS, position_of, read_checkpoint
from sonosco_mlflow.serving.logging import SIGNATURE
from sonosco_mlflow.serving.recognizer import OBJECTS, SpeechRecognizer
from sonosco_mlflow.tracking.checkpoints import fetch_checkpoint
from sonosco_mlflow.tracking.journal import Row
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.store import models_of
from sonosco_mlflow.tracking.tags import CHECKPOINT, MANIFEST_DIGEST
from sonosco_mlflow.training.averaging import evaluated_state
from sonosco_mlflow.training.callbacks.base import is_timing

_ADDRESS = "checkpoint.json"


class CheckpointModels:
    """The models of one run's checkpoints.

    Args:
        run: the run.
        recognizer: what the trained model belongs to, or None for one that only its own program can use.
    """

    def __init__(self, run: TrackedRun, recognizer: SpeechRecognizer | None) -> None:
        self.run = run
        # Now: in the thread that delivers, the training would be at it meanwhile.
        self.description = None if recognizer is None else recognizer.description()

    def follow(self, name: str, manifest: bytes, kept: frozenset[str], rows: Iterable[Row]) -> None:
        """Make the models those of the checkpoints that the run now keeps.

        What a crash has left half-made is completed, and nothing is made twice.

        Args:
            name: of the checkpoint that has just been delivered. One from within an optimizer step, or from before the
                first, has no metrics and no model.
            manifest: its manifest.
            kept: names of all that the run keeps.
            rows: what the journal has of its step.
        """
        digest = hashlib.sha256(manifest).hexdigest()
        model = None
        for known in models_of(self.run.id):
            its = known.tags.get(CHECKPOINT, "").rpartition("/")[2]
            if its == name and known.tags[MANIFEST_DIGEST] == digest:
                model = known
            elif its and (its == name or its not in kept):
                _delete(known)
        position = position_of(name)
        rows = [row for row in rows if row.metrics]
        if position is None or position[1] or not rows:
            return
        client = mlflow.MlflowClient()
        if model is None:
            tags = {CHECKPOINT: f"{CHECKPOINTS}/{name}", MANIFEST_DIGEST: digest}
            params = client.get_run(self.run.id).data.params
            model = client.create_logged_model(self.run.experiment_id, name, self.run.id, tags, params)
        if model.status != LoggedModelStatus.READY:
            self._complete(client, model, position[0], rows)

    def _complete(self, client: mlflow.MlflowClient, model: LoggedModel, step: int, rows: Sequence[Row]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self._save(model, Path(scratch))
            client.log_model_artifacts(model.model_id, scratch)
        # With the times of their first writing: the run has these rows already, and keeps one of each. What is not a
        # number MLflow would show as a zero of the model.
        metrics = [
            Metric(metric, value, row.timestamp, row.step, model.model_id)
            for row in rows
            for metric, value in row.metrics.items()
            if math.isfinite(value) and not is_timing(metric)
        ]
        client.log_batch(self.run.id, metrics)
        outputs = client.get_run(self.run.id).outputs
        if outputs is None or model.model_id not in {output.model_id for output in outputs.model_outputs}:
            client.log_outputs(self.run.id, [LoggedModelOutput(model.model_id, step)])
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    def _save(self, model: LoggedModel, folder: Path) -> None:
        """Write the files of ``model`` into ``folder``."""
        address = f"runs:/{self.run.id}/{model.tags[CHECKPOINT]}"
        described = Model(run_id=self.run.id, model_id=model.model_id, metadata={"checkpoint": address})
        if self.description is not None:
            described.signature = SIGNATURE
            mlflow.pyfunc.add_to_model(described, loader_module=__name__, data="recognizer")
            (folder / "recognizer").mkdir()
            (folder / "recognizer" / OBJECTS).write_bytes(self.description)
            (folder / "recognizer" / _ADDRESS).write_text(json.dumps({"checkpoint": address}) + "\n", encoding="utf-8")
        described.save(str(folder / "MLmodel"))


def _load_pyfunc(folder: str) -> SpeechRecognizer:
    """Load such a model: what :func:`mlflow.pyfunc.load_model` calls."""
    address = json.loads(Path(folder, _ADDRESS).read_text(encoding="utf-8"))["checkpoint"]
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = read_checkpoint(fetch_checkpoint(address, Path(scratch)))
        return SpeechRecognizer.load(Path(folder), evaluated_state(checkpoint.state))


def _delete(model: LoggedModel) -> None:
    get_artifact_repository(model.artifact_location).delete_artifacts()  # type: ignore[no-untyped-call]
    mlflow.MlflowClient().delete_logged_model(model.model_id)
