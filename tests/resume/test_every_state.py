"""A training continued from any of its states is the training that was never stopped."""

import doctest
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rich_trainer import MODELS, TINY, LossGuidedRate, maker, rich_trainer, training_loader
from sonosco_mlflow import testing
from sonosco_mlflow.data.augment import Noise, SpecAugment, SpeedPerturbation
from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.loader import AudioDataLoader, Batch
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.determinism import generator_states
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.models import build_model
from sonosco_mlflow.serialization.state import json_bytes, split_tree, tensor_bytes
from sonosco_mlflow.testing import MakeTrainer, assert_exact_resume
from sonosco_mlflow.training import precision
from sonosco_mlflow.training.callbacks import (
    Callback,
    CosineDecay,
    EarlyStopping,
    ExponentialAverage,
    InverseSquareRootDecay,
    LinearWarmUp,
    ModelCheckpoint,
    ScheduledLearningRateReduction,
    StepwiseLearningRateReduction,
    TeacherForcedTextComparison,
)
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation
from sonosco_mlflow.word_pieces import WordPieceTokenizer
from toy import PROCESSOR, TOKENIZER, ToyModel, ToyOutput

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    "SGD, momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "Adam, amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.02, amsgrad=True),
    "AdamW, one by one": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, foreach=False),
    "AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, fused=True),
    "AdamW, two groups": lambda model: torch.optim.AdamW(
        [
            {"params": [parameter for parameter in model.parameters() if parameter.ndim > 1]},
            {"params": [parameter for parameter in model.parameters() if parameter.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.02,
    ),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.02),
    "RAdam": lambda model: torch.optim.RAdam(model.parameters(), lr=0.02),
    "Adamax": lambda model: torch.optim.Adamax(model.parameters(), lr=0.02),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.02),
    "Adadelta": lambda model: torch.optim.Adadelta(model.parameters(), lr=0.5),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.002, momentum=0.5, centered=True),
    "Rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=0.002),
    "ASGD": lambda model: torch.optim.ASGD(model.parameters(), lr=0.02, t0=1.0),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.02),
}


def micro_steps(make_trainer: MakeTrainer) -> int:
    trainer = make_trainer()
    assert trainer.train_loader is not None
    return sum(trainer.train_loader.batches_in(epoch) for epoch in range(trainer.epochs))


def loaders(manifest: Manifest, *first: int, then: int) -> Callable[[nn.Module], AudioDataLoader]:
    """Training loaders for one trainer after the other, by their numbers of workers."""
    workers = itertools.chain(first, itertools.repeat(then))
    return lambda model: training_loader(manifest, next(workers))


@pytest.mark.parametrize("name", MODELS)
def test_every_state_of_every_model(tone_manifest: Manifest, name: str) -> None:
    make_trainer = maker(tone_manifest, name)
    assert assert_exact_resume(make_trainer) == micro_steps(make_trainer) + 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(tone_manifest: Manifest, optimizer: str) -> None:
    assert_exact_resume(maker(tone_manifest, optimizer=OPTIMIZERS[optimizer]))


def test_schedules_that_follow_the_epochs(tone_manifest: Manifest) -> None:
    callbacks = [StepwiseLearningRateReduction(every_epochs=1), ScheduledLearningRateReduction([1, 2], factor=0.1)]
    assert_exact_resume(maker(tone_manifest, callbacks=lambda model: callbacks, epochs=3))


@pytest.mark.filterwarnings("ignore:.* held .* checkpoints of another training")
def test_a_training_that_saves_checkpoints(tone_manifest: Manifest, tmp_path: Path) -> None:
    def callbacks(model: nn.Module) -> list[Callback]:
        return [EarlyStopping(patience=4), ModelCheckpoint(tmp_path, every_steps=3)]

    assert_exact_resume(maker(tone_manifest, callbacks=callbacks), every=3)


@pytest.mark.parametrize("name", MODELS)
def test_an_average_of_the_weights(tone_manifest: Manifest, name: str) -> None:
    def callbacks(model: nn.Module) -> list[Callback]:
        return [ExponentialAverage(0.6), TeacherForcedTextComparison(2), LossGuidedRate()]

    assert_exact_resume(maker(tone_manifest, name, callbacks=callbacks))


def test_a_curriculum(tone_manifest: Manifest) -> None:
    def train_loader(model: nn.Module) -> AudioDataLoader:
        dataset = training_loader(tone_manifest).dataset
        return AudioDataLoader(dataset, frames_per_batch=100, seed=0, sorta_grad=True, curriculum_epochs=2)

    make_trainer = maker(tone_manifest, train_loader=train_loader, epochs=3, callbacks=lambda model: [CosineDecay()])
    trainer = make_trainer()
    assert trainer.train_loader is not None
    batches = [trainer.train_loader.batches_in(epoch) for epoch in range(3)]
    assert batches == sorted(set(batches))
    assert assert_exact_resume(make_trainer) == sum(batches) + 1


def test_other_recordings_and_other_spellings_in_each_epoch(tone_manifest: Manifest) -> None:
    pieces = WordPieceTokenizer(["▁", *"ABCDE", "AB", "BC", "CD", "DE", "EA"], [-3.0] * 6 + [-5.0] * 5)
    changes = (SpeedPerturbation(), Noise(10, 20))

    def train_loader(model: nn.Module) -> AudioDataLoader:
        dataset = AudioDataset(
            *(tone_manifest[:14], PROCESSOR, pieces),
            augmentation=SpecAugment(1, 5, 0.3, 1, 2),
            waveform_augmentations=changes,
            word_sampling=0.5,
        )
        return AudioDataLoader(dataset, frames_per_batch=160, seed=0)

    def model() -> nn.Module:
        return build_model("tds", "small", n_mels=8, vocabulary_size=pieces.vocabulary_size, settings=TINY["tds"])

    def val_loader() -> AudioDataLoader:
        return AudioDataLoader(AudioDataset(tone_manifest[14:], PROCESSOR, pieces), frames_per_batch=160)

    def make_trainer() -> ModelTrainer:
        torch.manual_seed(7)
        made = model()
        return rich_trainer(tone_manifest, made, train_loader=train_loader(made), val_loader=val_loader())

    assert assert_exact_resume(make_trainer) == micro_steps(make_trainer) + 1


def test_schedules_that_follow_the_steps(tone_manifest: Manifest) -> None:
    for decay in (InverseSquareRootDecay(2), CosineDecay(1, floor=1e-3)):
        assert_exact_resume(maker(tone_manifest, callbacks=lambda model, decay=decay: [LinearWarmUp(2), decay]))


@pytest.mark.parametrize("wanted", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits(tone_manifest: Manifest, name: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wanted == "float16" and name != "toy" and not precision.has_units(wanted, torch.device("cpu")):
        pytest.skip("this processor has no units for recurrent layers in float16")
    monkeypatch.setattr(precision, "has_units", lambda wanted, device: True)
    assert_exact_resume(maker(tone_manifest, name, precision=wanted))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("las", {"input_feeding": True}),
        ("las", {"attention": "location", "location_filters": 2, "location_width": 3}),
        *(("deepspeech2", {"cell": cell}) for cell in ("gru", "rnn", "clipped")),
    ],
)
def test_sixteen_bits_of_what_goes_step_by_step(
    tone_manifest: Manifest, name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_units", lambda wanted, device: True)

    def make_trainer() -> ModelTrainer:
        torch.manual_seed(7)
        sizes = {"n_mels": 8, "vocabulary_size": TOKENIZER.vocabulary_size}
        model = build_model(name, "small", **sizes, settings={**TINY[name], **settings})
        return rich_trainer(tone_manifest, model, precision="bfloat16")

    assert_exact_resume(make_trainer, every=5)


def test_another_number_of_workers(tone_manifest: Manifest) -> None:
    train_loader = loaders(tone_manifest, 0, 0, then=2)
    assert assert_exact_resume(maker(tone_manifest, train_loader=train_loader), every=5) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 3), (3, 2)])
def test_every_state_with_other_workers(tone_manifest: Manifest, before: int, after: int) -> None:
    train_loader = loaders(tone_manifest, before, before, then=after)
    assert_exact_resume(maker(tone_manifest, train_loader=train_loader))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "toy"])
def test_every_optimizer_of_every_model(tone_manifest: Manifest, name: str, optimizer: str) -> None:
    assert_exact_resume(maker(tone_manifest, name, optimizer=OPTIMIZERS[optimizer]))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_state_of_a_longer_training(tone_manifest: Manifest, name: str) -> None:
    assert_exact_resume(maker(tone_manifest, name, epochs=5, accumulation=2, validate_every_steps=2))


# ------------------------------------------------------------------ it goes red for the classic mistakes


class Forgets(Callback):
    """Counts steps, and reports nothing."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, trainer: ModelTrainer) -> None:
        self.steps += 1

    def learning_rate_factor(self, trainer: ModelTrainer) -> float:
        return 0.5**self.steps


class Remembers(Forgets):
    """The same, done right."""

    def state_dict(self) -> dict[str, object]:
        return {"steps": self.steps}


class LoadsNothing(Remembers):
    """Reports its state, and does not take it back."""

    def load_state_dict(self, state: dict[str, object]) -> None:
        pass


class Constant(Callback):
    """Changes the learning rate by a number that is in no state."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def learning_rate_factor(self, trainer: ModelTrainer) -> float:
        return self.factor


class AnnouncesItself(Callback):
    """Records once for each start, and so once more for a resume."""

    def on_train_begin(self, trainer: ModelTrainer) -> None:
        trainer.record_text("hello", "training starts")


class CountingModel(ToyModel):
    """Its noise fades with the number of calls, kept in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, batch: Batch) -> ToyOutput:
        output = super().forward(batch)
        self.calls += self.training
        return ToyOutput(output.loss / self.calls if self.training else output.loss, output.logits, output.lengths)


class CarriedNoise:
    """An augmentation that draws from a stream of its own instead of the one that it is given."""

    def __init__(self) -> None:
        self.stream = np.random.default_rng(0)

    def __call__(self, features: Tensor, stream: np.random.Generator) -> Tensor:
        return features + float(self.stream.random())


def noisy_loader(manifest: Manifest) -> AudioDataLoader:
    loader = training_loader(manifest)
    loader.dataset.augmentation = CarriedNoise()
    return loader


def clock(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    return time.perf_counter()


def never(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    return float("nan")


def plain(manifest: Manifest, *callbacks: type[Callback], **settings: Any) -> MakeTrainer:
    return maker(manifest, callbacks=lambda model: [callback() for callback in callbacks], **settings)


def test_a_callback_that_does_not_report_its_state(tone_manifest: Manifest) -> None:
    assert_exact_resume(plain(tone_manifest, Remembers))
    with pytest.raises(AssertionError, match=r"micro-step 3.*\nrecorded:\n  learning_rate at step 2: 0.01 and 0.02\n"):
        assert_exact_resume(plain(tone_manifest, Forgets))


def test_a_callback_that_does_not_take_its_state_back(tone_manifest: Manifest) -> None:
    expected = (
        r"continued from micro-step 3, .*\n"
        r"right after loading:\n  trainer/callbacks/LoadsNothing/steps: 1 and 0\n"
        r"recorded:\n(  .*\n)+"
        r"state at the end:\n  trainer/callbacks/LoadsNothing/steps: 4 and 3\n"
        r"(  trainer/validation/.*\n)*  model/inner.bias: \d+ of 16 elements differ\n  and \d+ more$"
    )
    with pytest.raises(AssertionError, match=expected):
        assert_exact_resume(plain(tone_manifest, LoadsNothing))


def test_what_is_recorded_once_more(tone_manifest: Manifest) -> None:
    with pytest.raises(
        AssertionError, match=r"micro-step 1,.*\nrecorded:\n  train_loss at step 1 and hello at step 0\n"
    ):
        assert_exact_resume(plain(tone_manifest, AnnouncesItself))


def test_a_model_that_counts_in_a_plain_attribute(tone_manifest: Manifest) -> None:
    def make_trainer() -> ModelTrainer:
        trainer = maker(tone_manifest, callbacks=lambda model: [])()
        torch.manual_seed(7)
        model = CountingModel()
        return ModelTrainer(model, train_loader=trainer.train_loader, val_loader=trainer.val_loader, epochs=2)

    with pytest.raises(AssertionError, match="micro-step 1,"):
        assert_exact_resume(make_trainer)


def test_an_augmentation_that_carries_its_stream(tone_manifest: Manifest) -> None:
    with pytest.raises(AssertionError, match="micro-step 1,"):
        assert_exact_resume(plain(tone_manifest, train_loader=lambda model: noisy_loader(tone_manifest)))


def test_a_start_that_is_not_seeded(tone_manifest: Manifest) -> None:
    def make_trainer() -> ModelTrainer:
        return ModelTrainer(ToyModel(), train_loader=training_loader(tone_manifest), epochs=1)

    expected = r"make_trainer gives a different start each time; seed it. What differs:\n  model/inner.bias: 16 of 16"
    with pytest.raises(AssertionError, match=expected):
        assert_exact_resume(make_trainer)


def test_a_draw_of_make_trainer_that_no_state_holds(tone_manifest: Manifest) -> None:
    make_trainer = maker(tone_manifest, callbacks=lambda model: [Constant(random.random())])
    with pytest.raises(AssertionError, match=r"make_trainer draws what no state holds \(seed it\).* micro-step 3:"):
        assert_exact_resume(make_trainer)


def test_a_metric_that_depends_on_the_clock(tone_manifest: Manifest) -> None:
    make_trainer = plain(tone_manifest, metrics=[clock])
    with pytest.raises(AssertionError, match=r"never stopped differ(.|\n)*recorded:\n  val_clock at step 2: "):
        assert_exact_resume(make_trainer)


def test_what_is_not_a_number_equals_itself(tone_manifest: Manifest) -> None:
    assert_exact_resume(plain(tone_manifest, metrics=[never]))


# ------------------------------------------------------------------ the proof itself


def test_only_every_so_many_states(tone_manifest: Manifest) -> None:
    make_trainer = plain(tone_manifest)
    assert assert_exact_resume(make_trainer, every=3) == micro_steps(make_trainer) // 3 + 1
    with pytest.raises(UserError, match="every is 0, expected at least 1 micro-step"):
        assert_exact_resume(make_trainer, every=0)


def test_a_finished_trainer_proves_nothing(tone_manifest: Manifest) -> None:
    with pytest.raises(AssertionError, match="a trainer that is finished"):
        assert_exact_resume(plain(tone_manifest, epochs=0))


def test_a_failure_tells_from_where_it_was_continued(tone_manifest: Manifest) -> None:
    class Fails(Remembers):
        def load_state_dict(self, state: dict[str, object]) -> None:
            raise KeyError("step")

    with pytest.raises(KeyError) as caught:
        assert_exact_resume(plain(tone_manifest, Fails))
    assert caught.value.__notes__ == ["while continuing from micro-step 0"]


def test_generators_are_left_as_found(tone_manifest: Manifest) -> None:
    def state_bytes() -> tuple[bytes, bytes]:
        document, tensors = split_tree(generator_states())
        return json_bytes(document), tensor_bytes(tensors)

    before = state_bytes()
    assert_exact_resume(plain(tone_manifest), every=5)
    assert state_bytes() == before


def test_every_trainer_is_made_by_other_generators(tone_manifest: Manifest) -> None:
    drawn = []

    def make_trainer() -> ModelTrainer:
        drawn.append((random.random(), float(np.random.random()), torch.rand(()).item()))
        return plain(tone_manifest)()

    tried = assert_exact_resume(make_trainer, every=4)
    assert all(len(set(draws)) == tried + 2 for draws in zip(*drawn, strict=True))


def test_the_example() -> None:
    assert doctest.testmod(testing).attempted > 5
    assert doctest.testmod(testing).failed == 0


def test_a_validation_is_part_of_the_state(tone_manifest: Manifest) -> None:
    trainer = plain(tone_manifest)()
    trainer.start_training()
    resumed = plain(tone_manifest)()
    resumed.load_state_dict(testing.thawed_state(testing.frozen_state(trainer)))
    assert isinstance(trainer.validation, Validation)
    assert resumed.validation == trainer.validation
