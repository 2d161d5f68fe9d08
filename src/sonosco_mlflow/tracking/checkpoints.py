"""Checkpoints of runs in MLflow: put there file by file, and brought back by the run's address."""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization import serializer
from sonosco_mlflow.serialization.checkpoint import (
    CHECKPOINTS,
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
from sonosco_mlflow.tracking.segments import Segment, newest_segment
from sonosco_mlflow.tracking.store import artifact_names, connect, download, find_run
from sonosco_mlflow.tracking.tags import CHECKPOINT


def upload_checkpoint(
    run: TrackedRun,
    directory: Path,
    kept: frozenset[str],
    confirm: Callable[[], None] = lambda: None,
    *,
    verify: bool = False,
) -> bytes | None:
    """Upload a checkpoint, and delete from the run those that are not among the ``kept``.

    Its manifest goes last: it marks the checkpoint as whole. Then the tag that names the newest may move. One that the
    run has already, byte for byte, is left as it is. One that is removed from the disk before its turn comes, or in
    the middle of it, is passed over: newer ones stand, whose turn is next.

    Args:
        run: where to.
        directory: the checkpoint.
        kept: names of the checkpoints that the run is to keep.
        confirm: raises where the run is another process's; an upload may take so long that it has become that.
        verify: read back every byte of what the run has already, not only its manifest, and replace what is broken.

    Returns:
        Its manifest; None where it was passed over.
    """
    try:
        manifest = _upload(run, directory, confirm, verify)
    except Exception:
        if directory.exists():
            raise
        return None
    confirm()
    for name in run.artifacts_in(CHECKPOINTS):
        if position_of(name) is not None and name not in kept:
            run.delete_artifact(f"{CHECKPOINTS}/{name}")
    return manifest


def _upload(run: TrackedRun, directory: Path, confirm: Callable[[], None], verify: bool) -> bytes:
    folder = f"{CHECKPOINTS}/{directory.name}"
    manifest = (directory / MANIFEST).read_bytes()
    if not is_delivered(run, directory.name, manifest, verify=verify):
        if MANIFEST in run.artifacts_in(folder):
            # Between an old manifest and new files it would look broken; without a manifest it is merely unfinished.
            run.delete_artifact(f"{folder}/{MANIFEST}")
        for path in sorted(directory.iterdir()):
            if path.name != MANIFEST:
                run.log_file(path, folder)
        # What was read first: should the directory be replaced meanwhile, it does not vouch for what it does not know.
        run.log_bytes(manifest, f"{folder}/{MANIFEST}")
    confirm()
    run.set_tags({CHECKPOINT: folder})
    return manifest


def is_delivered(run: TrackedRun, name: str, manifest: bytes, *, verify: bool = False) -> bool:
    """Return whether a run has the checkpoint ``name`` with this manifest in MLflow; ``verify`` reads every byte."""
    folder = f"{CHECKPOINTS}/{name}"
    if MANIFEST not in run.artifacts_in(folder):
        return False
    with tempfile.TemporaryDirectory() as scratch:
        fetched = download(run.id, folder if verify else f"{folder}/{MANIFEST}", Path(scratch))
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


def newest_checkpoint(segment: Segment, directory: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run, of those in ``directory`` and in MLflow, or None.

    One that is only in MLflow is brought to ``directory``. A broken one, or one of a way that the run has left, is
    named by a warning and passed over; on the disk it is put aside, never deleted.

    Args:
        segment: the newest of the run.
        directory: the run's checkpoints on this machine.
    """
    stored = set(artifact_names(segment.run_id, CHECKPOINTS))
    names = {name for name in stored | {path.name for path in checkpoints_in(directory)} if position_of(name)}
    for name in sorted(names, key=position_of, reverse=True):  # type: ignore[arg-type]
        here = _read_or_put_aside(directory / name, segment) if (directory / name).exists() else None
        if here is not None:
            return here
        if name in stored:
            try:
                return _fetch(segment, name, directory)
            except BrokenCheckpointError as error:
                warnings.warn(f"passed over a checkpoint of run {segment.run_id}: {error}", stacklevel=2)
    return None


def put_aside_others(segment: Segment, directory: Path) -> list[Path]:
    """Return the checkpoints in ``directory`` that lie on the way of a segment, oldest first; the others are put aside.

    They may have been left by an earlier process of the run on this machine, while it went on elsewhere.
    """
    return [path for path in checkpoints_in(directory) if _read_or_put_aside(path, segment) is not None]


def _read_or_put_aside(path: Path, segment: Segment) -> Checkpoint | None:
    try:
        return _belonging(read_checkpoint(path), segment)
    except BrokenCheckpointError as error:
        aside = quarantine(path)
        warnings.warn(f"passed over a checkpoint: {error}; it is put aside as {aside.name}", stacklevel=3)
        return None


def _belonging(checkpoint: Checkpoint, segment: Segment) -> Checkpoint:
    if not segment.holds(checkpoint):
        raise BrokenCheckpointError(
            f"{checkpoint.directory}: of a way that the run has left; segment {segment.branch} went on otherwise"
        )
    return checkpoint


def _fetch(segment: Segment, name: str, directory: Path) -> Checkpoint:
    partial = directory / f".partial-{name}"
    shutil.rmtree(partial, ignore_errors=True)
    make_directory(partial)
    place = f"{CHECKPOINTS}/{name}"
    fetched = download(segment.run_id, place, partial)
    try:
        # Named by where it came from: the place of the download says nothing to a reader.
        _belonging(read_checkpoint(fetched), segment)
    except BrokenCheckpointError as error:
        raise BrokenCheckpointError(str(error).replace(str(fetched), f"runs:/{segment.run_id}/{place}")) from error
    else:
        rename(fetched, directory / name)
        return read_checkpoint(directory / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch_checkpoint(uri: str, folder: Path) -> Path:
    """Download the newest whole checkpoint of ``runs:/<run id>``, or the one that ``runs:/<run id>/<path>`` names.

    It comes into ``folder``, and is returned.

    Raises:
        UserError: there is no such run, or it kept no checkpoint.
    """
    run_id, _, artifact = uri.removeprefix("runs:/").partition("/")
    connect(Path())
    run = find_run(run_id)
    if artifact:
        return download(run_id, artifact, folder)
    checkpoint = newest_checkpoint(newest_segment(run), folder)
    if checkpoint is None:
        raise UserError(f"run {run_id} has kept no whole checkpoint")
    return checkpoint.directory


class Deserializer(serializer.Deserializer):
    """A Deserializer that also reads from MLflow: ``deserialize("runs:/<run id>", train_loader=..., val_loader=...)``.

    Args:
        trusted: names of further modules (their submodules included) that may be imported.
        fetch: brings what a URI names into a folder and returns where it lies there.
    """

    def __init__(self, trusted: Iterable[str] = (), fetch: Callable[[str, Path], Path] = fetch_checkpoint) -> None:
        super().__init__(trusted, fetch)
