"""Checkpoints of runs in MLflow: put there file by file, and brought back by the run's address."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import mlflow

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization import serializer
from sonosco_mlflow.serialization.checkpoint import MANIFEST
from sonosco_mlflow.tracking.mlflow_run import TrackedRun, connect, find_run

FOLDER = "checkpoints"
NEWEST = "sonosco.checkpoint"


def upload_checkpoint(run: TrackedRun, directory: Path) -> None:
    """Upload a checkpoint, and delete from the run those that no longer stand beside it on the disk.

    Its manifest goes last: it marks the checkpoint as whole. Then the tag that names the newest may move.
    """
    folder = f"{FOLDER}/{directory.name}"
    for path in sorted(directory.iterdir()):
        if path.name != MANIFEST:
            run.log_file(path, folder)
    run.log_file(directory / MANIFEST, folder)
    run.set_tags({NEWEST: folder})
    run.keep_only(FOLDER, {path.name for path in directory.parent.iterdir()})


def fetch_checkpoint(uri: str) -> Path:
    """Download the newest checkpoint of ``runs:/<run id>``, or the one that ``runs:/<run id>/<path>`` names.

    Raises:
        UserError: there is no such run, or it kept no checkpoint.
    """
    run_id, _, artifact = uri.removeprefix("runs:/").partition("/")
    connect(Path())
    artifact = artifact or find_run(run_id).data.tags.get(NEWEST, "")
    if not artifact:
        raise UserError(f"run {run_id} has kept no checkpoint")
    folder = tempfile.mkdtemp(prefix="sonosco-checkpoint-")
    return Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{artifact}", dst_path=folder))


class Deserializer(serializer.Deserializer):
    """A Deserializer that also reads from MLflow: ``deserialize("runs:/<run id>", train_loader=..., val_loader=...)``.

    Args:
        trusted: names of further modules (their submodules included) that may be imported.
        fetch: brings what a URI names to this machine and returns its folder.
    """

    def __init__(self, trusted: Iterable[str] = (), fetch: Callable[[str], Path] = fetch_checkpoint) -> None:
        super().__init__(trusted, fetch)
