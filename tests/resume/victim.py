"""The training that is killed: a process that trains a tiny model in an Experiment, or continues such a run.

It runs in a fork of a process that has imported everything.
"""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import mlflow
import numpy as np
import torch

from rich_trainer import Draws, new_model, rich_trainer, training_loader
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import describe_failure
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.text import CharacterTokenizer
from sonosco_mlflow.training.callbacks import Callback, EarlyStopping, ModelCheckpoint
from sonosco_mlflow.training.interruption import Terminated, raise_on_termination
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import ALPHABET, tone_loader

LONG = 3600.0


@dataclass(frozen=True)
class Launch:
    """One process: what it trains, where, and what befalls it.

    Attributes:
        run_id: the run to continue, or None to begin one.
        notes: folder in which the process leaves its run's id, its steps, its output and its operations.
        model: ``toy`` or one of the three models.
        workers: of the loaders.
        pace: seconds that each optimizer step takes more.
        hold: the step at whose end it stays until it is killed, before the step's checkpoint.
        minutes: between saves that follow no schedule; None makes none.
        config: the settings that the run is created or continued with; by default those of the first launch.
        alphabet: of the tokenizer.
        allowed: changes that a continuation allows.
        fault: what happens to it at a seam.
        sabotage: called in the process before it trains.
    """

    project: Path
    corpus: Path
    store: str
    notes: Path
    run_id: str | None = None
    model: str = "toy"
    workers: int = 0
    epochs: int = 2
    pace: float = 0.0
    hold: int | None = None
    minutes: float | None = None
    config: dict[str, Any] | None = None
    alphabet: tuple[str, ...] = tuple(ALPHABET)
    allowed: tuple[str, ...] = ()
    fault: faults.Fault | None = None
    sabotage: Callable[[], None] | None = None


class StepDraws(Callback):
    """A user's callback that draws from every global generator, and has the draws recorded."""

    def on_step_end(self, trainer: ModelTrainer) -> None:
        drawn = {"python": random.gauss(0, 1), "numpy": float(np.random.standard_normal())}
        trainer.record({f"drawn_by_{name}": value for name, value in drawn.items()})


class Pace(Callback):
    """Notes when each step was made, and takes its time."""

    def __init__(self, launch: Launch) -> None:
        self.file = launch.notes / "steps"
        self.launch = launch

    def on_step_end(self, trainer: ModelTrainer) -> None:
        with self.file.open("a") as file:
            file.write(f"{trainer.progress.step} {time.time()}\n")
        time.sleep(LONG if trainer.progress.step == self.launch.hold else self.launch.pace)


def make_trainer(launch: Launch, manifest: Manifest) -> ModelTrainer:
    torch.manual_seed(7)
    loaders = {
        "train_loader": training_loader(manifest, launch.workers),
        "val_loader": tone_loader(manifest[14:], seed=None, workers=launch.workers),
    }
    for loader in loaders.values():
        loader.dataset.tokenizer = CharacterTokenizer(launch.alphabet)
    trainer = rich_trainer(manifest, new_model(launch.model), epochs=launch.epochs, **loaders)
    # A metric has one value a step, in MLflow.
    # A long training is to be long, for what happens meanwhile.
    others = {Draws: StepDraws(), EarlyStopping: EarlyStopping(patience=max(4, launch.epochs))}
    trainer.callbacks[:] = [others.get(type(item), item) for item in trainer.callbacks]
    trainer.callbacks.append(ModelCheckpoint(every_steps=1, every_minutes=launch.minutes, keep_last=2, keep_best=1))
    trainer.attach(Pace(launch))
    return trainer


def train(launch: Launch) -> int:
    """Train as told and return the exit status, as the command line does."""
    raise_on_termination()
    try:
        if launch.run_id is None:
            experiment = Experiment.create(launch.config or {"size": 1}, project=launch.project, name="toy")
            (launch.notes / "run").write_text(experiment.run.id)
        else:
            experiment = Experiment.resume(
                launch.run_id, launch.config, project=launch.project, allowed_changes=launch.allowed
            )
        trainer = make_trainer(launch, Manifest.read(launch.corpus / "manifest.jsonl"))
        experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
        try:
            experiment.start()
        except KeyboardInterrupt as interrupt:
            experiment.stop()
            return 143 if isinstance(interrupt, Terminated) else 130
    except Exception as error:
        print(f"sonosco: {describe_failure(error)}", file=sys.stderr)
        return 1
    return 0


def run(launch: Launch) -> None:
    """Become the process that trains; for a fork that has done nothing yet."""
    # As in a program of its own: from a fork server comes the wish to start another one for the loaders' workers.
    multiprocessing.set_start_method("fork", force=True)
    output = os.open(launch.notes / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    # A program of its own has buffers of its own; those of the test runner's are not to be written twice.
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ["MLFLOW_TRACKING_URI"] = launch.store
    mlflow.set_tracking_uri(None)
    faults.install(launch.fault, launch.notes / "disk", launch.notes / "store")
    if launch.sabotage is not None:
        launch.sabotage()
    sys.exit(train(launch))
