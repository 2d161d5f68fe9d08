"""The machine loses power at any moment, and with it anything that was not synced: no wrong state comes of it."""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from lossy_disk import LossyDisk, Operation, RecordingOs, choices
from proofs import Proof

from rich_trainer import maker
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization import durable
from sonosco_mlflow.serialization.checkpoint import checkpoints_in, position_of, read_newest_checkpoint
from sonosco_mlflow.testing import frozen_state
from sonosco_mlflow.tracking.journal import Journal, read_rows
from sonosco_mlflow.training.callbacks import Callback, History, ModelCheckpoint
from sonosco_mlflow.training.trainer import ModelTrainer


class States(Callback):
    """Keeps every state, as the one to expect; an observer, so after the checkpoint was taken of it."""

    def __init__(self) -> None:
        self.by_name: dict[tuple[int, int], Mapping[str, tuple[bytes, bytes]]] = {}
        self.rows: dict[tuple[int, int], int] = {}
        self.recorded = 0

    def on_train_begin(self, trainer: ModelTrainer) -> None:
        self.on_safe_point(trainer)

    def on_metrics(self, trainer: ModelTrainer, metrics: Mapping[str, float]) -> None:
        self.recorded += 1

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        position = (trainer.progress.step, trainer.batches_into_step)
        self.by_name[position] = frozen_state(trainer)
        self.rows[position] = self.recorded


@dataclass(frozen=True)
class Recorded:
    """A training on a disk that notes every operation; a mark says that a checkpoint was given out as written."""

    root: Path
    log: list[Operation]
    states: States


@pytest.fixture(scope="module")
def recorded(tone_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    root = tmp_path_factory.mktemp("disk")
    checkpoint = ModelCheckpoint(root / "run" / "checkpoints", every_steps=1)
    trainer = maker(tone_manifest, callbacks=lambda model: [History(), checkpoint])()
    journal, states, disk = Journal(root / "run" / "journal.jsonl", lambda rows: None), States(), RecordingOs()
    checkpoint.before_writing.append(journal.sync)
    checkpoint.listeners.append(lambda directory, kept: disk.mark(position_of(directory.name)))
    trainer.attach(journal)
    trainer.attach(states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "os", disk)
        trainer.start_training()
        journal.close()
    return Recorded(root, disk.log, states)


def broken_promise(folder: Path, promised: tuple[int, int] | None, states: States) -> str:
    """Return what is wrong with what was found after a crash, or an empty string."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            found = read_newest_checkpoint(folder / "run" / "checkpoints")
        except UserError as error:
            return "" if promised is None else f"{promised} was given out as written, and now: {error}"
    position = position_of(found.directory.name)
    assert position is not None
    if promised is not None and position < promised:
        return f"{promised} was given out as written, {position} is the newest whole one; {list(map(str, given))}"
    broken = [path.name for path in checkpoints_in(found.directory.parent) if position_of(path.name) > position]
    if any(not any(name in str(warning.message) for warning in given) for name in broken):
        return f"of the broken {broken} only {list(map(str, given))} is told"
    if _as_frozen(found.state) != states.by_name[position]:
        return f"the state at {position} is not the one that was saved"
    rows = len(read_rows(folder / "run" / "journal.jsonl"))
    if rows < states.rows[position]:
        return f"the checkpoint of {position} counts {states.rows[position]} rows, the journal has {rows}"
    return ""


class _State:
    def __init__(self, state: Mapping[str, object]) -> None:
        self._state = dict(state)

    def state_dict(self) -> dict[str, object]:
        return self._state


def _as_frozen(state: Mapping[str, object]) -> object:
    return frozen_state(_State(state))  # type: ignore[arg-type]


def crash_everywhere(recorded: Recorded, folder: Path, *, every: int, by_chance: int) -> tuple[int, list[str]]:
    """Let the power fail after every so many operations; return the number of disks tried, and what was wrong."""
    disk = LossyDisk(recorded.root)
    promised: tuple[int, int] | None = None
    tried, wrong = 0, []
    for number, operation in enumerate(recorded.log):
        disk.do(operation)
        if operation.name == "mark":
            promised = operation.detail
        elif number % every == 0:
            for name, choose in choices(number, by_chance):
                disk.crash(folder / "after", choose)
                if complaint := broken_promise(folder / "after", promised, recorded.states):
                    wrong.append(f"after operation {number} ({operation.name} {operation.target}), {name}: {complaint}")
                tried += 1
                shutil.rmtree(folder / "after")
    return tried, wrong


@pytest.mark.parametrize(
    ("every", "by_chance"), [(11, 1), pytest.param(1, 6, marks=pytest.mark.slow)], ids=["some", "everywhere"]
)
def test_the_power_fails(recorded: Recorded, tmp_path: Path, proof: Proof, every: int, by_chance: int) -> None:
    proof.tried, wrong = crash_everywhere(recorded, tmp_path, every=every, by_chance=by_chance)
    proof.runs, proof.equal = proof.tried, proof.tried - len(wrong)
    assert not wrong, f"{len(wrong)} of {proof.tried} disks:\n" + "\n".join(wrong[:10])


def test_a_disk_on_which_nothing_was_lost_is_the_disk(recorded: Recorded, tmp_path: Path) -> None:
    disk = LossyDisk(recorded.root)
    for operation in recorded.log:
        disk.do(operation)
    disk.crash(tmp_path / "after", lambda: 1.0)
    assert _contents(tmp_path / "after") == _contents(recorded.root)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
