"""Where a run comes from: its code, its environment and its recipe, together."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch

from sonosco_mlflow.canary import canary
from sonosco_mlflow.config import Config
from sonosco_mlflow.decisive import decisive
from sonosco_mlflow.settings import Scalar, settings_digest, yaml_text
from sonosco_mlflow.tracking.code_snapshot import CodeSnapshot, snapshot_code
from sonosco_mlflow.tracking.environment import Environment, describe_environment
from sonosco_mlflow.tracking.imported_code import is_installed
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.secrecy import without_secret_options, without_secrets
from sonosco_mlflow.tracking.tags import (
    CANARY,
    CODE_DIGEST,
    COMMIT,
    CONFIG_DIGEST,
    DIRTY,
    ENVIRONMENT_DIGEST,
    IMPORTED_DIGEST,
)
from sonosco_mlflow.training.trainer import ModelTrainer


@dataclass(frozen=True)
class Command:
    """How a process was started, without credentials; places are relative to the folder of the run's code.

    Attributes:
        arguments: of the interpreter.
        folder: where it was started; where that was elsewhere, the folder of the code itself.
        path: folders that modules are imported from.
        trains_recipe: whether it trains a recipe, as ``sonosco train`` does, rather than what a program of the user's
            sets up.
    """

    arguments: tuple[str, ...]
    folder: str
    path: tuple[str, ...]
    trains_recipe: bool

    @classmethod
    def of_this_process(cls, code: CodeSnapshot, *, trains_recipe: bool) -> Self:
        """Describe this process."""
        root = code.root.resolve()
        folder = Path.cwd() if Path.cwd().is_relative_to(root) else root
        program = getattr(sys.modules["__main__"], "__file__", None)
        return cls(
            arguments=tuple(
                _portable(argument, code, program, folder) for argument in without_secret_options(sys.orig_argv[1:])
            ),
            folder=os.path.relpath(folder, root),
            path=tuple(_searched(code)),
            trains_recipe=trains_recipe,
        )

    @classmethod
    def read(cls, text: str) -> Self:
        """Read what :meth:`to_json` returned."""
        content = json.loads(text)
        return cls(
            tuple(content["arguments"]), content["folder"], tuple(content["path"]), bool(content["trains_recipe"])
        )

    def to_json(self) -> str:
        """Return the command as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


def _portable(argument: str, code: CodeSnapshot, program: str | None, folder: Path) -> str:
    path = Path(argument)
    root = code.root.resolve()
    if program is not None and path.resolve() == Path(program).resolve():
        place = code.imported.place_of(path)
        if place is not None:
            return os.path.relpath(root / place, folder)
    if path.is_absolute() and path.is_relative_to(root):
        return os.path.relpath(path, folder)
    return without_secrets(argument)


def _searched(code: CodeSnapshot) -> Iterator[str]:
    """Yield where modules are found, in the order in which they are looked for."""
    root, places = code.root.resolve(), dict(code.imported.places)
    for folder in (Path(entry).resolve() for entry in sys.path):
        if folder in places:
            yield from places.pop(folder)
        elif folder.is_relative_to(root) and folder.is_dir() and not is_installed(folder):
            # Something may still be imported from there.
            yield folder.relative_to(root).as_posix()
    for rest in places.values():
        yield from rest


@dataclass(frozen=True)
class Origin:
    """Code, environment and recipe, as they are when a run or a segment of it begins.

    Attributes:
        code: the snapshot of the repository.
        command: how the process was started.
        environment: distributions, machine, threads, canary.
        settings: the recipe, or the user's own settings, nested.
    """

    code: CodeSnapshot
    environment: Environment
    settings: Mapping[str, object]
    command: Command

    @classmethod
    def take(cls, config: Config | Mapping[str, object], project: Path) -> Self:
        """Describe what is here now; the number of threads and all else that the canary shows must be set."""
        settings = config.model_dump(mode="json") if isinstance(config, Config) else config
        code = snapshot_code(project)
        return cls(
            code=code,
            environment=describe_environment(torch.get_num_threads(), canary(), project),
            settings=settings,
            command=Command.of_this_process(code, trains_recipe=isinstance(config, Config)),
        )

    @property
    def decisive(self) -> dict[str, Scalar]:
        """Those of the settings, flat, that decide the bits of a state."""
        return decisive(self.settings, is_recipe=self.command.trains_recipe)

    @property
    def digests(self) -> dict[str, str]:
        """What a state belongs to, as far as it is known here."""
        return {
            "config": settings_digest(self.decisive),
            "code": self.code.digest,
            "environment": self.environment.named_digest,
            "threads": str(self.environment.system["threads"]),
            "canary": str(self.environment.system["canary"]),
        }

    def tags(self) -> dict[str, str]:
        """Return what a run is tagged with."""
        imported = {IMPORTED_DIGEST: self.code.imported_digest} if self.code.imported_digest else {}
        return imported | {
            CODE_DIGEST: self.code.digest,
            COMMIT: self.code.commit or "none",
            DIRTY: str(self.code.dirty).lower(),
            CONFIG_DIGEST: settings_digest(self.settings),
            ENVIRONMENT_DIGEST: self.environment.digest,
            CANARY: self.digests["canary"],
        }

    def log(self, run: TrackedRun, folder: str = "") -> None:
        """Log everything as artifacts of ``run`` in ``folder`` (empty, or ending in a slash)."""
        run.log_bytes(self.code.archive, f"{folder}code/snapshot.zip")
        run.log_bytes(self.code.patch, f"{folder}code/uncommitted.patch")
        run.log_text(self.code.git_json(), f"{folder}code/git.json")
        run.log_text(self.command.to_json(), f"{folder}code/command.json")
        run.log_text(self.environment.requirements, f"{folder}environment/requirements.txt")
        run.log_text(json.dumps(self.environment.system, indent=1) + "\n", f"{folder}environment/system.json")
        self.log_recipe(run, folder)

    def log_recipe(self, run: TrackedRun, folder: str = "") -> None:
        """Log the recipe as an artifact of ``run``; without a folder it is the one that the run goes on with."""
        run.log_text(yaml_text(self.settings), f"{folder}config/params.yaml")


def data_digests(trainer: ModelTrainer, lineage: DataLineage) -> dict[str, str]:
    """Return the digests of what ``trainer`` trains on, and of what its device makes of the canary.

    Of a trainer that computes in 16 bits, ``precision`` says what those passes give as well.
    """
    used = trainer.precision.used
    digests = {"data": lineage.digest, "precision": used}
    if used != "float32":
        digests["precision"] += f" {canary(str(trainer.device), used)[:16]}"
    if lineage.vocabulary is not None:
        digests["vocabulary"] = lineage.vocabulary
    if trainer.train_loader is not None:
        digests["batches"] = trainer.train_loader.digest
    if trainer.device.type != "cpu":
        digests["canary"] = canary(str(trainer.device))
    return digests
