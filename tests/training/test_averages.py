import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from torch import Tensor

from experiments import go_on, new_project, rows, run_experiment, toy_trainer
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.recipe import build_checkpoints, check_recipe
from sonosco_mlflow.serialization.checkpoint import BrokenCheckpointError, checkpoints_in, read_checkpoint
from sonosco_mlflow.serialization.serializer import Deserializer
from sonosco_mlflow.tracking.store import models_of
from sonosco_mlflow.training.averaging import borrowed_weights, evaluated_state, floating, mean_weights
from sonosco_mlflow.training.callbacks import Callback, CheckpointAverage, ExponentialAverage, ModelCheckpoint
from sonosco_mlflow.training.callbacks.averages import are_known
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation, evaluate
from toy import ToyModel, tone_loader


class Weights(Callback):
    """Keeps the model's own weights after each step, and what each validation gave."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_step_end(self, trainer: ModelTrainer) -> None:
        self.steps.append({name: tensor.clone() for name, tensor in floating(trainer.model).items()})

    def on_validation_end(self, trainer: ModelTrainer, validation: Validation) -> None:
        self.losses.append(validation.metrics["val_loss"])


def trainer_of(manifest: Manifest, *callbacks: Callback, **settings: Any) -> ModelTrainer:
    torch.manual_seed(0)
    model = ToyModel()
    return ModelTrainer(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
        train_loader=tone_loader(manifest[:10]),
        val_loader=tone_loader(manifest[10:14], seed=None),
        callbacks=callbacks,
        **{"epochs": 3, **settings},
    )


def loss_of(trainer: ModelTrainer, weights: dict[str, Tensor]) -> float:
    """The validation loss of a new model with those weights."""
    assert trainer.val_loader is not None
    model = ToyModel()
    model.load_state_dict({**model.state_dict(), **weights})
    return evaluate(model, trainer.val_loader, "val_").metrics["val_loss"]


# ------------------------------------------------------------------ for a while


def test_borrowed_weights_are_given_back_to_the_bit() -> None:
    model = ToyModel()
    tensors = model.state_dict()
    before = {name: tensor.clone() for name, tensor in tensors.items()}

    def borrow() -> None:
        with borrowed_weights(model, {"norm.running_mean": torch.full((16,), 3.0)}):
            assert model.get_buffer("norm.running_mean")[0] == 3.0
            assert torch.equal(model.get_parameter("inner.weight"), before["inner.weight"])
            raise KeyError

    with pytest.raises(KeyError):
        borrow()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    with borrowed_weights(model, None):
        assert torch.equal(model.get_parameter("inner.weight"), before["inner.weight"])


def test_a_mean_is_taken_in_double_precision_and_leaves_counters_out() -> None:
    first, other = (
        {"weight": torch.tensor([value], dtype=torch.float32), "count": torch.tensor(7)} for value in (1.0, 2.0**-24)
    )
    mean = mean_weights([first, other, other])
    assert mean.keys() == {"weight"}
    assert mean["weight"].dtype == torch.float32
    # In single precision, both small ones would be lost beside the large one.
    assert mean["weight"].item() == torch.tensor((1.0 + 2.0**-23) / 3, dtype=torch.float32).item()


# ------------------------------------------------------------------ of all steps


def test_validations_are_of_the_exponential_average(tone_manifest: Manifest) -> None:
    seen, plain = Weights(), Weights()
    trainer = trainer_of(tone_manifest, ExponentialAverage(0.5), seen)
    begin = {name: tensor.double().clone() for name, tensor in floating(trainer.model).items()}
    trainer.start_training()
    average, at_step = begin, []
    for step, weights in enumerate(seen.steps, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * weights[name].double() for name in average}
        at_step.append({name: tensor.float() for name, tensor in average.items()})
    per_epoch = len(at_step) // 3
    expected = [loss_of(trainer, at_step[epoch * per_epoch - 1]) for epoch in (1, 2, 3)]
    assert seen.losses == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(trainer.val_loader, "val_").metrics["val_loss"] == seen.losses[-1]  # type: ignore[arg-type]
    # The training itself knows nothing of it.
    without = trainer_of(tone_manifest, plain)
    without.start_training()
    assert plain.losses != seen.losses
    assert all(
        torch.equal(one[name], two[name]) for one, two in zip(plain.steps, seen.steps, strict=True) for name in one
    )


def test_an_average_that_has_never_trained_changes_nothing(tone_manifest: Manifest) -> None:
    trainer = trainer_of(tone_manifest, ExponentialAverage(0.5))
    found = trainer.evaluate(trainer.val_loader, "val_").metrics["val_loss"]  # type: ignore[arg-type]
    assert found == loss_of(trainer, floating(trainer.model))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=r"the decay of ExponentialAverage is .*, expected one between 0 and 1"):
        ExponentialAverage(decay)


# ------------------------------------------------------------------ of checkpoints


@pytest.mark.parametrize("which", ["last", "best"])
def test_the_final_model_is_the_mean_of_the_last_or_best_checkpoints(
    which: Any, tone_manifest: Manifest, checkpoints: Path
) -> None:
    kept = ModelCheckpoint(checkpoints, keep_last=4, keep_best=4)
    seen = Weights()
    trainer = trainer_of(tone_manifest, CheckpointAverage(which, 2), seen, kept, epochs=5)
    # The second epoch is the best and the last one the worst, whatever the model says.
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 0.0])
    kept.on_validation_end = lambda trainer, validation: kept._retention.rate(trainer.progress.step, next(losses))  # type: ignore[method-assign]
    trainer.start_training()
    per_epoch = trainer.progress.step // 5
    ends = [seen.steps[epoch * per_epoch - 1] for epoch in ((4, 5) if which == "last" else (2, 3))]
    expected = {name: ((ends[0][name].double() + ends[1][name].double()) / 2).float() for name in ends[0]}
    with trainer.evaluated_weights():
        found = {name: tensor.clone() for name, tensor in floating(trainer.model).items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert trainer.evaluate(trainer.val_loader, "test_").metrics["test_loss"] == loss_of(trainer, expected)  # type: ignore[arg-type]
    # The trainer itself, and its checkpoint, stay where they are.
    assert seen.losses[-1] == loss_of(trainer, seen.steps[-1])
    assert torch.equal(floating(trainer.model)["inner.weight"], seen.steps[-1]["inner.weight"])
    last = read_checkpoint(checkpoints_in(checkpoints)[-1])
    assert torch.equal(last.state["model"]["inner.weight"], seen.steps[-1]["inner.weight"])
    # With another epoch it is of others, and the trainer has gone on from its own weights.
    trainer.epochs = 6
    trainer.continue_training()
    with trainer.evaluated_weights():
        assert not torch.equal(floating(trainer.model)["inner.weight"], expected["inner.weight"])


def test_what_is_kept_is_enough_from_wherever_it_is_resumed(tone_manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def final(trainer: ModelTrainer) -> float:
        return trainer.evaluate(trainer.val_loader, "test_").metrics["test_loss"]  # type: ignore[arg-type]

    class Copying(Callback, is_part_of_trainer=False):
        def on_safe_point(self, trainer: ModelTrainer) -> None:
            keeper = trainer.callbacks[-1]
            assert isinstance(keeper, ModelCheckpoint)
            assert keeper.background is not None
            keeper.background.finish_writes()
            shutil.copytree(folder, tmp_path / "copies" / f"{trainer.progress.micro_step:04d}")

    settings: dict[str, Any] = {"validate_every_steps": 2}
    average, kept = CheckpointAverage("best", 3), ModelCheckpoint(folder, keep_best=3)
    trainer = trainer_of(tone_manifest, average, kept, **settings)
    trainer.attach(Copying())
    trainer.start_training()
    expected = final(trainer)
    copies = sorted((tmp_path / "copies").iterdir())
    for copy in copies:
        resumed = Deserializer().deserialize(copy, train_loader=trainer.train_loader, val_loader=trainer.val_loader)
        resumed.callbacks[-1].directory = copy
        resumed.continue_training()
        assert final(resumed) == expected, copy.name
    assert len(copies) == trainer.progress.micro_step


def test_a_run_that_goes_on_with_an_empty_disk_has_the_same_mean(
    tone_manifest: Manifest, tmp_path: Path, tracking_store: str
) -> None:
    project = new_project(tmp_path)
    whole = run_experiment(toy_trainer(tone_manifest, CheckpointAverage("last", 2), epochs=3), project)
    # The first of the two that are averaged stands by then, in MLflow alone.
    stop_at = whole.history.curve("train_loss")[0][-1] - 1
    stopped = run_experiment(
        toy_trainer(tone_manifest, CheckpointAverage("last", 2), epochs=3, stop_at=stop_at), project
    )
    assert mlflow.get_run(stopped.run.id).data.tags["sonosco.state"] == "interrupted"
    shutil.rmtree(stopped.folder)
    go_on(stopped.run.id, toy_trainer(tone_manifest, CheckpointAverage("last", 2), epochs=3), project)
    assert whole.test is not None
    name = "test_loss"
    step = max(step for key, step in rows(whole.run.id) if key == name)
    assert rows(stopped.run.id)[name, step] == rows(whole.run.id)[name, step] == [whole.test.metrics[name]]
    # The mean is not what the last checkpoint gives.
    assert whole.test.metrics[name] != whole.history.curve("val_loss")[1][-1]


def test_a_checkpoint_that_is_gone_is_named(tone_manifest: Manifest, checkpoints: Path) -> None:
    trainer = trainer_of(tone_manifest, CheckpointAverage("last", 2), ModelCheckpoint(checkpoints))
    trainer.start_training()
    gone = checkpoints_in(checkpoints)[0]
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=rf"{checkpoints}: holds no {gone.name}, which is to be averaged; put it back"):
        trainer.evaluate(trainer.val_loader, "test_")  # type: ignore[arg-type]


def test_a_broken_checkpoint_is_averaged_as_it_was_kept_elsewhere(tone_manifest: Manifest, checkpoints: Path) -> None:
    keeper = ModelCheckpoint(checkpoints)
    trainer_of(tone_manifest, keeper).start_training()
    step, whole = keeper.last_steps(1)[0], checkpoints.with_name("elsewhere")
    expected = keeper.model_state(step)
    shutil.copytree(checkpoints, whole)
    weights = checkpoints / f"step-{step:08d}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(BrokenCheckpointError, match="altered"):
        keeper.model_state(step)
    keeper.fetch = lambda name, folder: whole / name
    with pytest.warns(UserWarning, match="is broken here, and is fetched"):
        found = keeper.model_state(step)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("average", "kept", "message"),
    [
        (("last", 3), {}, "needs 3 checkpoints, and ModelCheckpoint keeps 2; set keep_last to at least 3"),
        (("best", 2), {}, "needs 2 checkpoints, and ModelCheckpoint keeps 1; set keep_best to at least 2"),
        (("last", 2), {"every_epochs": None}, "on a schedule; set every_epochs or every_steps"),
        (("last", 2), None, "needs those of a ModelCheckpoint|needs the checkpoints of a ModelCheckpoint"),
    ],
)
def test_what_cannot_be_averaged_is_refused_before_the_first_step(
    average: Any, kept: Any, message: str, tone_manifest: Manifest, checkpoints: Path
) -> None:
    keepers = [] if kept is None else [ModelCheckpoint(checkpoints, **kept)]
    with pytest.raises(UserError, match=message):
        trainer_of(tone_manifest, CheckpointAverage(*average), *keepers).start_training()


def test_the_best_need_a_validation(tone_manifest: Manifest, checkpoints: Path) -> None:
    trainer = trainer_of(tone_manifest, CheckpointAverage("best", 1), ModelCheckpoint(checkpoints))
    trainer.val_loader = None
    with pytest.raises(UserError, match="ranks by validations; give the ModelTrainer a val_loader"):
        trainer.start_training()


@pytest.mark.parametrize(("arguments", "message"), [(("worst", 2), "which is 'worst'"), (("last", 0), "count is 0")])
def test_a_wrong_choice_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CheckpointAverage(*arguments)


def test_two_averages_are_one_too_many(tone_manifest: Manifest) -> None:
    trainer = trainer_of(tone_manifest, ExponentialAverage(), *[_Other()])
    with pytest.raises(UserError, match="ExponentialAverage and _Other both average the weights"):
        trainer.start_training()


class _Other(Callback):
    def evaluated_weights(self, trainer: ModelTrainer) -> dict[str, Tensor]:
        return floating(trainer.model)


def test_the_metrics_of_a_checkpoint_are_of_its_average(tone_manifest: Manifest, checkpoints: Path) -> None:
    trainer = trainer_of(tone_manifest, ExponentialAverage(0.5), ModelCheckpoint(checkpoints))
    trainer.start_training()
    assert trainer.validation is not None
    for averaged in (True, False):
        state = read_checkpoint(checkpoints_in(checkpoints)[-1]).state
        weights = evaluated_state(state) if averaged else state["model"]
        assert (loss_of(trainer, weights) == trainer.validation.metrics["val_loss"]) == averaged


# ------------------------------------------------------------------ in a recipe


def test_a_recipe_keeps_as_many_checkpoints_as_it_averages() -> None:
    recipe = {"training.average": "best", "training.average_checkpoints": "4"}
    kept = build_checkpoints(Config.resolve({}, recipe))
    assert (kept.keep_best, kept.keep_last) == (4, 2)
    kept = build_checkpoints(Config.resolve({}, {**recipe, "checkpoint.keep_best": "6"}))
    assert kept.keep_best == 6
    assert build_checkpoints(Config()).keep_best == 1


def test_a_recipe_averages_in_one_way() -> None:
    both = Config.resolve({}, {"training.average": "last", "training.ema_decay": "0.99"})
    with pytest.raises(UserError, match=r"training\.ema_decay: found 0\.99 beside training\.average 'last'"):
        check_recipe(both)


class _Stateful(ToyModel):
    """Its state has an entry that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_what_is_no_tensor_is_left_out_of_a_mean() -> None:
    torch.manual_seed(0)
    states = [_Stateful().state_dict() for _ in range(2)]
    assert set(mean_weights(states)) == set(floating(_Stateful()))


def test_a_mean_is_of_the_training_that_is_there(tone_manifest: Manifest, tmp_path: Path) -> None:
    means = []
    trainers = [
        trainer_of(tone_manifest, CheckpointAverage("last", 2), ModelCheckpoint(tmp_path / str(seed)), seed=seed)
        for seed in (0, 1)
    ]
    for trainer in trainers:
        trainer.start_training()
        with trainer.evaluated_weights():
            means.append(floating(trainer.model)["inner.weight"].clone())
    one, other = trainers
    one.load_state_dict(other.state_dict())
    one.callbacks[-1].directory = other.callbacks[-1].directory  # type: ignore[attr-defined]
    with one.evaluated_weights():
        found = floating(one.model)["inner.weight"].clone()
    assert torch.equal(found, means[1])
    assert not torch.equal(found, means[0])


class Polyak(ExponentialAverage):
    """The same, by another name."""


def test_two_averages_of_one_class_are_one_too_many(tone_manifest: Manifest) -> None:
    trainer = trainer_of(tone_manifest, ExponentialAverage(0.5), ExponentialAverage(0.9))
    with pytest.raises(UserError, match="ExponentialAverage and ExponentialAverage both average the weights"):
        trainer.start_training()


@pytest.mark.parametrize(
    ("callback", "known"),
    [
        (ExponentialAverage(), True),
        (CheckpointAverage(), True),
        (Weights(), True),
        (Polyak(), False),
        (_Other(), False),
    ],
)
def test_a_checkpoint_is_no_model_of_metrics_whose_weights_cannot_be_found_in_it(
    callback: Callback, known: bool, tone_manifest: Manifest, tmp_path: Path, tracking_store: str
) -> None:
    assert are_known([Weights(), callback]) == known
    if isinstance(callback, CheckpointAverage):
        callback = CheckpointAverage("last", 2)
    experiment = run_experiment(toy_trainer(tone_manifest, callback, epochs=1), new_project(tmp_path))
    models = [model for model in models_of(experiment.run.id) if "sonosco.checkpoint" in model.tags]
    assert bool(models) == known


def test_what_is_registered_is_ranked_by_the_mean_that_it_is(
    tone_manifest: Manifest, tmp_path: Path, tracking_store: str
) -> None:
    trainer = toy_trainer(tone_manifest, CheckpointAverage("last", 2), epochs=2)
    experiment = Experiment.create({"size": 1}, project=new_project(tmp_path))
    experiment.setup_model_trainer(trainer, registered_model="averaged")
    ranked: list[Validation | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sonosco_mlflow.experiment.log_results", lambda *shown: ranked.append(shown[3]))
        experiment.start()
    assert trainer.val_loader is not None
    assert trainer.validation is not None
    assert ranked == [trainer.evaluate(trainer.val_loader, "val_")]
    assert ranked != [trainer.validation]
