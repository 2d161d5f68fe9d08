"""The states at which a position is easily off by one: each is named, and continued from."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rich_trainer import maker
from sonosco_mlflow.data.batching import BatchPlan
from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.testing import (
    MakeTrainer,
    Moment,
    Training,
    assert_exact_resume,
    frozen_state,
    resume_differences,
    thawed_state,
    undisturbed_training,
)
from sonosco_mlflow.training.callbacks import Callback, EarlyStopping, History
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation
from toy import ToyOutput, tone_loader


class Events(Callback):
    """Writes down what is trained on and validated: of each micro-step the epoch, batch and optimizer step after it."""

    def __init__(self) -> None:
        self.micro_steps: list[tuple[int, int, int]] = []
        self.validations: list[int] = []

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        self.micro_steps.append((trainer.progress.epoch, trainer.progress.batch, trainer.progress.step))

    def on_validation_end(self, trainer: ModelTrainer, validation: Validation) -> None:
        self.validations.append(trainer.progress.micro_step)


def single_batches(manifest: Manifest, utterances: int, **settings: Any) -> MakeTrainer:
    """Trainers for epochs of so many batches, each of one utterance."""
    train_loader = tone_loader(manifest[:utterances], frames_per_batch=1)
    assert train_loader.batches_in(0) == utterances
    return maker(manifest, **{"train_loader": train_loader, **settings})


def state_at(training: Training, micro_step: int) -> Moment:
    (moment,) = (moment for moment in training.moments if moment.micro_step == micro_step)
    return moment


def position(moment: Moment) -> dict[str, int]:
    state: Any = thawed_state(moment.state)
    progress: dict[str, int] = state["trainer"]["progress"]
    return progress


def continued(make_trainer: MakeTrainer, moment: Moment) -> tuple[ModelTrainer, Events]:
    trainer = make_trainer()
    trainer.load_state_dict(thawed_state(moment.state))
    events = Events()
    trainer.attach(events)
    trainer.continue_training()
    return trainer, events


@pytest.fixture(scope="module")
def make_trainer(tone_manifest: Manifest) -> MakeTrainer:
    """Two epochs of five batches: windows of three and two, validations after steps 2, 3 and 4."""
    return single_batches(tone_manifest, 5)


@pytest.fixture(scope="module")
def training(make_trainer: MakeTrainer) -> Training:
    return undisturbed_training(make_trainer, seed=1)


def test_before_the_first_step(make_trainer: MakeTrainer, training: Training) -> None:
    start = training.moments[0]
    assert set(position(start).values()) == {0}
    assert not resume_differences(make_trainer, training, start)
    _, events = continued(make_trainer, start)
    assert events.micro_steps == [
        *[(0, 1, 0), (0, 2, 0), (0, 3, 1), (0, 4, 1), (1, 0, 2)],
        *[(1, 1, 2), (1, 2, 2), (1, 3, 3), (1, 4, 3), (2, 0, 4)],
    ]
    assert events.validations == [5, 8, 10]


def test_after_the_last_batch_of_an_epoch(make_trainer: MakeTrainer, training: Training) -> None:
    moment = state_at(training, 5)
    assert (position(moment)["epoch"], position(moment)["batch"]) == (1, 0)
    state: Any = thawed_state(moment.state)
    assert state["trainer"]["gradients"] == {}
    assert state["trainer"]["window_loss"] == 0.0
    assert not resume_differences(make_trainer, training, moment)
    _, events = continued(make_trainer, moment)
    assert events.micro_steps[0] == (1, 1, 2)
    assert events.validations == [8, 10], "the validation of the epoch that ended is not repeated"


def test_before_the_last_batch_of_an_epoch(make_trainer: MakeTrainer, training: Training) -> None:
    moment = state_at(training, 4)
    assert not resume_differences(make_trainer, training, moment)
    _, events = continued(make_trainer, moment)
    assert events.micro_steps[0] == (1, 0, 2), "the short window is closed by the epoch's end"
    assert events.validations == [5, 8, 10]


@pytest.mark.parametrize(("micro_step", "left"), [(7, [8, 10]), (8, [10])], ids=["before", "after"])
def test_around_a_validation(make_trainer: MakeTrainer, training: Training, micro_step: int, left: list[int]) -> None:
    moment = state_at(training, micro_step)
    assert not resume_differences(make_trainer, training, moment)
    assert continued(make_trainer, moment)[1].validations == left


def test_what_is_drawn_between_loading_and_training_is_not_seen(make_trainer: MakeTrainer, training: Training) -> None:
    moment = state_at(training, 6)
    trainer = make_trainer()
    trainer.load_state_dict(thawed_state(moment.state))
    for draw in (random.random, np.random.random, lambda: torch.rand(())):
        draw()
    assert frozen_state(trainer) == moment.state
    trainer.continue_training()
    end = frozen_state(trainer)
    assert end == training.end
    for draw in (random.random, np.random.random, lambda: torch.rand(())):
        draw()
    assert frozen_state(trainer) == end


def test_where_it_stopped_early(tone_manifest: Manifest) -> None:
    make_trainer = single_batches(
        tone_manifest,
        5,
        callbacks=lambda model: [EarlyStopping(patience=1, minimum_change=100.0), History()],
        epochs=9,
    )
    training = undisturbed_training(make_trainer, seed=1)
    stopped = training.moments[-1]
    assert position(stopped)["micro_step"] == 8, "in the middle of an epoch"
    assert stopped.state == training.end

    trainer, events = continued(make_trainer, stopped)
    assert trainer.finished
    assert events.micro_steps == []
    assert frozen_state(trainer) == training.end
    assert assert_exact_resume(make_trainer) == 9


def test_a_finished_training(make_trainer: MakeTrainer, training: Training) -> None:
    finished = training.moments[-1]
    assert finished.state == training.end
    trainer, events = continued(make_trainer, finished)
    assert events.micro_steps == []
    assert frozen_state(trainer) == training.end
    trainer.continue_training()
    assert frozen_state(trainer) == training.end


def test_a_finished_training_with_more_epochs(tone_manifest: Manifest, training: Training) -> None:
    """It continues as if they had been asked for at the start."""
    make_longer = single_batches(tone_manifest, 5, epochs=4)
    longer = undisturbed_training(make_longer, seed=1)
    shared = len(training.moments)
    assert [moment.state for moment in longer.moments[:shared]] == [moment.state for moment in training.moments]
    assert not resume_differences(make_longer, longer, training.moments[-1])


SHAPES: Mapping[str, dict[str, Any]] = {
    "an epoch shorter than one window": {"utterances": 2, "accumulation": 3},
    "an epoch of one window": {"utterances": 3, "accumulation": 3},
    "an epoch of one batch": {"utterances": 1, "accumulation": 1},
    "an epoch of one batch, shorter than a window": {"utterances": 1, "accumulation": 3},
    "a validation after every step": {"utterances": 3, "accumulation": 1, "validate_every_steps": 1},
    "a step's validation at an epoch's end": {"utterances": 4, "accumulation": 2, "validate_every_steps": 2},
    "validations at the ends of epochs alone": {"utterances": 5, "validate_every_steps": None},
    "no validation set": {"utterances": 5, "val_loader": None},
    "no gradient clipping": {"utterances": 3, "gradient_clip": None},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_state_of_a_training_of_another_shape(tone_manifest: Manifest, shape: str) -> None:
    settings = dict(SHAPES[shape])
    make_trainer = single_batches(tone_manifest, **settings, epochs=3)
    assert assert_exact_resume(make_trainer) == 3 * settings["utterances"] + 1


def test_epochs_of_different_numbers_of_batches(tone_manifest: Manifest) -> None:
    """The window at an epoch's end is as long as what this epoch leaves over."""
    train_loader = tone_loader(tone_manifest[:14])
    train_loader.plan = BatchPlan(train_loader.dataset.frames, frames_per_batch=100, seed=0, jitter=0.8)
    batches = [train_loader.batches_in(epoch) for epoch in range(4)]
    assert len({count % 3 for count in batches}) > 1
    make_trainer = maker(tone_manifest, train_loader=train_loader, callbacks=plain_history, epochs=4)
    assert assert_exact_resume(make_trainer) == sum(batches) + 1


def plain_history(model: nn.Module) -> list[Callback]:
    return [History()]


class Seeing(nn.Module):
    """Parameters that do not lie in memory row by row: a convolution's, and a matrix that was transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, 16, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.turned = nn.Parameter(torch.randn(50, 16).T)

    def forward(self, batch: Batch) -> ToyOutput:
        seen = self.see(batch.features.unsqueeze(1).repeat(1, 3, 1, 1)).mean(dim=(2, 3)) @ self.turned
        return ToyOutput(seen.square().mean(), seen, batch.feature_lengths)


def seeing_trainer(manifest: Manifest) -> MakeTrainer:
    def make_trainer() -> ModelTrainer:
        torch.manual_seed(7)
        model = Seeing()
        assert not any(parameter.is_contiguous() for parameter in (model.see.weight, model.turned))
        loader = tone_loader(manifest[:8], frames_per_batch=1)
        return ModelTrainer(
            model, train_loader=loader, callbacks=[History()], epochs=2, accumulation=3, gradient_clip=1e-3
        )

    return make_trainer


def test_gradients_and_moments_lie_in_memory_as_their_parameters(tone_manifest: Manifest) -> None:
    """A norm is summed in the order of memory."""
    make_trainer = seeing_trainer(tone_manifest)
    training = undisturbed_training(make_trainer, seed=1)
    trainer = make_trainer()
    trainer.load_state_dict(thawed_state(state_at(training, 5).state))
    for parameter in trainer.model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
        moments = trainer.optimizer.state[parameter]
        assert {moments[name].stride() for name in ("exp_avg", "exp_avg_sq")} == {parameter.stride()}
    assert assert_exact_resume(make_trainer) == 17
