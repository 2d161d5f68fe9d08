"""Bringing back the very data that a run used, by its digests.

The project may have gone on to other data since, and its ``dvc.lock`` is the user's. So what does not lie ready comes
into a DVC workspace of its own, named after the digest, which no other data replaces while a run reads from it.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.data_lock import private_lock, stage_outputs
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.pipeline import (
    dvc,
    make_private,
    ready_data,
    remotes,
    reproduce,
    require_pipeline,
    require_sources,
    workspace_locked,
    workspace_of,
)
from sonosco_mlflow.tracking.readiness import changed_files


def restore_data(
    config: Config,
    project: Path,
    lock: str | None,
    expected: str,
    explain: Callable[[DataLineage], str] = lambda lineage: "",
) -> DataFolder:
    """Return a folder with the data that a run used: as it lies there, from DVC's cache, from a remote, or made again.

    The project's own ``data``, ``params.yaml`` and ``dvc.lock`` are not changed.

    Args:
        config: the recipe of the run.
        project: folder with ``dvc.yaml`` and ``params.yaml``.
        lock: text of the run's ``dvc.lock`` (:func:`~sonosco_mlflow.tracking.pipeline.lock_text`); without it the data
            is made again unless it lies there.
        expected: digest of the run's :class:`DataLineage`.
        explain: says which parts of other data differ from the run's.

    Raises:
        UserError: the data is nowhere to be had, and the recipe makes other data now.
    """
    project = project.resolve()
    require_pipeline(project)
    ready = ready_data(config, project)
    if holds(ready, expected):
        return ready
    recipe = workspace_of(config, project)
    workspace = recipe.with_name(f"{recipe.name}-{expected[:12]}")
    folder = DataFolder(workspace / "data")
    with workspace_locked(workspace, project):
        if holds(folder, expected):
            return folder
        make_private(workspace, config, project)
        if lock is not None:
            (workspace / "dvc.lock").write_text(private_lock(lock), encoding="utf-8")
            for _ in fetch_data(workspace):
                if holds(folder, expected):
                    return folder
        _make_again(workspace, config, project)
        made = DataLineage.of_folder(folder)
    if made.digest != expected:
        raise UserError(
            f"the data of the run (digest {expected[:12]}) is neither here nor in DVC's cache nor in a remote of "
            f"{project / '.dvc' / 'config'}, and its recipe makes other data now (digest {made.digest[:12]}). "
            f"{explain(made)}\nBring back what was lost (`dvc pull` in {workspace} says why a remote did not give it), "
            "or the code and the source of then"
        )
    return folder


def _make_again(workspace: Path, config: Config, project: Path) -> None:
    try:
        require_sources(config, project)
        reproduce(workspace)
    except UserError as error:
        raise UserError(
            f"the data of the run is neither here nor in DVC's cache nor in a remote, and cannot be made again: {error}"
        ) from error


def holds(folder: DataFolder, expected: str | None) -> bool:
    """Return whether ``folder`` has the data of that digest, and its files are what ``dvc.lock`` says."""
    try:
        lineage = DataLineage.of_folder(folder)
    except (UserError, OSError):
        return False
    return lineage.digest == expected and changed_files(folder) == []


def fetch_data(workspace: Path) -> Iterator[None]:
    """Bring the outputs that ``dvc.lock`` names, from the cache, then from each remote; yields after every attempt.

    Raises:
        UserError: the cache has other bytes than it says; the message names the file.
    """
    # What one misses, the next may find. By force: nothing in a workspace of ours is the user's.
    pulls = [["pull", "--force", "--remote", remote] for remote in remotes(workspace)]
    for command in (["checkout", "--force"], *pulls):
        print(f"bringing the data of the run: dvc {' '.join(command)}", file=sys.stderr, flush=True)
        dvc(workspace, *command, *stage_outputs(DataFolder(workspace / "data")))
        _require_sound(workspace)
        yield


def _require_sound(workspace: Path) -> None:
    """Return unless DVC, which takes its cache at its word, has put a file here with other bytes than its digest's."""
    changed = changed_files(DataFolder(workspace / "data"), afresh=True) or []
    present = [name for name in changed if (workspace / name).is_file()]
    if not present:
        return
    # They take seconds to import.
    from dvc.api import DVCFileSystem
    from dvc.config import Config as Settings

    listed = DVCFileSystem(str(workspace)).find("data", detail=True, dvc_only=True)
    cache = Path(Settings(str(workspace / ".dvc"))["cache"]["dir"]) / "files" / "md5"
    for name in present:
        expected = str(listed[name]["md5"])
        cached = cache / expected[:2] / expected[2:]
        if not cached.exists():
            continue
        with cached.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != expected:
            raise UserError(
                f"{name}: DVC's cache has other bytes than it says, in {cached}; delete that file, and the data comes "
                "from a remote or is made again"
            )
