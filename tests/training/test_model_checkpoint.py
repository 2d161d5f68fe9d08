import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization import durable
from sonosco_mlflow.serialization.checkpoint import BrokenCheckpointError, checkpoints_in, read_checkpoint
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
    saved: list[Path] = []
    callback.listeners.append(saved.append)
    new_trainer(tone_manifest, Scripted(losses), callback, epochs=6).start_training()
    assert [read_checkpoint(path).step for path in saved if path.exists()] == steps_in(checkpoints)
    assert [path.name for path in saved] == [f"step-{step:08d}" for step in (4, 8, 12, 16, 20, 24)]
    assert steps_in(checkpoints) == [8, 12, 20, 24]


def test_nan_is_never_the_best(tone_manifest: Manifest, checkpoints: Path) -> None:
    losses = [float("nan"), 9.0, float("nan"), float("nan"), float("nan")]
    callback = ModelCheckpoint(checkpoints, keep_last=2, keep_best=1)
    new_trainer(tone_manifest, Scripted(losses), callback, epochs=5).start_training()
    assert steps_in(checkpoints) == [8, 16, 20]


def test_every_few_steps_and_each_step_once(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=3, keep_last=99)
    saved: list[Path] = []
    callback.listeners.append(saved.append)
    new_trainer(tone_manifest, callback).start_training()
    assert steps_in(checkpoints) == [3, 4, 6, 8, 9, 12]
    assert len(saved) == 6


def test_accumulation_saves_between_steps_only(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1, keep_last=99)
    new_trainer(tone_manifest, callback, accumulation=3, epochs=2).start_training()
    states = [read_checkpoint(path).state["trainer"] for path in checkpoints_in(checkpoints)]
    assert [(state["progress"]["epoch"], state["progress"]["batch"]) for state in states] == [
        *((0, 3), (1, 0)),
        *((1, 3), (2, 0)),
    ]
    assert all(state["gradients"] == {} for state in states)


def test_every_few_minutes(tone_manifest: Manifest, checkpoints: Path) -> None:
    always = ModelCheckpoint(checkpoints / "always", every_minutes=1e-9, keep_last=99)
    new_trainer(tone_manifest, always, epochs=1).start_training()
    assert steps_in(checkpoints / "always") == [1, 2, 3, 4]
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
    resumed = Deserializer().deserialize(checkpoints, train_loader=trainer.train_loader, val_loader=trainer.val_loader)
    assert resumed.stop_reason == trainer.stop_reason
    assert resumed.finished


def test_the_saved_state_counts_the_checkpoint_itself(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1)
    new_trainer(tone_manifest, callback).start_training()
    newest = read_checkpoint(checkpoints_in(checkpoints)[-1])
    assert newest.state["trainer"]["callbacks"]["ModelCheckpoint"] == callback.state_dict()
    assert set(callback.state_dict()["kept"]) == set(steps_in(checkpoints))  # type: ignore[call-overload]


def test_a_run_resumed_from_any_checkpoint_keeps_the_same_ones_with_the_same_bytes(
    tone_manifest: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    callback = ModelCheckpoint(folder, every_steps=3, keep_best=2)
    trainer = new_trainer(tone_manifest, History(), callback)
    copies = []

    def copy(path: Path) -> None:
        copies.append(Path(shutil.copytree(folder, tmp_path / f"at-{path.name}")))

    callback.listeners.append(copy)
    trainer.start_training()
    expected = {path: path.read_bytes() for path in sorted(folder.glob("*/*")) if path.name != "objects.json"}
    assert expected

    for copied in copies:
        shutil.rmtree(folder)
        copied.rename(folder)
        resumed = Deserializer().deserialize(folder, train_loader=trainer.train_loader, val_loader=trainer.val_loader)
        resumed.continue_training()
        found = {path: path.read_bytes() for path in sorted(folder.glob("*/*")) if path.name != "objects.json"}
        assert found == expected


def test_what_a_crash_left_is_cleared_when_training_goes_on(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1)
    trainer = new_trainer(tone_manifest, callback, epochs=1)
    trainer.start_training()
    dropped = callback.state_dict()["dropped"]
    assert dropped == [1] or dropped == [2]
    # As a crash between writing and removing would have left it.
    not_removed = checkpoints / f"step-{dropped[0]:08d}"  # type: ignore[index]
    for name in (not_removed.name, ".partial-step-00000009", ".removing-step-00000001"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "file").touch()
    resumed = Deserializer().deserialize(
        sorted(checkpoints.glob("step-*"))[-1], train_loader=trainer.train_loader, val_loader=trainer.val_loader
    )
    resumed.continue_training()
    assert [path.name for path in sorted(checkpoints.iterdir())] == [
        checkpoint.name for checkpoint in checkpoints_in(checkpoints)
    ]


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
    assert len(checkpoints_in(checkpoints)) == 3
    with pytest.warns(UserWarning, match="passed over a broken checkpoint: .*step-00000003"):
        resumed = Deserializer().deserialize(
            checkpoints, train_loader=trainer.train_loader, val_loader=trainer.val_loader
        )
    assert resumed.progress.step == 2


class InterruptedInside(Callback):
    def on_safe_point(self, trainer: ModelTrainer) -> None:
        if trainer.progress.micro_step == 3:
            raise KeyboardInterrupt


def test_save_in_the_middle_of_an_accumulation_loses_nothing(tone_manifest: Manifest, checkpoints: Path) -> None:
    callback = ModelCheckpoint(checkpoints, every_steps=1)
    trainer = new_trainer(tone_manifest, InterruptedInside(), callback, accumulation=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.start_training()
    assert steps_in(checkpoints) == [1]
    path = callback.save(trainer)
    assert path == callback.save(trainer) == checkpoints / "step-00000001"
    assert steps_in(checkpoints) == [1]
    state = read_checkpoint(path).state["trainer"]
    assert state["progress"]["micro_step"] == 3
    assert state["gradients"]


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
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 1))

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


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(batch.features).square().mean()
    return loss
