"""A project as it was when a run began: its code, recipe, data and environment, in a folder of their own.

Nothing of the project that it is rebuilt for is changed; DVC's cache and remotes are borrowed from it.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import git

from sonosco_mlflow.console import say
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.digests import file_digest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.processes import run_interruptibly
from sonosco_mlflow.settings import yaml_text
from sonosco_mlflow.tracking.code_archive import unpack
from sonosco_mlflow.tracking.environment import NUMERICS, Environment
from sonosco_mlflow.tracking.language_model import require_language_model
from sonosco_mlflow.tracking.origin import Command
from sonosco_mlflow.tracking.pipeline import borrow_settings
from sonosco_mlflow.tracking.repository import repository_of
from sonosco_mlflow.tracking.restoration import fetch_data, holds
from sonosco_mlflow.tracking.segments import Segment

ENVIRONMENT_MANAGERS = ("uv", "local")


@dataclass(frozen=True)
class Rebuilt:
    """What a run began with.

    Attributes:
        tree: the repository as it was.
        python: an interpreter in the environment of then.
        environment: the environment that the run recorded.
        command: how the run was started.
        has_data: whether the data of the run lies in its ``data``.
    """

    tree: Path
    python: Path
    environment: Environment
    command: Command
    has_data: bool

    @property
    def folder(self) -> Path:
        """Where the run was started."""
        return self.tree / self.command.folder

    def variables(self) -> dict[str, str]:
        """Return the variables of a process that is to compute as the run did."""
        kept = {name: value for name, value in os.environ.items() if name not in NUMERICS}
        recorded = self.environment.system["variables"]
        assert isinstance(recorded, dict)
        path = [str(self.tree / name) for name in self.command.path]
        return {
            **kept,
            **recorded,
            "PYTHONPATH": os.pathsep.join(path),
            "PATH": os.pathsep.join([str(self.python.parent), os.environ.get("PATH", os.defpath)]),
        }

    def run(self, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> int:
        """Run the interpreter with ``arguments`` where the run was started, and return its exit status."""
        return self._process(arguments, variables).returncode

    def _process(
        self, arguments: Sequence[str], variables: Mapping[str, str] | None = None, output: int | None = None
    ) -> "subprocess.CompletedProcess[str]":
        command = [str(self.python), *arguments]
        return run_interruptibly(command, self.folder, {**self.variables(), **(variables or {})}, output)

    def canary(self, device: str) -> str:
        """Return what the arithmetic of this machine gives on a device in the environment of the run."""
        threads = self.environment.system["threads"]
        program = (
            f"from sonosco_mlflow.determinism import configure; configure({threads}); "
            f"from sonosco_mlflow.canary import canary; print(canary({device!r}))"
        )
        ended = self._process(["-c", program], output=subprocess.PIPE)
        if ended.returncode != 0:
            raise UserError(f"the run's code cannot be run here: its canary ended with status {ended.returncode}")
        return str(ended.stdout).strip()


def rebuild(segment: Segment, project: Path, folder: Path, manager: str, expected_data: str | None) -> Rebuilt:
    """Rebuild in ``folder`` what the first segment of a run began with.

    Args:
        segment: the segment.
        project: a project whose DVC cache and remotes may have the data.
        folder: an empty folder.
        manager: ``uv`` builds the recorded environment, ``local`` takes this process's.
        expected_data: digest of the run's data, or None where it kept none.

    Raises:
        UserError: something of it is not to be had.
    """
    tree = folder / "project"
    command = segment.command()
    place = tree / command.folder
    _restore_code(segment, project.resolve(), tree)
    place.mkdir(parents=True, exist_ok=True)
    settings = segment.settings()
    if command.trains_recipe:
        restore_language_model(segment, settings, place)
        # A program of the user's has its own in its code: what it sets up need not be what that file holds.
        (place / "params.yaml").write_text(yaml_text(settings), encoding="utf-8")
    environment = segment.environment()
    python = Path(sys.executable) if manager == "local" else _build_environment(environment, folder / "environment")
    has_data = _restore_data(segment, project.resolve(), place, expected_data)
    return Rebuilt(tree, python, environment, command, has_data)


def restore_language_model(segment: Segment, settings: dict[str, Any], place: Path) -> None:
    """Put the language model that the run kept below ``place``, and let ``settings``, its recipe, name that file.

    Raises:
        UserError: its recipe names one, and it has kept none.
    """
    decoding = settings.get("decoding", {})
    if decoding.get("language_model") is None:
        return
    # Where it lay then may be outside the project, or among its code.
    file = require_language_model(segment, place / "data" / "language_model.arpa")
    decoding["language_model"] = file.relative_to(place).as_posix()


def _restore_code(segment: Segment, project: Path, tree: Path) -> None:
    unpack(segment.archive(), tree)
    facts = json.loads(segment.git())
    repository = repository_of(project)
    root = project if repository is None else Path(repository.working_dir)
    for name, (mode, digest) in facts["left_out"].items():
        source = root / name
        if not source.is_file() or file_digest(source) != digest:
            # The run may never have looked at it.
            say(
                f"{name} was left out of the run's code snapshot, and {source} is not that file (sha256 "
                f"{digest[:12]}...); the run is made again without it"
            )
            continue
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, tree / name)
        (tree / name).chmod(stat.S_IMODE(mode))
    if repository is None:
        return
    with git.Repo.init(tree) as again:
        # By force: of what the run's repository tracked, some may match a pattern of what is to be ignored.
        again.git.add("--all", "--force")


def _restore_data(segment: Segment, project: Path, place: Path, expected: str | None) -> bool:
    lock = segment.data_lock()
    if lock is not None:
        (place / "dvc.lock").write_text(lock, encoding="utf-8")
    needed = (place / "dvc.yaml", place / "dvc.lock", place / ".dvc", project / ".dvc")
    if not all(path.exists() for path in needed):
        return False
    borrow_settings(place, project)
    # Where the run's data is not known by DVC's digests, what its ``dvc.lock`` names is all that can be had.
    folder = DataFolder(place / "data")
    return any(lock is None or holds(folder, expected) for _ in fetch_data(place))


def _build_environment(environment: Environment, folder: Path) -> Path:
    from uv import find_uv_bin

    folder.mkdir(parents=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(environment.requirements, encoding="utf-8")
    python = folder / "bin" / "python"
    for arguments in (
        ["venv", "--quiet", "--allow-existing", "--python", str(environment.system["python"]), str(folder)],
        ["pip", "install", "--quiet", "--python", str(python), "--requirement", str(requirements)],
    ):
        ended = subprocess.run([find_uv_bin(), *arguments], stderr=subprocess.PIPE, text=True, check=False)
        if ended.returncode != 0:
            raise UserError(
                f"the environment of the run cannot be built: uv {arguments[0]} says: {ended.stderr.strip()[-500:]}\n"
                "--env-manager local takes the environment that you are in"
            )
    return python
