"""Trainers in which everything that a resume could lose is in use."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.metrics import character_error_rate, word_error_rate
from sonosco_mlflow.models import build_model
from sonosco_mlflow.testing import MakeTrainer
from sonosco_mlflow.training.callbacks import (
    Callback,
    EarlyStopping,
    EpochTimeEstimate,
    History,
    LayerGradientNorms,
    LinearWarmUp,
    PlateauLearningRateReduction,
    SoftWindow,
    TeacherForcedTextComparison,
    TextComparison,
)
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import TOKENIZER, ToyModel, tone_loader

TINY: dict[str, dict[str, Any]] = {
    "tds": {
        "channels": [2, 2],
        "blocks": [1, 1],
        "strides": [2, 2],
        "kernel": 3,
        "decoder_size": 8,
        "dropout": 0.2,
        "random_sampling": 0.3,
    },
    "las": {
        "listener_size": 4,
        "joined_frames": [2, 2],
        "attention_size": 4,
        "speller_size": 6,
        "dropout": 0.2,
        "scheduled_sampling": 0.3,
    },
    "deepspeech2": {"channels": [2, 2], "hidden_size": 8, "recurrent_layers": 2, "dropout": 0.2},
}
MODELS = ["toy", *TINY]


class Draws(Callback):
    """A user's callback that draws from every global generator, and has the draws recorded.

    Python's and NumPy's normal draws come in pairs of which the second is kept: one draw a micro-step leaves it kept in
    every other state. torch's generator is seeded anew within each micro-step, so only what is drawn at an epoch's
    beginning depends on its state.
    """

    def on_epoch_begin(self, trainer: ModelTrainer) -> None:
        if trainer.progress.batch == 0:
            trainer.record({"drawn_by_torch": torch.rand(()).item()})

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        trainer.record({"drawn_by_python": random.gauss(0, 1), "drawn_by_numpy": float(np.random.standard_normal())})


class LossGuidedRate(Callback):
    """A user's callback that acts on what the last validation gave, whenever that was."""

    def learning_rate_factor(self, trainer: ModelTrainer) -> float:
        return 1.0 if trainer.validation is None else 1.0 / (1.0 + trainer.validation.metrics["val_loss"])


def new_model(name: str) -> nn.Module:
    if name == "toy":
        return ToyModel()
    return build_model(name, "small", n_mels=8, vocabulary_size=TOKENIZER.vocabulary_size, settings=TINY[name])


def rich_trainer(manifest: Manifest, model: nn.Module, **settings: Any) -> ModelTrainer:
    """Two epochs of four batches, in windows of three, so that the last window of an epoch is short."""
    defaults: dict[str, Any] = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.02),
        "train_loader": training_loader(manifest),
        "val_loader": tone_loader(manifest[14:], seed=None),
        "metrics": [word_error_rate, character_error_rate],
        "callbacks": [
            LinearWarmUp(2),
            PlateauLearningRateReduction(patience=1, factor=0.5, floor=1e-4, monitor="val_word_error_rate"),
            *([SoftWindow(epochs=1)] if hasattr(model, "soft_window") else []),
            EarlyStopping(patience=4),
            History(),
            LayerGradientNorms(every_steps=2),
            EpochTimeEstimate(),
            TextComparison(samples=2),
            TeacherForcedTextComparison(samples=2),
            Draws(),
            LossGuidedRate(),
        ],
        "epochs": 2,
        "accumulation": 3,
        "gradient_clip": 1.0,
        "validate_every_steps": 3,
    }
    return ModelTrainer(model, **{**defaults, **settings})


def training_loader(manifest: Manifest, workers: int = 0) -> AudioDataLoader:
    return tone_loader(manifest[:14], frames_per_batch=160, workers=workers)


def maker(manifest: Manifest, name: str = "toy", **settings: Any) -> MakeTrainer:
    """Return a function that makes equal trainers; a callable among ``settings`` is called for each of them."""

    def make_trainer() -> ModelTrainer:
        torch.manual_seed(7)
        model = new_model(name)
        made = {key: value(model) if callable(value) else value for key, value in settings.items()}
        return rich_trainer(manifest, model, **made)

    return make_trainer
