import itertools
import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sonosco_mlflow.data.loader import AudioDataLoader, Batch
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.determinism import generator_states
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.metrics import character_error_rate, word_error_rate
from sonosco_mlflow.serialization.checkpoint import read_checkpoint
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.serialization.state import json_bytes, split_tree, tensor_bytes
from sonosco_mlflow.testing import assert_exact_resume
from sonosco_mlflow.training.callbacks import (
    Callback,
    EarlyStopping,
    History,
    LinearWarmUp,
    PlateauLearningRateReduction,
)
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation
from toy import ToyModel, ToyOutput, tone_loader

EPOCHS = 2
ACCUMULATION = 3


def new_trainer(manifest: Manifest, model: nn.Module | None = None, **settings: Any) -> ModelTrainer:
    torch.manual_seed(7)
    model = model or ToyModel()
    defaults: dict[str, Any] = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.02),
        "train_loader": tone_loader(manifest[:14]),
        "val_loader": tone_loader(manifest[14:], seed=None),
        "metrics": [word_error_rate, character_error_rate],
        "callbacks": [
            LinearWarmUp(4),
            PlateauLearningRateReduction(patience=1, factor=0.5, floor=1e-4, monitor="val_word_error_rate"),
            EarlyStopping(patience=4),
            History(),
        ],
        "epochs": EPOCHS,
        "accumulation": ACCUMULATION,
        "gradient_clip": 1.0,
        "validate_every_steps": 2,
    }
    return ModelTrainer(model, **{**defaults, **settings})


def state_bytes(trainer: ModelTrainer) -> tuple[bytes, bytes]:
    return tree_bytes(trainer.state_dict())


def file_bytes(path: Path) -> tuple[bytes, bytes]:
    return tree_bytes(read_checkpoint(path).state)


def tree_bytes(tree: object) -> tuple[bytes, bytes]:
    document, tensors = split_tree(tree)
    return json_bytes(document), tensor_bytes(tensors)


class EverySafePoint(Callback):
    """Saves at every micro-step, each time into a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[Path] = []

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        path = self.folder / str(trainer.progress.micro_step)
        self.saved.append(Serializer().serialize(trainer, path, step=trainer.progress.step))


def test_resumed_at_every_micro_step_it_ends_with_the_same_bytes(tone_manifest: Manifest, tmp_path: Path) -> None:
    trainer = new_trainer(tone_manifest)
    assert trainer.train_loader is not None
    assert all(trainer.train_loader.batches_in(epoch) % ACCUMULATION for epoch in range(EPOCHS))
    saver = EverySafePoint(tmp_path)
    trainer.attach(saver)
    trainer.start_training()
    expected = state_bytes(trainer)
    assert len(saver.saved) >= 8

    for path in saver.saved:
        torch.manual_seed(0)
        resumed = Deserializer().deserialize(
            path, train_loader=tone_loader(tone_manifest[:14]), val_loader=tone_loader(tone_manifest[14:], seed=None)
        )
        resumed.continue_training()
        assert state_bytes(resumed) == expected, path


def test_the_state_read_back_is_the_state_written(tone_manifest: Manifest, tmp_path: Path) -> None:
    trainer = new_trainer(tone_manifest)
    saver = EverySafePoint(tmp_path)
    trainer.attach(saver)
    trainer.attach(StopAt(micro_step=4))
    trainer.start_training()
    trainer.stop_reason = None

    resumed = Deserializer().deserialize(
        saver.saved[-1], train_loader=trainer.train_loader, val_loader=trainer.val_loader
    )

    assert trainer.progress.batch % ACCUMULATION == 1, "the state should hold gradients of an unfinished step"
    assert state_bytes(resumed) == state_bytes(trainer)
    assert resumed.optimizer_recipe.groups[0]["lr"] == 0.02, "the base rate, not the current one"


@serializable
class ConvertedModel(ToyModel):
    """Takes its input in whatever type it has been given."""

    def forward(self, batch: Batch) -> ToyOutput:
        return super().forward(replace(batch, features=batch.features.to(self.inner.weight.dtype)))


def frozen(model: ToyModel) -> None:
    model.norm.requires_grad_(False)


def double(model: ToyModel) -> None:
    model.double()


def turned(model: ToyModel) -> None:
    model.outer.weight.data = model.outer.weight.data.T.contiguous().T


@pytest.mark.parametrize("change", [frozen, double, turned])
def test_what_was_done_to_a_model_after_it_was_made_comes_back(
    change: Callable[[ToyModel], None], tone_manifest: Manifest, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    model = ConvertedModel()
    change(model)
    trainer = new_trainer(
        tone_manifest, model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.02), gradient_clip=1e-3
    )
    saver = EverySafePoint(tmp_path)
    trainer.attach(saver)
    trainer.start_training()
    for path in saver.saved:
        resumed = Deserializer().deserialize(path, train_loader=trainer.train_loader, val_loader=trainer.val_loader)
        assert state_bytes(resumed) == file_bytes(path), path
        for parameter, again in zip(model.parameters(), resumed.model.parameters(), strict=True):
            assert traits(again) == traits(parameter)
        resumed.continue_training()
        assert state_bytes(resumed) == state_bytes(trainer), path


def traits(parameter: nn.Parameter) -> tuple[object, ...]:
    return parameter.requires_grad, parameter.dtype, parameter.stride()


class StopAt(Callback):
    def __init__(self, micro_step: int) -> None:
        self.micro_step = micro_step

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        if trainer.progress.micro_step == self.micro_step:
            trainer.stop_training("as asked")


def test_two_trainings_are_equal_and_another_seed_is_not(tone_manifest: Manifest) -> None:
    finals = []
    for seed in (0, 0, 1):
        trainer = new_trainer(tone_manifest, seed=seed)
        trainer.start_training()
        finals.append(state_bytes(trainer))
    assert finals[0] == finals[1]
    assert finals[0][1] != finals[2][1]


def test_it_learns_the_tones(tone_manifest: Manifest) -> None:
    trainer = new_trainer(tone_manifest, epochs=12, callbacks=[])
    trainer.start_training()
    assert trainer.validation is not None
    assert trainer.validation.metrics["val_word_error_rate"] == 0
    assert trainer.validation.hypotheses == trainer.validation.references


class Events(Callback):
    """Writes down what happened, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def on_train_begin(self, trainer: ModelTrainer) -> None:
        self.log.append("train")

    def on_epoch_begin(self, trainer: ModelTrainer) -> None:
        self.log.append(f"epoch {trainer.progress.epoch}")

    def on_gradients(self, trainer: ModelTrainer) -> None:
        self.log.append("gradients")

    def on_step_end(self, trainer: ModelTrainer) -> None:
        self.log.append(f"step {trainer.progress.step}")

    def on_metrics(self, trainer: ModelTrainer, metrics: Mapping[str, float]) -> None:
        self.log.append("metrics " + next(iter(metrics)))
        self.metrics.append((trainer.progress.step, dict(metrics)))

    def on_validation_end(self, trainer: ModelTrainer, validation: Validation) -> None:
        self.log.append("validation")

    def on_epoch_end(self, trainer: ModelTrainer, epoch: int) -> None:
        self.log.append(f"end of epoch {epoch}")

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        self.log.append("safe")

    def on_train_end(self, trainer: ModelTrainer) -> None:
        self.log.append("end")

    def on_exception(self, trainer: ModelTrainer, error: BaseException) -> None:
        self.log.append(f"exception {error}")


def test_the_order_of_events(tone_manifest: Manifest) -> None:
    events = Events()
    loader = tone_loader(tone_manifest[:4], frames_per_batch=1)
    assert loader.batches_in(0) == 4
    new_trainer(
        tone_manifest, train_loader=loader, callbacks=[events], epochs=1, validate_every_steps=None
    ).start_training()
    assert events.log == [
        *("train", "epoch 0", "safe", "safe"),
        *("gradients", "step 1", "metrics train_loss", "safe"),
        *("gradients", "step 2", "metrics train_loss", "metrics val_loss", "validation", "end of epoch 0", "safe"),
        "end",
    ]


def test_accumulated_batches_count_alike_also_in_a_short_last_window(tone_manifest: Manifest) -> None:
    """Without dropout and batch norm, one step over four batches is one step over their mean loss."""
    loader = tone_loader(tone_manifest[:4], frames_per_batch=1)
    events = Events()
    settings: dict[str, Any] = {"train_loader": loader, "callbacks": [events], "epochs": 1, "accumulation": 8}
    torch.manual_seed(0)
    model = PlainModel()
    weights = model.layer.weight.detach().clone()
    losses = [model(batch) for batch in loader.epoch(0)]
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), [model.layer.weight])

    ModelTrainer(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), val_loader=None, **settings
    ).start_training()

    torch.testing.assert_close(model.layer.weight.detach(), weights - 0.1 * expected)
    assert events.metrics[0][1]["train_loss"] == pytest.approx(torch.stack(losses).mean().item())


class PlainModel(nn.Module):
    """Any module is a model: this one returns its loss and knows nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        return (self.layer(batch.features).mean(dim=(1, 2)) - batch.token_lengths).square().mean()


def test_gradients_are_clipped_and_their_norm_is_recorded_unclipped(tone_manifest: Manifest) -> None:
    events = Events()
    model = PlainModel()
    before = model.layer.weight.detach().clone()
    trainer = ModelTrainer(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        train_loader=tone_loader(tone_manifest[:1]),
        callbacks=[events],
        epochs=1,
        gradient_clip=0.5,
    )
    trainer.start_training()
    moved = torch.cat([(model.layer.weight - before).flatten()]).norm().item()
    assert events.metrics[0][1]["gradient_norm"] > 0.5
    assert moved == pytest.approx(0.5, rel=0.02)


def test_custom_metric_loss_and_decoder(tone_manifest: Manifest) -> None:
    def letters_too_many(references: Sequence[str], hypotheses: Sequence[str]) -> float:
        return float(sum(map(len, hypotheses)) - sum(map(len, references)))

    trainer = ModelTrainer(
        ToyModel(),
        loss=lambda model, batch: 2.0 * model(batch).loss,
        train_loader=tone_loader(tone_manifest[:3]),
        val_loader=tone_loader(tone_manifest[3:6], seed=None),
        metrics=[letters_too_many],
        decoder=lambda model, batch: [text + "XX" for text in batch.texts],
        epochs=1,
    )
    trainer.start_training()
    assert trainer.validation is not None
    assert trainer.validation.metrics["val_letters_too_many"] == 6.0


def test_evaluation_weighs_utterances_not_batches(tone_manifest: Manifest) -> None:
    trainer = new_trainer(tone_manifest)
    by_one = trainer.evaluate(tone_loader(tone_manifest, frames_per_batch=1, seed=None), "val_")
    by_few = trainer.evaluate(tone_loader(tone_manifest, frames_per_batch=200, seed=None), "val_")
    assert by_one.metrics["val_loss"] == pytest.approx(by_few.metrics["val_loss"], rel=1e-5)


def test_validation_changes_no_generator_and_no_mode(tone_manifest: Manifest) -> None:
    trainer = new_trainer(tone_manifest, loss=drawing_loss)
    trainer.model.train()
    trainer.model.norm.eval()  # a frozen layer
    torch.manual_seed(3)
    before = split_tree(generator_states())
    trainer.evaluate(tone_loader(tone_manifest, seed=None), "val_")
    after = split_tree(generator_states())
    assert json_bytes(before[0]) == json_bytes(after[0])
    assert tensor_bytes(before[1]) == tensor_bytes(after[1])
    assert trainer.model.training
    assert not trainer.model.norm.training


def drawing_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    output = model(batch)
    assert isinstance(output, ToyOutput)
    return output.loss + torch.rand(()) * 0


def test_the_number_of_validations_changes_no_weight(tone_manifest: Manifest) -> None:
    weights = []
    for every in (None, 1):
        trainer = new_trainer(tone_manifest, callbacks=[], validate_every_steps=every, loss=drawing_loss)
        trainer.start_training()
        weights.append(tensor_bytes(trainer.model.state_dict()))
    assert weights[0] == weights[1]


def test_a_loss_that_is_not_finite_is_refused_with_its_utterances(tone_manifest: Manifest) -> None:
    events = Events()
    trainer = new_trainer(tone_manifest, loss=lambda model, batch: model(batch).loss * math.nan, callbacks=[events])
    with pytest.raises(UserError, match=r"loss is nan at step 1 \(epoch 0, utterances tone-"):
        trainer.start_training()
    assert events.log[-1].startswith("exception the loss is nan")


@pytest.mark.parametrize("clip", [None, 5.0])
def test_a_gradient_that_is_not_finite_moves_nothing(tone_manifest: Manifest, clip: float | None) -> None:
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        # At 0 a square root is finite and its slope is not.
        return model(batch).loss + (0.0 * model.get_parameter("outer.weight")).abs().sum().sqrt()

    trainer = new_trainer(tone_manifest, loss=loss, gradient_clip=clip)
    before = trainer.model.get_parameter("outer.weight").clone()
    with pytest.raises(UserError, match=r"the gradient is not finite \(.*\) at step 1 \(epoch 0\), and nothing"):
        trainer.start_training()
    assert torch.equal(trainer.model.get_parameter("outer.weight"), before)
    assert not trainer.at_safe_point


def test_what_cannot_be_trained_or_evaluated_is_refused(tone_manifest: Manifest) -> None:
    with pytest.raises(UserError, match="no train_loader"):
        new_trainer(tone_manifest, train_loader=None).start_training()
    with pytest.raises(UserError, match="nothing to train on"):
        new_trainer(tone_manifest, train_loader=tone_loader(tone_manifest[:0])).start_training()
    with pytest.raises(UserError, match="no utterance to evaluate"):
        new_trainer(tone_manifest).evaluate(tone_loader(tone_manifest[:0], seed=None), "val_")
    with pytest.raises(UserError, match="PlainModel has no decode"):
        ModelTrainer(PlainModel(), train_loader=tone_loader(tone_manifest), metrics=[word_error_rate])


def test_a_state_for_other_callbacks_is_refused(tone_manifest: Manifest) -> None:
    state = new_trainer(tone_manifest, callbacks=[History(), History()]).state_dict()
    assert list(state["trainer"]["callbacks"]) == ["History", "History-2"]  # type: ignore[index]
    with pytest.raises(UserError, match="History-2"):
        new_trainer(tone_manifest, callbacks=[History()]).load_state_dict(state)


def test_a_finished_training_stays_finished(tone_manifest: Manifest) -> None:
    trainer = new_trainer(tone_manifest)
    trainer.start_training()
    expected = state_bytes(trainer)
    trainer.continue_training()
    assert state_bytes(trainer) == expected


def test_progress_counts_what_was_consumed(tone_manifest: Manifest) -> None:
    trainer = new_trainer(tone_manifest, callbacks=[])
    trainer.start_training()
    loader = trainer.train_loader
    assert loader is not None
    progress = trainer.progress
    assert (progress.epoch, progress.batch) == (EPOCHS, 0)
    assert progress.micro_step == sum(loader.batches_in(epoch) for epoch in range(EPOCHS))
    assert progress.utterances == EPOCHS * 14
    assert progress.frames == EPOCHS * sum(loader.dataset.frames)


def test_the_share_of_padding_is_recorded_at_the_last_step_of_each_epoch(tone_manifest: Manifest) -> None:
    events = Events()
    dataset = tone_loader(tone_manifest).dataset
    loader = AudioDataLoader(dataset, frames_per_batch=150, seed=0, curriculum_epochs=1)
    new_trainer(tone_manifest, callbacks=[events], train_loader=loader, accumulation=2).start_training()
    batches = [loader.batches_in(epoch) for epoch in range(EPOCHS)]
    assert all(count > 2 for count in batches)
    last_steps = itertools.accumulate(-(-count // 2) for count in batches)
    expected = {step: loader.padding_in(epoch) for epoch, step in enumerate(last_steps)}
    assert len(set(expected.values())) == EPOCHS, expected
    found = {step: metrics["padding_share"] for step, metrics in events.metrics if "padding_share" in metrics}
    assert found == expected
    padded = sum(batch.features[..., 0].numel() for batch in loader.epoch(1))
    assert loader.padding_in(1) == pytest.approx(1 - sum(batch.frames for batch in loader.epoch(1)) / padded)


# ------------------------------------------------------------------ what callbacks raise


class Strikes(Events):
    """Raises in one event, at step 2."""

    def __init__(self, event: str) -> None:
        super().__init__()
        self.event = event

    def strike(self, event: str, trainer: ModelTrainer) -> None:
        if event == self.event and trainer.progress.step == 2:
            raise ValueError(f"in {event}")

    def on_step_end(self, trainer: ModelTrainer) -> None:
        super().on_step_end(trainer)
        self.strike("on_step_end", trainer)

    def on_metrics(self, trainer: ModelTrainer, metrics: Mapping[str, float]) -> None:
        super().on_metrics(trainer, metrics)
        self.strike("on_metrics", trainer)

    def on_validation_end(self, trainer: ModelTrainer, validation: Validation) -> None:
        super().on_validation_end(trainer, validation)
        self.strike("on_validation_end", trainer)

    def on_epoch_end(self, trainer: ModelTrainer, epoch: int) -> None:
        super().on_epoch_end(trainer, epoch)
        self.strike("on_epoch_end", trainer)

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        super().on_safe_point(trainer)
        self.strike("on_safe_point", trainer)


def struck_trainer(manifest: Manifest, *callbacks: Callback) -> ModelTrainer:
    """One epoch of two steps, the second of which ends in a validation."""
    loader = tone_loader(manifest[:4], frames_per_batch=1)
    settings: dict[str, Any] = {"epochs": 1, "accumulation": 2, "validate_every_steps": None}
    return new_trainer(manifest, train_loader=loader, callbacks=callbacks, **settings)


LAST_STEP = ["gradients", "step 2", "metrics train_loss", "metrics val_loss", "validation", "end of epoch 0"]


@pytest.mark.parametrize("event", ["on_step_end", "on_metrics", "on_validation_end", "on_epoch_end"])
def test_a_callback_that_fails_within_a_step_lets_it_finish(event: str, tone_manifest: Manifest) -> None:
    before, after, observer = Events(), Events(), Events()
    failing = Strikes(event)
    trainer = struck_trainer(tone_manifest, before, failing, after)
    trainer.attach(observer)
    with pytest.raises(ValueError, match=f"in {event}") as caught:
        trainer.start_training()
    for events in (before, failing, after, observer):
        assert events.log[-7:] == [*LAST_STEP, f"exception in {event}"]
    assert trainer.failure is caught.value
    assert trainer.at_safe_point
    assert (trainer.progress.epoch, trainer.progress.batch, trainer.progress.step) == (1, 0, 2)
    undisturbed = struck_trainer(tone_manifest)
    undisturbed.start_training()
    assert tensor_bytes(trainer.model.state_dict()) == tensor_bytes(undisturbed.model.state_dict())


def test_of_several_failures_the_first_is_raised(tone_manifest: Manifest) -> None:
    trainer = struck_trainer(tone_manifest, Strikes("on_metrics"), Strikes("on_step_end"))
    with pytest.raises(ValueError, match="in on_step_end"):
        trainer.start_training()


def test_at_a_safe_point_too_the_others_see_all_of_it(tone_manifest: Manifest) -> None:
    before, after = Events(), Events()
    trainer = struck_trainer(tone_manifest, before, Strikes("on_safe_point"), after)
    with pytest.raises(ValueError, match="in on_safe_point"):
        trainer.start_training()
    assert before.log[-2:] == ["safe", "exception in on_safe_point"]
    assert after.log[-2:] == ["safe", "exception in on_safe_point"]
    assert isinstance(trainer.failure, ValueError)
    assert trainer.at_safe_point


@pytest.mark.parametrize("event", ["on_step_end", "on_validation_end"])
def test_what_an_observer_raises_is_raised_at_once(event: str, tone_manifest: Manifest) -> None:
    callback, observer, after = Events(), Strikes(event), Events()
    trainer = struck_trainer(tone_manifest, callback)
    for each in (observer, after):
        trainer.attach(each)
    with pytest.raises(ValueError, match=f"in {event}"):
        trainer.start_training()
    last = "step 2" if event == "on_step_end" else "validation"
    assert callback.log[-2:] == observer.log[-2:] == [last, f"exception in {event}"]
    assert last not in after.log
    assert trainer.failure is None
    assert not trainer.at_safe_point


class FailsTwice(Strikes):
    def on_exception(self, trainer: ModelTrainer, error: BaseException) -> None:
        super().on_exception(trainer, error)
        raise OSError("no room to tell")


def test_every_callback_hears_of_an_exception_even_if_one_of_them_fails_again(tone_manifest: Manifest) -> None:
    callbacks = [Events(), FailsTwice("on_step_end"), Events()]
    observer = Events()
    trainer = struck_trainer(tone_manifest, *callbacks)
    trainer.attach(observer)
    with pytest.raises(ValueError, match="in on_step_end") as caught:
        trainer.start_training()
    assert [events.log.count("exception in on_step_end") for events in (*callbacks, observer)] == [1, 1, 1, 1]
    assert caught.value.__notes__ == ["after it, FailsTwice failed as well: OSError('no room to tell')"]


def test_a_training_that_failed_can_be_started_again(tone_manifest: Manifest) -> None:
    failing = Strikes("on_step_end")
    trainer = struck_trainer(tone_manifest, failing)
    with pytest.raises(ValueError, match="in on_step_end"):
        trainer.start_training()
    trainer.epochs = 2
    failing.event = "none"
    trainer.continue_training()
    assert trainer.failure is None
    assert trainer.finished


def test_the_last_validation_is_part_of_the_state(tone_manifest: Manifest) -> None:
    trainer = new_trainer(tone_manifest)
    untrained: Any = trainer.state_dict()
    assert untrained["trainer"]["validation"] is None
    trainer.start_training()
    assert trainer.validation is not None
    resumed = new_trainer(tone_manifest)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.validation == trainer.validation
    assert resumed.validation is not trainer.validation
    resumed.load_state_dict(untrained)
    assert resumed.validation is None


def test_gradients_that_no_optimizer_moves_are_no_state_and_do_not_count(tone_manifest: Manifest) -> None:
    def make_trainer() -> ModelTrainer:
        torch.manual_seed(7)
        model = ToyModel()
        optimizer = torch.optim.AdamW(model.outer.parameters(), lr=0.02)
        loader = tone_loader(tone_manifest[:14])
        return ModelTrainer(model, optimizer=optimizer, train_loader=loader, gradient_clip=1.0, epochs=2)

    assert_exact_resume(make_trainer, every=3)
    trainer = make_trainer()
    trainer.start_training()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_what_other_threads_draw_while_training_begins_is_not_seen(tone_manifest: Manifest) -> None:
    class DrawsBeside(Callback, is_part_of_trainer=False):
        def on_train_begin(self, trainer: ModelTrainer) -> None:
            thread = threading.Thread(target=lambda: random.random())
            thread.start()
            thread.join()

    ends = []
    for observers in ([], [DrawsBeside()]):
        trainer = new_trainer(tone_manifest)
        for observer in observers:
            trainer.attach(observer)
        trainer.start_training()
        ends.append(state_bytes(trainer))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("accumulation", value) for value in (0, -1)),
        *(("gradient_clip", value) for value in (0.0, -1.0, math.nan)),
        ("validate_every_steps", 0),
    ],
)
def test_a_number_that_would_train_uphill_or_not_at_all_is_refused(
    setting: str, value: float, tone_manifest: Manifest
) -> None:
    with pytest.raises(UserError, match=f"{setting} of ModelTrainer is {value}, expected a number above 0"):
        new_trainer(tone_manifest, **{setting: value})


def test_metrics_that_would_take_each_others_place_are_refused(tone_manifest: Manifest) -> None:
    def loss(references: Sequence[str], hypotheses: Sequence[str]) -> float:
        return 0.0

    for metrics, name in (([word_error_rate, word_error_rate], "word_error_rate"), ([loss], "loss")):
        with pytest.raises(UserError, match=f"two metrics are recorded as '{name}'"):
            new_trainer(tone_manifest, metrics=metrics)


class StopsWithoutAReason(Callback):
    def on_step_end(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step == 2:
            trainer.stop_training("")


def test_a_stop_without_a_reason_is_one_at_once(tone_manifest: Manifest) -> None:
    trainer = new_trainer(tone_manifest, callbacks=[StopsWithoutAReason()], accumulation=1)
    trainer.start_training()
    assert trainer.progress.step == 2


def test_another_loader_has_batches_of_its_own(tone_manifest: Manifest) -> None:
    trainer = new_trainer(tone_manifest, callbacks=[StopAt(1)], accumulation=1, epochs=1)
    trainer.start_training()
    trainer.callbacks.clear()
    trainer.stop_reason = None
    trainer.train_loader = tone_loader(tone_manifest[:14], frames_per_batch=40)
    batches = trainer.train_loader.batches_in(0)
    assert batches > 6
    trainer.continue_training()
    assert (trainer.progress.epoch, trainer.progress.batch, trainer.progress.step) == (1, 0, batches)


class OwnRate(Callback):
    """Lets a scheduler of torch's set the learning rate."""

    def on_train_begin(self, trainer: ModelTrainer) -> None:
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)

    def on_step_end(self, trainer: ModelTrainer) -> None:
        self.scheduler.step()


def test_a_learning_rate_that_something_else_sets_is_refused_rather_than_overruled(tone_manifest: Manifest) -> None:
    history = History()
    trainer = new_trainer(tone_manifest, callbacks=[OwnRate(), history], accumulation=1)
    with pytest.raises(UserError, match=r"is 0.01 before step 2, where training had set 0.02.*learning_rate_factor"):
        trainer.start_training()
    # What is recorded is what the step was made with.
    assert history.curve("learning_rate") == ([1], [0.02])


@serializable
class GrowingTable(ToyModel):
    """Keeps a table that is as long as the longest batch which it has met."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.table = torch.zeros(0)

    def forward(self, batch: Batch) -> ToyOutput:
        if len(self.table) < batch.features.shape[1]:
            self.table = torch.ones(batch.features.shape[1])
        scale = self.gain * self.table[: batch.features.shape[1], None]
        return super().forward(replace(batch, features=batch.features * scale))


def test_what_a_model_keeps_of_a_validation_serves_training_too(tone_manifest: Manifest) -> None:
    by_length = sorted(tone_manifest, key=lambda utterance: utterance.duration)
    short, long = Manifest(by_length[:14], tone_manifest.root), Manifest(by_length[14:], tone_manifest.root)
    model = GrowingTable()
    trainer = new_trainer(
        tone_manifest, model, train_loader=tone_loader(short), val_loader=tone_loader(long, seed=None), callbacks=[]
    )
    trainer.start_training()
    assert trainer.finished
