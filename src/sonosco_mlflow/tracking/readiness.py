"""Whether the data that lies ready is what ``dvc.lock`` says, and its features are of its manifests."""

import json
import tempfile
from pathlib import PurePosixPath

from sonosco_mlflow.data.corpora.base import changed_audio, some
from sonosco_mlflow.data.corpora.splits import SPLITS
from sonosco_mlflow.data.features import INDEX
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.data_lock import LAST_STAGE, locked_stages, stage_outputs
from sonosco_mlflow.tracking.pipeline import dvc

_MEND = "`dvc repro dataset` makes them anew"


def require_current(folder: DataFolder) -> None:
    """Return if the data can be trained on as it lies there, without a stage being run.

    Raises:
        UserError: the features are older than their manifests, or a file is not the one that ``dvc.lock`` names; the
            message names it and says what to do.
    """
    if not locked_stages(folder):
        _require_newer(folder)
        return
    changed = changed_files(folder)
    if changed is None:
        raise UserError(
            f"{folder.root}: DVC cannot tell whether the data is what dvc.lock says; `dvc data status` shows why"
        )
    if changed:
        raise UserError(
            f"{folder.root.parent / 'dvc.lock'}: the data differs from it: {some(changed)}; `dvc repro` brings both "
            "together, `dvc checkout --force` puts the data back"
        )
    older = _older_stages(folder)
    if older:
        raise UserError(
            f"{folder.root}: {some([f'{name} was made of another {path}' for name, path in older.items()])} than lies "
            f"there; {_MEND}"
        )


def require_recordings(folder: DataFolder) -> None:
    """Return if the recordings that the corpus only refers to are those that its features were made of.

    Raises:
        UserError: some are gone or have other bytes; the message names them.
    """
    for name in folder.corpora():
        changed = changed_audio(folder.corpus(name))
        if changed:
            raise UserError(
                f"{folder.corpus(name)}: the recordings are not those that it was made of: {some(changed)}; put them "
                "back, or have the data made again (`sonosco data`), which is other data: a run that goes on with it "
                "needs --allow-data-change"
            )


def changed_files(folder: DataFolder, *, afresh: bool = False) -> list[str] | None:
    """Return the files that are not what ``dvc.lock`` says, or None where DVC cannot tell.

    DVC remembers the digest of a file that it has put there, and does not read it; ``afresh`` has it read every file.
    """
    with tempfile.TemporaryDirectory() as memory:
        variables = {"DVC_SITE_CACHE_DIR": memory} if afresh else {}
        # The digest knows the features by `dvc.lock` alone. Not `dvc status`: it says nothing of files whose cache is
        # gone. This one takes names of stages for paths, silently finds none, and tells of no change.
        command = ("data", "status", "--json", "--granular", *stage_outputs(folder))
        status = dvc(folder.root.parent, *command, variables=variables)
    if status.returncode != 0:
        return None
    uncommitted = json.loads(status.stdout).get("uncommitted", {})
    # Of a folder that is named beside its files, the files say more.
    names = {_path(entry) for entries in uncommitted.values() for entry in entries}
    return sorted(name for name in names if not any(other != name and _is_below(other, name) for other in names))


def _older_stages(folder: DataFolder) -> dict[str, str]:
    """Return the stages that have run on other data than lies there now, with its path."""
    outputs = stage_outputs(folder)
    older = {
        name: dependency["path"]
        for name, stage in locked_stages(folder).items()
        for dependency in stage["deps"]
        if outputs.get(dependency["path"], dependency["md5"]) != dependency["md5"]
    }
    # The folders of all corpora are no output of any stage; only DVC can say what they hold.
    status = dvc(folder.root.parent, "status", "--json", LAST_STAGE)
    for change in json.loads(status.stdout).get(LAST_STAGE, []) if status.returncode == 0 else []:
        for path in change.get("changed deps", {}) if isinstance(change, dict) else ():
            if path.startswith(f"{folder.root.name}/"):
                older.setdefault(LAST_STAGE, path)
    return older


def _require_newer(folder: DataFolder) -> None:
    # Made by the verbs one by one, without DVC: then only the clock knows.
    if not folder.names.exists():
        return
    for split in SPLITS:
        for name in folder.corpora():
            manifest, features = folder.manifests(name) / f"{split}.jsonl", folder.features(name) / split / INDEX
            for made, of in ((features, manifest), (folder.manifest(split), manifest), (folder.statistics, features)):
                if made.exists() and of.exists() and made.stat().st_mtime < of.stat().st_mtime:
                    raise UserError(f"{made}: is older than {of}, of which it is made; {_MEND}")


def _path(entry: object) -> str:
    # A renamed file is told as its two names.
    return str(entry["new"] if isinstance(entry, dict) else entry)


def _is_below(name: str, folder: str) -> bool:
    return PurePosixPath(name).is_relative_to(folder.rstrip("/"))
