"""The segments of a run: each process that trained it, what it began from, and what it was allowed to change.

A segment's origin lies in ``segments/<n>/``, that of the first beside the run's other artifacts. ``segment.json`` is
stored last: without it the process was killed before it began, and the segment does not count.

A change that was allowed makes the run branch: it goes on from a checkpoint on another way, and what an earlier segment
did beyond that checkpoint is of a way that was left. It may still lie on another machine. So each checkpoint names its
branch, and each segment lists all branches so far::

    here = newest_segment(run)
    here.holds(checkpoint)        # whether it lies on the way that the run is on now
    here.settings()               # the recipe that it goes on with
"""

import io
import json
import os
import socket
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from mlflow.entities import Run
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sonosco_mlflow.config import Config
from sonosco_mlflow.decisive import decisive
from sonosco_mlflow.errors import UserError, whole_number
from sonosco_mlflow.serialization.checkpoint import MANIFEST, Checkpoint, position_of
from sonosco_mlflow.settings import Scalar
from sonosco_mlflow.tracking.environment import Environment, read_system
from sonosco_mlflow.tracking.origin import Command
from sonosco_mlflow.tracking.store import artifact_bytes, artifact_names
from sonosco_mlflow.tracking.tags import SEGMENTS, number_of

T = TypeVar("T")
RECORD = "segment.json"
BRANCH = "branch"
"""Among a checkpoint's digests: the segment that began its branch. One of the first branch has none."""


@dataclass(frozen=True)
class Branch:
    """Where a run left its way.

    Attributes:
        segment: number of the segment that did.
        checkpoint: name of the checkpoint that it went on from, or None where it began anew.
        changes: digests that differ since, as (was, is).
        recorded: last step of which the tracking store had a row by then; those it keeps, whatever is made of them now.
    """

    segment: int
    checkpoint: str | None
    changes: Mapping[str, tuple[str, str]]
    recorded: int


@dataclass(frozen=True)
class Segment:
    """One process's part of a run.

    Attributes:
        run_id: the run.
        number: 1 for the process that made it.
        branches: where the run has left its way up to this segment, in order.
    """

    run_id: str
    number: int = 1
    branches: tuple[Branch, ...] = ()

    @property
    def folder(self) -> str:
        """Artifact folder of its origin: empty, or ending in a slash."""
        return "" if self.number == 1 else f"segments/{self.number}/"

    @property
    def branch(self) -> int:
        """The branch that the run is on: number of the segment that began it."""
        return self.branches[-1].segment if self.branches else 1

    @property
    def differs_until(self) -> int:
        """Last step whose rows in the tracking store may be of a way that was left; -1 if there is none."""
        return max((branch.recorded for branch in self.branches), default=-1)

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint of this run lies on the way that led to this segment."""
        position = position_of(checkpoint.directory.name) or ()
        left_at = [position_of(branch.checkpoint or "") or () for branch in self._since(checkpoint)]
        return all(position <= left for left in left_at)

    def changes_since(self, checkpoint: Checkpoint | None) -> dict[str, str]:
        """Return the digests that were allowed to change after ``checkpoint`` (after the start), as they are now."""
        return {name: now for branch in self._since(checkpoint) for name, (_, now) in branch.changes.items()}

    def next(
        self, number: int, checkpoint: Checkpoint | None, changes: Mapping[str, tuple[str, str]], recorded: int
    ) -> "Segment":
        """Return the segment that goes on from ``checkpoint`` with those changes; see :class:`Branch`."""
        origin = None if checkpoint is None else checkpoint.directory.name
        own = (Branch(number, origin, dict(changes), recorded),) if changes else ()
        return Segment(self.run_id, number, self.branches + own)

    def settings(self) -> dict[str, Any]:
        """Return the recipe that this segment goes on with, as nested settings.

        Raises:
            UserError: the run kept none, or one that cannot be read.
        """
        return self._read("config/params.yaml", "a recipe", lambda text: dict(YAML(typ="safe").load(text) or {}))

    def trains_recipe(self) -> bool:
        """Return whether its settings are a recipe, rather than a program's own.

        Raises:
            UserError: it has not kept how it was started, or what it kept is damaged.
        """
        return self.command().trains_recipe

    def recipe(self) -> Config:
        """Return the recipe that it trains.

        Raises:
            UserError: it trains none.
        """
        if not self.trains_recipe():
            raise UserError(
                f"run {self.run_id} trains no recipe, but what a program of its own sets up: there "
                f'Experiment.resume("{self.run_id}") continues it'
            )
        return Config.resolve(self.settings(), {}, origin=f"run {self.run_id}")

    def decisive(self) -> dict[str, Scalar]:
        """Return those of its settings, flat, that decide the bits of a state."""
        return decisive(self.settings(), is_recipe=self.trains_recipe())

    def archive(self) -> bytes:
        """Return the snapshot of its code.

        Raises:
            UserError: what it kept is none.
        """
        name = "code/snapshot.zip"
        archive = self._kept(name)
        if not zipfile.is_zipfile(io.BytesIO(archive)):
            raise UserError(f"{self._place(name)}: not an archive of code")
        return archive

    def git(self) -> str:
        """Return the facts beside its code, as JSON."""
        return self._kept("code/git.json").decode()

    def command(self) -> Command:
        """Return how it was started.

        Raises:
            UserError: what it kept of that is damaged.
        """
        return self._read("code/command.json", "how a process was started", Command.read)

    def environment(self) -> Environment:
        """Return what it ran in.

        Raises:
            UserError: what it kept of that is damaged.
        """
        system = self._read("environment/system.json", "what a process ran in", read_system)
        return self._read("environment/requirements.txt", "distributions", lambda text: Environment.read(text, system))

    def lineage(self) -> str:
        """Return where its data came from, as JSON."""
        return self._kept("data/lineage.json").decode()

    def data_lock(self) -> str | None:
        """Return the ``dvc.lock`` of its data, or None."""
        if "dvc.lock" not in artifact_names(self.run_id, f"{self.folder}data"):
            return None
        return self._kept("data/dvc.lock").decode()

    def record(self, checkpoint: Checkpoint | None) -> str:
        """Return ``segment.json`` of the segment that goes on from ``checkpoint`` in this process."""
        content = {
            "segment": self.number,
            "checkpoint": None if checkpoint is None else checkpoint.directory.name,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "branches": [
                {
                    "segment": branch.segment,
                    "checkpoint": branch.checkpoint,
                    "changes": {name: {"was": was, "is": now} for name, (was, now) in branch.changes.items()},
                    "recorded": branch.recorded,
                }
                for branch in self.branches
            ],
        }
        return json.dumps(content, indent=1) + "\n"

    def _kept(self, name: str) -> bytes:
        return artifact_bytes(self.run_id, f"{self.folder}{name}")

    def _read(self, name: str, what: str, read: Callable[[str], T]) -> T:
        content = self._kept(name)
        try:
            return read(content.decode())
        except (YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self._place(name)}: not {what} ({error!r})") from error

    def _place(self, name: str) -> str:
        return f"runs:/{self.run_id}/{self.folder}{name}"

    def _since(self, checkpoint: Checkpoint | None) -> list[Branch]:
        known = 0
        if checkpoint is not None:
            place = f"{checkpoint.directory / MANIFEST}: the digest '{BRANCH}'"
            known = whole_number(checkpoint.digests.get(BRANCH, 1), place)
        return [branch for branch in self.branches if branch.segment > known]


def newest_segment(run: Run) -> Segment:
    """Return the newest segment of a run that began to train.

    Raises:
        UserError: what it has recorded cannot be read.
    """
    run_id = str(run.info.run_id)
    for number in range(number_of(run, SEGMENTS, 1), 1, -1):
        folder = Segment(run_id, number).folder
        if RECORD in artifact_names(run_id, folder.rstrip("/")):
            record = artifact_bytes(run_id, f"{folder}{RECORD}")
            return Segment(run_id, number, _branches(record, f"runs:/{run_id}/{folder}{RECORD}"))
    return Segment(run_id)


def steps_gone_on_from(run: Run) -> frozenset[int]:
    """Return the optimizer steps of the checkpoints that later segments of a run began from; 0 where one began anew."""
    run_id, found = str(run.info.run_id), set()
    for number in range(2, number_of(run, SEGMENTS, 1) + 1):
        folder = Segment(run_id, number).folder
        if RECORD in artifact_names(run_id, folder.rstrip("/")):
            position = position_of(json.loads(artifact_bytes(run_id, f"{folder}{RECORD}"))["checkpoint"] or "")
            found.add(0 if position is None else position[0])
    return frozenset(found)


def steps_of_ends(run: Run, last: int) -> range:
    """Return the optimizer steps below ``last`` at which a run may have been at an end before it was given more epochs.

    Where the checkpoint of an end was broken, the run has gone on from one before it.
    """
    return range(min(steps_gone_on_from(run), default=last), last)


def _branches(record: bytes, place: str) -> tuple[Branch, ...]:
    try:
        return tuple(
            Branch(
                int(item["segment"]),
                item["checkpoint"],
                {str(name): (str(change["was"]), str(change["is"])) for name, change in item["changes"].items()},
                int(item["recorded"]),
            )
            for item in json.loads(record)["branches"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: not the record of a segment ({error!r})") from error
