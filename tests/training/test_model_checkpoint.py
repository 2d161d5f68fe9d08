import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization import durable
from sonosco_mlflow.serialization.checkpoint import (
    BrokenCheckpointError,
    checkpoints_in,
    position_of,
    read_checkpoint,
    verify_checkpoint,
)
from sonosco_mlflow.serialization.serializer import Deserializer
from sonosco_mlflow.training.callbacks import Callback, EarlyStopping, History, ModelCheckpoint
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation
from toy import ToyModel, tone_loader

BATCHES = 4


def new_trainer(manifest: Manifest, *callbacks: Callback, **settings: Any) -> ModelTrainer:
    torch.manual_seed(7)
    return ModelTrainer(
        ToyModel(),
        train_loader=tone_loader(manifest[:BATCHES], frames_per_batch=1),
        val_loader=tone_loader(manifest[4:6], seed=None),
        callbacks=callbacks,
        **{"epochs": 3, **settings},
    )


def steps_in(folder: Path) -> list[int]:
    return [read_checkpoint(path).step for path in checkpoints_in(folder)]


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def resumed_from(path: Path, folder: Path, trainer: ModelTrainer) -> ModelTrainer:
    """A trainer as it was at ``path``, that saves into ``folder``."""
    resumed = Deserializer().deserialize(path, train_loader=trainer.train_loader, val_loader=trainer.val_loader)
    assert isinstance(resumed, ModelTrainer)
    keeper = resumed.callbacks[-1]
    assert isinstance(keeper, ModelCheckpoint)
    keeper.directory = folder
    return resumed


class Scripted(Callback):
    """Puts losses of the test's choice in the place of the real ones."""

    def __init__(self, losses: list[float], every_steps: int = BATCHES) -> None:
        self.losses = losses
        self.every_steps = every_steps

    def on_validation_end(self, trainer: ModelTrainer, validation: Validation) -> None:
        validation.metrics["val_loss"] = self.losses[trainer.progress.step // self.every_steps - 1]


def test_epochs_end_in_a_checkpoint_and_the_last_and_best_are_kept(tone_manifest: Manifest, checkpoints: Path) -> None:
    losses = [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]
    callback = ModelCheckpoint(checkpoints, keep_last=2, keep_best=2)
    saved: list[tuple[str, frozenset[str]]] = []
    callback.listeners.append(lambda path, kept: saved.append((path.name, kept)))
    new_trainer(tone_manifest, Scripted(losses), callback, epochs=6).start_training()
    assert [name for name, _ in saved] == [f"step-{step:08d}" for step in (0, 4, 8, 12, 16, 20, 24)]
    assert [name for name, kept in saved if name not in kept] == []
    assert saved[-1][1] == callback.kept == {path.name for path in checkpoints_in(checkpoints)}
    assert steps_in(checkpoints) == [8, 12, 20, 24]


def test_nan_is_never_the_best(tone_manifest: Manifest, checkpoints: Path) -> None:
    losses = [float("nan"), 9.0, float("nan"), float("nan"), float("nan")]
    callback = ModelCheckpoint(checkpoints, keep_last=2, keep_best=1)
    new_trainer(tone_manifest, Scripted(losses), callback, epochs=5).start_training()
    assert steps_in(checkpoints) == [8, 16, 20]


def test_every_few_steps_and_each_step_once(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=3, keep_last=99)
    saved: list[str] = []
    callback.listeners.append(lambda path, kept: saved.append(path.name))
    new_trainer(tone_manifest, callback).start_training()
    assert steps_in(checkpoints) == [3, 4, 6, 8, 9, 12]
    assert saved == [f"step-{step:08d}" for step in (0, 3, 4, 6, 8, 9, 12)]


def test_every_few_epochs_or_not_at_their_ends(tone_manifest: Manifest, tmp_path: Path) -> None:
    for every, expected in ((1, [4, 8, 12, 16, 20]), (2, [8, 16, 20]), (3, [12, 20]), (None, [20])):
        folder = tmp_path / str(every)
        callback = ModelCheckpoint(folder, every_epochs=every, keep_last=99, keep_best=0)
        new_trainer(tone_manifest, callback, epochs=5).start_training()
        assert steps_in(folder) == expected


def test_every_so_manieth_step_is_kept_for_good(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1, keep_every_steps=5, keep_best=0)
    new_trainer(tone_manifest, callback).start_training()
    assert steps_in(checkpoints) == [5, 10, 11, 12]


def test_of_equals_the_earlier_is_the_best(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, keep_best=1)
    new_trainer(tone_manifest, Scripted([2.0, 1.0, 1.0, 1.0, 1.0]), callback, epochs=5).start_training()
    assert steps_in(checkpoints) == [8, 16, 20]


def test_accumulation_saves_between_steps_only(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1, keep_last=99)
    new_trainer(tone_manifest, callback, accumulation=3, epochs=2).start_training()
    states = [read_checkpoint(path).state["trainer"] for path in checkpoints_in(checkpoints)]
    assert [(state["progress"]["epoch"], state["progress"]["batch"]) for state in states] == [
        *((0, 3), (1, 0)),
        *((1, 3), (2, 0)),
    ]
    assert all(state["gradients"] == {} for state in states)


def written(trainer: ModelTrainer) -> Path:
    """The folder of checkpoints, once all that was handed in for it is written."""
    keeper = trainer.callbacks[-1]
    assert isinstance(keeper, ModelCheckpoint)
    assert keeper.background is not None
    assert keeper.directory is not None
    keeper.background.finish_writes()
    return keeper.directory


class Looking(Callback):
    """Notes which checkpoints stand at each safe point, all of them written."""

    def __init__(self) -> None:
        self.found: list[list[tuple[int, int] | None]] = []

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        self.found.append([position_of(path.name) for path in checkpoints_in(written(trainer))])


def test_the_start_is_saved_until_newer_ones_stand(tone_manifest: Manifest, checkpoints: Path) -> None:
    looking = Looking()
    trainer = new_trainer(tone_manifest, ModelCheckpoint(checkpoints, every_steps=2, keep_best=0), epochs=2)
    trainer.attach(looking)
    trainer.start_training()
    assert looking.found == [
        *([(0, 0)], [(0, 0), (2, 0)], [(0, 0), (2, 0)], [(2, 0), (4, 0)], [(2, 0), (4, 0)]),
        *([(4, 0), (6, 0)], [(4, 0), (6, 0)], [(6, 0), (8, 0)]),
    ]


def test_every_few_minutes_also_within_a_step_and_until_the_end_only(
    tone_manifest: Manifest, checkpoints: Path
) -> None:
    always = ModelCheckpoint(checkpoints / "always", every_minutes=1e-9, keep_best=0)
    looking = Looking()
    trainer = new_trainer(tone_manifest, always, epochs=1, accumulation=3)
    trainer.attach(looking)
    trainer.start_training()
    assert looking.found == [
        *([(0, 0), (0, 1)], [(0, 1), (0, 2)], [(0, 2), (1, 0)], [(2, 0)]),
    ]
    assert always.kept == {"step-00000002"}
    seldom = ModelCheckpoint(checkpoints / "seldom", every_minutes=60.0, keep_last=99)
    new_trainer(tone_manifest, seldom, epochs=1).start_training()
    assert steps_in(checkpoints / "seldom") == [4]


def test_a_validation_that_ranks_is_saved_also_in_mid_epoch(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, keep_best=1)
    losses = Scripted([1.0, 5.0, 5.0, 5.0], every_steps=2)
    trainer = new_trainer(tone_manifest, losses, callback, validate_every_steps=2, epochs=2)
    trainer.start_training()
    assert steps_in(checkpoints) == [2, 4, 8]


def test_an_early_stop_is_saved(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, keep_best=0)
    stopping = EarlyStopping(patience=1, minimum_change=1e9)
    trainer = new_trainer(tone_manifest, stopping, callback, validate_every_steps=1)
    trainer.start_training()
    assert trainer.progress.batch == 2
    assert steps_in(checkpoints) == [2]
    resumed = Deserializer().deserialize(checkpoints, train_loader=trainer.train_loader, val_loader=trainer.val_loader)
    assert resumed.stop_reason == trainer.stop_reason
    assert resumed.finished


def test_the_saved_state_counts_the_checkpoint_itself(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1)
    new_trainer(tone_manifest, callback).start_training()
    newest = read_checkpoint(checkpoints_in(checkpoints)[-1])
    assert newest.state["trainer"]["callbacks"]["ModelCheckpoint"] == callback.state_dict()
    assert set(callback.state_dict()["kept"]) == set(steps_in(checkpoints))  # type: ignore[call-overload]


class Copying(Callback):
    """Copies all that stands in the folder at each safe point, as a crash would find it."""

    def __init__(self, copies: Path) -> None:
        self.copies = copies

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        shutil.copytree(written(trainer), self.copies / f"{trainer.progress.micro_step:04d}")


@pytest.mark.parametrize(
    "settings",
    [{"every_steps": 3, "keep_best": 2}, {"every_minutes": 1e-9, "every_epochs": 2, "keep_every_steps": 3}],
    ids=["scheduled", "extra"],
)
def test_a_run_resumed_from_any_checkpoint_keeps_the_same_ones_with_the_same_bytes(
    settings: dict[str, Any], tone_manifest: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    trainer = new_trainer(
        *(tone_manifest, History(), ModelCheckpoint(folder, **settings)),
        accumulation=3,
        validate_every_steps=1,
        epochs=2,
    )
    trainer.attach(Copying(tmp_path / "copies"))
    trainer.start_training()
    expected = files_in(folder)
    assert {name.split("/")[1] for name in expected} >= {"manifest.json", "objects.json", "state.json"}
    copies = sorted((tmp_path / "copies").iterdir())
    for copied in copies:
        # The newest; and the one before it, as when the newest turned out to be broken and was put aside.
        for age in (1, 2)[: len(checkpoints_in(copied))]:
            again = Path(shutil.copytree(copied, tmp_path / "again"))
            *_, start = checkpoints_in(again)[: -age + 1 or None]
            for path in checkpoints_in(again)[-age + 1 :] if age > 1 else []:
                shutil.rmtree(path)
            resumed_from(start, again, trainer).continue_training()
            assert files_in(again) == expected, f"{start.name} at {copied.name}"
            shutil.rmtree(again)
    assert len(copies) == trainer.progress.micro_step


def test_what_a_crash_left_is_cleared_when_training_goes_on(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1, keep_best=0)
    trainer = new_trainer(tone_manifest, callback, epochs=1)
    trainer.start_training()
    expected = files_in(checkpoints)
    # The last crash came between writing and removing.
    for name in ("step-00000000", "step-00000002", "step-00000003.0001"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "file").touch()
    for name in (".partial-step-00000009", ".removing-step-00000001"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "file").touch()
    resumed_from(sorted(checkpoints.glob("step-*"))[-1], checkpoints, trainer).continue_training()
    assert files_in(checkpoints) == expected


class SavesItself(Callback):
    """A user's callback that asks for a save at every safe point."""

    asks = True

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        keeper = trainer.callbacks[-1]
        assert isinstance(keeper, ModelCheckpoint)
        if self.asks:
            verify_checkpoint(keeper.save(trainer))


def test_a_save_that_was_asked_for_changes_nothing_of_those_on_schedule(
    tone_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for asks in (True, False):
        monkeypatch.setattr(SavesItself, "asks", asks)
        folder = tmp_path / str(asks)
        new_trainer(
            tone_manifest, SavesItself(), ModelCheckpoint(folder, every_steps=3), accumulation=2
        ).start_training()
        found.append(files_in(folder))
    assert found[0] == found[1]


def test_a_stop_within_a_step_is_saved(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, keep_best=0)
    trainer = new_trainer(tone_manifest, StopsAt(6), callback, accumulation=3)
    trainer.start_training()
    assert [path.name for path in checkpoints_in(checkpoints)] == ["step-00000002", "step-00000002.0002"]
    assert callback.save(trainer).is_dir()
    before = files_in(checkpoints)
    resumed_from(checkpoints, checkpoints, trainer).continue_training()
    assert files_in(checkpoints) == before


class StopsAt(Callback):
    def __init__(self, micro_step: int) -> None:
        self.micro_step = micro_step

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        if trainer.progress.micro_step == self.micro_step:
            trainer.stop_training("as asked")


def test_nothing_is_removed_when_the_newer_one_proves_broken(
    tone_manifest: Manifest, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1, keep_best=0)
    trainer = new_trainer(tone_manifest, callback)
    healthy = durable.write_bytes

    def failing_disk(path: Path, content: bytes) -> None:
        broken = "step-00000003" in str(path) and path.name == "model.safetensors"
        healthy(path, content[:-1] + b"\xff" if broken else content)

    monkeypatch.setattr("sonosco_mlflow.serialization.checkpoint.write_bytes", failing_disk)
    with pytest.raises(BrokenCheckpointError, match=r"step-00000003/model\.safetensors: altered"):
        trainer.start_training()
    assert [path.name for path in checkpoints_in(checkpoints)] == [f"step-{step:08d}" for step in (1, 2, 3)]
    with pytest.warns(UserWarning, match="passed over a broken checkpoint: .*step-00000003"):
        resumed = Deserializer().deserialize(
            checkpoints, train_loader=trainer.train_loader, val_loader=trainer.val_loader
        )
    assert resumed.progress.step == 2


ERRORS: dict[str, type[BaseException]] = {error.__name__: error for error in (ValueError, OSError, KeyboardInterrupt)}


class Raises(Callback):
    """Raises at one micro-step, in the event of the test's choice."""

    def __init__(self, event: str, micro_step: int, error: str = "ValueError") -> None:
        self.event = event
        self.micro_step = micro_step
        self.error = error

    def strike(self, event: str, trainer: ModelTrainer) -> None:
        if event == self.event and trainer.progress.micro_step == self.micro_step:
            raise ERRORS[self.error]("on purpose")

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        self.strike("on_safe_point", trainer)

    def on_step_end(self, trainer: ModelTrainer) -> None:
        self.strike("on_step_end", trainer)

    def on_metrics(self, trainer: ModelTrainer, metrics: Any) -> None:
        self.strike("on_metrics", trainer)


def test_an_interrupt_within_a_step_loses_nothing(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1)
    trainer = new_trainer(tone_manifest, callback, accumulation=2)
    trainer.attach(Raises("on_safe_point", 3, "KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        trainer.start_training()
    path = checkpoints / "step-00000001.0001"
    assert checkpoints_in(checkpoints)[-1] == path
    state = read_checkpoint(path).state["trainer"]
    assert state["progress"]["micro_step"] == 3
    assert state["gradients"]
    assert state["callbacks"]["ModelCheckpoint"]["kept"] == [1]
    before = files_in(checkpoints)
    assert callback.save(trainer) == path
    assert files_in(checkpoints) == before


@pytest.mark.parametrize(
    ("micro_step", "error"), [(1, "ValueError"), (3, "ValueError"), (4, "KeyboardInterrupt"), (12, "ValueError")]
)
def test_whenever_it_is_stopped_at_a_safe_point_it_goes_on_to_the_same_end(
    micro_step: int, error: str, tone_manifest: Manifest, tmp_path: Path
) -> None:
    """By a callback that is called before the checkpoint: a save on schedule may be due, or not."""
    ends = []
    for number in (1000, micro_step):
        folder = tmp_path / str(number)
        callbacks = (Raises("on_safe_point", number, error), ModelCheckpoint(folder, every_steps=2))
        trainer = new_trainer(tone_manifest, *callbacks, accumulation=2)
        if number == micro_step:
            with pytest.raises(ERRORS[error], match="on purpose"):
                trainer.start_training()
            trainer = resumed_from(folder, folder, trainer)
            trainer.callbacks[0].micro_step = 1000  # type: ignore[attr-defined]
        trainer.continue_training()
        ends.append({name: content for name, content in files_in(folder).items() if "objects" not in name})
        # A state that lacks what the failed one missed is kept for its weights.
        apart = ("manifest", "failed/")
        ends[-1] = {name: content for name, content in ends[-1].items() if not any(word in name for word in apart)}
    assert ends[0] == ends[1]


@pytest.mark.parametrize("event", ["on_step_end", "on_metrics"])
def test_a_state_that_lacks_what_a_failed_callback_missed_is_kept_apart(
    event: str, tone_manifest: Manifest, checkpoints: Path
) -> None:
    trainer = new_trainer(tone_manifest, Raises(event, 6), ModelCheckpoint(checkpoints))
    with pytest.raises(ValueError, match="on purpose"):
        trainer.start_training()
    assert steps_in(checkpoints) == [0, 4]
    assert steps_in(checkpoints / "failed") == [6]
    resumed = resumed_from(checkpoints, checkpoints, trainer)
    assert resumed.progress.step == 4


@pytest.mark.parametrize("others", [(), (Raises("on_step_end", 5),)], ids=["alone", "after another"])
def test_a_state_in_the_middle_of_a_step_is_not_kept(
    others: tuple[Callback, ...], tone_manifest: Manifest, checkpoints: Path
) -> None:
    trainer = new_trainer(tone_manifest, *others, ModelCheckpoint(checkpoints))
    trainer.attach(Raises("on_metrics", 5, "OSError"))
    with pytest.raises(OSError, match="on purpose"):
        trainer.start_training()
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-00000000", "step-00000004"]


def test_without_a_directory_it_warns_and_saves_nothing(
    tone_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = ModelCheckpoint(every_steps=1, every_minutes=1e-9)
    trainer = new_trainer(tone_manifest, callback, epochs=1)
    with pytest.warns(UserWarning, match="nothing is saved: ModelCheckpoint has no directory"):
        trainer.start_training()
    with pytest.raises(UserError, match="no directory to save into"):
        callback.save(trainer)
    assert list(tmp_path.iterdir()) == []
    assert callback.kept == frozenset()


class FullDisk:
    """Stands for the module ``os``: nothing can be written."""

    def __getattr__(self, name: str) -> Any:
        return self.write if name == "write" else getattr(os, name)

    def write(self, descriptor: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")


class FillsTheDisk(Callback):
    """Fills it in step 6, and holds step 7 until the writing of step 6 has failed."""

    def __init__(self) -> None:
        self.patch: pytest.MonkeyPatch | None = None
        self.reached: list[int] = []

    def on_step_end(self, trainer: ModelTrainer) -> None:
        self.reached.append(trainer.progress.step)
        if self.patch is None:
            return
        keeper = trainer.callbacks[-1]
        assert isinstance(keeper, ModelCheckpoint)
        assert keeper.background is not None
        if trainer.progress.step == 6:
            keeper.background.finish_writes()
            self.patch.setattr(durable, "os", FullDisk())
        elif trainer.progress.step == 7:
            with suppress(OSError):
                keeper.background.finish_writes()


def test_a_full_disk_is_told_at_the_next_step_and_costs_no_older_checkpoint(
    tone_manifest: Manifest, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filling = FillsTheDisk()
    filling.patch = monkeypatch
    callback = ModelCheckpoint(checkpoints, every_steps=3, keep_best=0)
    trainer = new_trainer(tone_manifest, callback)
    trainer.attach(filling)
    threads = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        trainer.start_training()
    # Asked at each step: seen at the first one after the writing failed.
    assert filling.reached[-1] == 7
    assert steps_in(checkpoints) == [3, 4]
    monkeypatch.setattr(durable, "os", os)
    filling.patch = None
    for _ in range(100):
        if threading.active_count() <= threads:
            break
        time.sleep(0.001)
    assert threading.active_count() <= threads, "its thread is left behind"
    # There is room again: the same trainer goes on.
    trainer.continue_training()
    assert steps_in(checkpoints)[-2:] == [9, 12]


def test_the_time_that_saving_holds_up_the_training_is_measured(
    tone_manifest: Manifest, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    callback = ModelCheckpoint(checkpoints)
    snapshot = callback.serializer.snapshot

    def slow(*arguments: Any, **options: Any) -> Any:
        nonlocal now
        now += 3.0
        return snapshot(*arguments, **options)

    monkeypatch.setattr(callback.serializer, "snapshot", slow)
    monkeypatch.setattr("sonosco_mlflow.training.callbacks.model_checkpoint.time", Clock(lambda: now))
    new_trainer(tone_manifest, callback).start_training()
    assert callback.stall_seconds == 4 * 3.0, "at the start, and at the end of each epoch"


class Clock:
    def __init__(self, now: Any) -> None:
        self.perf_counter = self.monotonic = now


def test_a_trainer_that_cannot_be_written_down_is_refused_before_it_trains(
    tone_manifest: Manifest, checkpoints: Path
) -> None:
    trainer = new_trainer(tone_manifest, ModelCheckpoint(checkpoints), loss=lambda model, batch: model(batch).loss)
    with pytest.raises(UserError, match="loss is a lambda"):
        trainer.start_training()
    assert trainer.progress.micro_step == 0


def test_it_must_come_last(tone_manifest: Manifest, checkpoints: Path) -> None:
    with pytest.raises(UserError, match="must be the last"):
        new_trainer(tone_manifest, ModelCheckpoint(checkpoints), History()).start_training()
    trainer = new_trainer(tone_manifest, History())
    trainer.attach(ModelCheckpoint(checkpoints))
    with pytest.raises(UserError, match="must be the last"):
        trainer.start_training()


def test_one_checkpoint_alone_is_not_enough(checkpoints: Path) -> None:
    with pytest.raises(UserError, match="keep_last is 1, expected at least 2"):
        ModelCheckpoint(checkpoints, keep_last=1)


def test_digests_are_written_beside_the_state(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints)
    callback.digests = {"config": "ab12"}
    new_trainer(tone_manifest, callback, epochs=1).start_training()
    assert read_checkpoint(checkpoints_in(checkpoints)[0]).digests == {"config": "ab12"}


def test_a_model_that_cannot_be_described_is_given_anew(tone_manifest: Manifest, checkpoints: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return Unmarked(hidden=4)

    trainer = ModelTrainer(
        model(), mean_loss, train_loader=tone_loader(tone_manifest), callbacks=[ModelCheckpoint(checkpoints)], epochs=1
    )
    with pytest.warns(UserWarning, match="deserialize needs the model itself"):
        trainer.start_training()
    deserializer = Deserializer(trusted=[__name__, "toy"])
    with pytest.raises(UserError, match="'model' must be given"):
        deserializer.deserialize(checkpoints, train_loader=tone_loader(tone_manifest))
    restored = deserializer.deserialize(checkpoints, train_loader=tone_loader(tone_manifest), model=model())
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, restored.model.state_dict()[name])


class Unmarked(nn.Sequential):
    """A user's model whose class is not marked @serializable."""

    def __init__(self, hidden: int) -> None:
        super().__init__(nn.Linear(8, hidden), nn.Dropout(0.5), nn.Linear(hidden, 1))


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(batch.features).square().mean()
    return loss


class CountsSafePoints(Callback):
    """A schedule of the user's own."""

    def __init__(self) -> None:
        self.count = 0

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        self.count += 1

    def learning_rate_factor(self, trainer: ModelTrainer) -> float:
        return 1 / (1 + self.count)

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count}


def test_a_failure_at_a_safe_point_leaves_no_ordinary_checkpoint(tone_manifest: Manifest, checkpoints: Path) -> None:
    others = (Raises("on_safe_point", 6), CountsSafePoints())
    trainer = new_trainer(tone_manifest, *others, ModelCheckpoint(checkpoints, every_steps=3))
    with pytest.raises(ValueError, match="on purpose"):
        trainer.start_training()
    assert steps_in(checkpoints) == [3, 4]
    assert steps_in(checkpoints / "failed") == [6]
    assert read_checkpoint(checkpoints / "failed" / "step-00000006").state["trainer"]["callbacks"][
        "CountsSafePoints"
    ] == {"count": 6}, "those after it have seen the whole step"


def test_checkpoints_of_another_training_are_put_aside(tone_manifest: Manifest, checkpoints: Path) -> None:
    new_trainer(tone_manifest, ModelCheckpoint(checkpoints, keep_best=0)).start_training()
    before = {name: content for name, content in files_in(checkpoints).items() if name.startswith("step-00000012/")}
    with pytest.warns(UserWarning, match="held 2 checkpoints of another training; they are put aside"):
        new_trainer(tone_manifest, ModelCheckpoint(checkpoints, keep_best=0), seed=1, epochs=1).start_training()
    assert steps_in(checkpoints) == [4]
    after = files_in(checkpoints)
    assert {name: after[f"broken-step-00000012-1/{name.split('/')[1]}"] for name in before} == before


def test_an_end_off_the_schedule_is_kept_until_more_epochs_come(tone_manifest: Manifest, tmp_path: Path) -> None:
    found = []
    for first in (6, 3):
        folder = tmp_path / str(first)
        callback = ModelCheckpoint(folder, every_epochs=2, keep_last=3, keep_best=0)
        trainer = new_trainer(tone_manifest, callback, epochs=first)
        trainer.start_training()
        if first < 6:
            assert steps_in(folder) == [8, 12]
            trainer = resumed_from(folder, folder, trainer)
            trainer.epochs = 6
            trainer.continue_training()
        found.append(steps_in(folder))
    assert found[0] == found[1] == [8, 16, 24]


class SavesWithinAStep(Callback):
    def on_step_end(self, trainer: ModelTrainer) -> None:
        keeper = trainer.callbacks[-1]
        assert isinstance(keeper, ModelCheckpoint)
        keeper.save(trainer)


def test_a_save_in_the_middle_of_a_step_is_refused(tone_manifest: Manifest, checkpoints: Path) -> None:
    trainer = new_trainer(tone_manifest, SavesWithinAStep(), ModelCheckpoint(checkpoints))
    with pytest.raises(UserError, match=r"in the middle of a step.* save in on_safe_point"):
        trainer.start_training()
    assert steps_in(checkpoints) == [0]


def test_a_save_writes_what_there_is_now(tone_manifest: Manifest, checkpoints: Path) -> None:
    keeper = ModelCheckpoint(checkpoints)
    trainer = new_trainer(tone_manifest, keeper, epochs=1)
    trainer.start_training()
    trainer.epochs = 5
    with torch.no_grad():
        trainer.model.get_parameter("inner.bias").fill_(0.25)
    path = keeper.save(trainer)
    read = read_checkpoint(path)
    assert read.objects["parameters"]["epochs"] == 5
    assert read.state["model"]["inner.bias"].unique().tolist() == [0.25]
    keeper.directory = checkpoints.with_name("elsewhere")
    assert read_checkpoint(keeper.save(trainer)).step == trainer.progress.step
