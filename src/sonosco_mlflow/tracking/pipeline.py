"""Bringing the data of a recipe up to date with DVC.

The project's own ``params.yaml`` and ``dvc.lock`` describe one set of data. A run whose recipe asks for another
(``-P data.corpus=an4``, ``-P features.n_mels=40``) must not rewrite them, nor disturb a run beside it. It gets a DVC
workspace of its own under ``.sonosco/data/<digest of the data recipe>``, with the same stages and the same cache, so
that what is equal is made once.
"""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sonosco_mlflow.config import Config
from sonosco_mlflow.data.corpora import CORPORA
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError, nearest

DATA_STAGES = ("corpus", "manifests", "features")
STAGE_MESSAGE = "sonosco: "


def prepare_data(config: Config, project: Path) -> DataFolder:
    """Run what must run of the data stages and return the folder with the data of ``config``.

    Args:
        config: the recipe of the run.
        project: folder with ``dvc.yaml`` and ``params.yaml``.

    Raises:
        UserError: there is no pipeline here, no such corpus or source, or a stage failed; then the message is its own.
    """
    project = project.resolve()
    if config.data.corpus not in CORPORA:
        raise UserError(f"data.corpus: found '{config.data.corpus}', {nearest(config.data.corpus, CORPORA)}")
    if not (project / "dvc.yaml").exists():
        raise UserError(f"{project}: no dvc.yaml here; run in the project's folder")
    source = config.data.source
    if source is not None and "://" not in source and not (project / source).exists():
        raise UserError(f"data.source: found '{source}', expected an archive or a folder; there is none of that name")
    workspace = project if _is_own_recipe(config, project) else _private_workspace(config, project)
    with locked(project / ".sonosco" / "locks" / f"data-{workspace.name}.lock"):
        _reproduce(workspace)
    return DataFolder(workspace / "data")


def ready_data(config: Config, project: Path) -> DataFolder:
    """Return the folder with the data of ``config`` as it lies there, without running anything."""
    project = project.resolve()
    own = _is_own_recipe(config, project)
    return DataFolder((project if own else workspace_of(config, project)) / "data")


def workspace_of(config: Config, project: Path) -> Path:
    """Return the private workspace for the data of ``config``."""
    recipe = json.dumps(_absolute(config, project), sort_keys=True)
    return project / ".sonosco" / "data" / hashlib.sha256(recipe.encode()).hexdigest()[:12]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes: DVC's own does not outlive a killed parent whose stage goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stage_outputs(folder: DataFolder) -> dict[str, str]:
    """Return DVC's digest of each data output, by its path below the workspace, as ``dvc.lock`` states it."""
    lock = folder.root.parent / "dvc.lock"
    if not lock.exists():
        return {}
    stages = YAML(typ="safe").load(lock.read_text(encoding="utf-8")).get("stages", {})
    return {output["path"]: output["md5"] for stage in DATA_STAGES for output in stages.get(stage, {}).get("outs", [])}


def _is_own_recipe(config: Config, project: Path) -> bool:
    # Outside git the project itself is no DVC repository, and the private workspace serves.
    return _inside_git(project) and Config.load(project / "params.yaml").data_recipe == config.data_recipe


def _inside_git(project: Path) -> bool:
    return any((folder / ".git").exists() for folder in (project, *project.parents))


def _absolute(config: Config, project: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads(json.dumps(config.data_recipe))
    source = recipe["data"]["source"]
    if source is not None and "://" not in source:
        recipe["data"]["source"] = str((project / source).resolve())
    return recipe


def _private_workspace(config: Config, project: Path) -> Path:
    workspace = workspace_of(config, project)
    (workspace / ".dvc").mkdir(parents=True, exist_ok=True)
    cache = project / ".dvc" / "cache"
    (workspace / ".dvc" / "config").write_text(
        f"[core]\n    no_scm = true\n    analytics = false\n[cache]\n    dir = {cache}\n"
    )
    (workspace / ".dvcignore").touch()
    # The same names as in the project, so that the cache of stages serves both.
    code = workspace / "src"
    if not code.is_symlink():
        code.symlink_to(os.path.relpath(project / "src", workspace))
    recipe = _absolute(config, project)
    recipe["data"]["processes"] = config.data.processes
    source = recipe["data"]["source"]
    yaml = YAML()
    stages = yaml.load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    chosen = {name: stages[name] for name in DATA_STAGES}
    if source is not None and "://" not in source:
        chosen["corpus"]["deps"].append(source)
    for name, content in {"dvc.yaml": {"stages": chosen}, "params.yaml": recipe}.items():
        with (workspace / name).open("w", encoding="utf-8") as file:
            yaml.dump(content, file)
    return workspace


def _reproduce(workspace: Path) -> None:
    # The stages name `python`: it must be the one that runs now, wherever DVC was called from.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [sys.executable, "-m", "dvc", "repro", *DATA_STAGES]
    said = ""
    # DVC tells of its doings on stdout; errors, and the stages' own progress, come on stderr. Its process group is its
    # own, because a stage outlives a DVC that is killed alone.
    with subprocess.Popen(
        command,
        cwd=workspace,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                # A stage's last word is the message; what DVC makes of its exit status says nothing more.
                if line.startswith(STAGE_MESSAGE):
                    said = line.removeprefix(STAGE_MESSAGE).strip()
                elif not said:
                    print(line, end="", file=sys.stderr, flush=True)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode != 0:
        raise UserError(
            said
            or f"the data could not be brought up to date: `dvc repro {' '.join(DATA_STAGES)}` in {workspace} "
            f"ended with status {process.returncode}; its message stands above"
        )
