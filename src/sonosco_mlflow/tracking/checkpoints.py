"""Checkpoints of runs in MLflow: put there file by file, and brought back by the run's address."""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import mlflow

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization import serializer
from sonosco_mlflow.serialization.checkpoint import (
    MANIFEST,
    BrokenCheckpointError,
    Checkpoint,
    checkpoints_in,
    position_of,
    quarantine,
    read_checkpoint,
    verify_checkpoint,
)
from sonosco_mlflow.serialization.durable import make_directory, rename
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.store import connect, download, find_run
from sonosco_mlflow.tracking.tags import CHECKPOINT

FOLDER = "checkpoints"


def upload_checkpoint(run: TrackedRun, directory: Path, kept: frozenset[str], *, verify: bool = False) -> None:
    """Upload a checkpoint, and delete from the run those that are not among the ``kept``.

    Its manifest goes last: it marks the checkpoint as whole. Then the tag that names the newest may move. One that the
    run has already, byte for byte, is left as it is; one that was removed before its turn came is passed over.

    Args:
        run: where to.
        directory: the checkpoint.
        kept: names of the checkpoints that the run is to keep.
        verify: read back every byte of what the run has already, not only its manifest, and replace what is broken.
    """
    folder = f"{FOLDER}/{directory.name}"
    if not directory.exists():
        return
    manifest = (directory / MANIFEST).read_bytes()
    if not _has(run, folder, manifest, verify):
        if MANIFEST in run.artifacts_in(folder):
            # Between an old manifest and new files it would look broken; without a manifest it is merely unfinished.
            run.delete_artifact(f"{folder}/{MANIFEST}")
        for path in sorted(directory.iterdir()):
            if path.name != MANIFEST:
                run.log_file(path, folder)
        run.log_file(directory / MANIFEST, folder)
    run.set_tags({CHECKPOINT: folder})
    for name in run.artifacts_in(FOLDER):
        if position_of(name) is not None and name not in kept:
            run.delete_artifact(f"{FOLDER}/{name}")


def _has(run: TrackedRun, folder: str, manifest: bytes, verify: bool) -> bool:
    if MANIFEST not in run.artifacts_in(folder):
        return False
    with tempfile.TemporaryDirectory() as scratch:
        name = folder if verify else f"{folder}/{MANIFEST}"
        fetched = download(run.id, name, Path(scratch))
        if not verify:
            return fetched.read_bytes() == manifest
        try:
            verify_checkpoint(fetched)
        except BrokenCheckpointError as error:
            place = f"runs:/{run.id}/{folder}"
            warnings.warn(
                f"a checkpoint in MLflow was broken, and is replaced by the whole one of this machine: "
                f"{str(error).replace(str(fetched), place)}",
                stacklevel=2,
            )
            return False
        return (fetched / MANIFEST).read_bytes() == manifest


def newest_checkpoint(run_id: str, directory: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run, of those in ``directory`` and in MLflow, or None.

    One that is only in MLflow is brought to ``directory``. A broken one is named by a warning and passed over; on the
    disk it is put aside, never deleted.
    """
    client = mlflow.MlflowClient()
    stored = {Path(item.path).name for item in client.list_artifacts(run_id, FOLDER)}
    names = {name for name in stored | {path.name for path in checkpoints_in(directory)} if position_of(name)}
    for name in sorted(names, key=position_of, reverse=True):  # type: ignore[arg-type]
        if (directory / name).exists():
            try:
                return read_checkpoint(directory / name)
            except BrokenCheckpointError as error:
                aside = quarantine(directory / name)
                warnings.warn(
                    f"passed over a broken checkpoint: {error}; it is put aside as {aside.name}", stacklevel=2
                )
        if name in stored:
            try:
                return _fetch(run_id, name, directory)
            except BrokenCheckpointError as error:
                warnings.warn(f"passed over a broken checkpoint of run {run_id}: {error}", stacklevel=2)
    return None


def _fetch(run_id: str, name: str, directory: Path) -> Checkpoint:
    partial = directory / f".partial-{name}"
    shutil.rmtree(partial, ignore_errors=True)
    make_directory(partial)
    fetched = download(run_id, f"{FOLDER}/{name}", partial)
    try:
        # Named by where it came from: the place of the download says nothing to a reader.
        read_checkpoint(fetched)
    except BrokenCheckpointError as error:
        raise BrokenCheckpointError(str(error).replace(str(fetched), f"runs:/{run_id}/{FOLDER}/{name}")) from error
    else:
        rename(fetched, directory / name)
        return read_checkpoint(directory / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch_checkpoint(uri: str) -> Path:
    """Download the newest whole checkpoint of ``runs:/<run id>``, or the one that ``runs:/<run id>/<path>`` names.

    Raises:
        UserError: there is no such run, or it kept no checkpoint.
    """
    run_id, _, artifact = uri.removeprefix("runs:/").partition("/")
    connect(Path())
    find_run(run_id)
    folder = Path(tempfile.mkdtemp(prefix="sonosco-checkpoint-"))
    if artifact:
        return download(run_id, artifact, folder)
    checkpoint = newest_checkpoint(run_id, folder)
    if checkpoint is None:
        raise UserError(f"run {run_id} has kept no whole checkpoint")
    return checkpoint.directory


class Deserializer(serializer.Deserializer):
    """A Deserializer that also reads from MLflow: ``deserialize("runs:/<run id>", train_loader=..., val_loader=...)``.

    Args:
        trusted: names of further modules (their submodules included) that may be imported.
        fetch: brings what a URI names to this machine and returns its folder.
    """

    def __init__(self, trusted: Iterable[str] = (), fetch: Callable[[str], Path] = fetch_checkpoint) -> None:
        super().__init__(trusted, fetch)
