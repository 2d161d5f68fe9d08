"""Runs of an Experiment on a toy, for the tests that look at what it leaves."""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import torch

from sonosco_mlflow import metrics
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.training.callbacks import Callback, ModelCheckpoint
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import ToyModel, tone_loader

SETTINGS = {"size": 1}


def new_project(folder: Path) -> Path:
    """Make ``folder`` a repository whose runs lie outside of what git sees."""
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    (folder / ".gitignore").write_text("runs/\n")
    (folder / "requirements.txt").write_text("torch==2.11.0\n")
    (folder / "model.py").write_text("x = 1\n")
    return folder


class Interrupt(Callback):
    """Sends a signal at a step, so many times. It observes: no state knows of it."""

    def __init__(self, step: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.step = step
        self.number = number
        self.times = times

    def on_step_end(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def toy_trainer(
    manifest: Manifest,
    *callbacks: Callback,
    epochs: int = 2,
    stop_at: int | None = None,
    times: int = 1,
    learning_rate: float = 1e-3,
) -> ModelTrainer:
    torch.manual_seed(0)
    model = ToyModel()
    trainer = ModelTrainer(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=learning_rate),
        train_loader=tone_loader(manifest),
        val_loader=tone_loader(manifest, seed=None),
        metrics=[metrics.word_error_rate],
        callbacks=[*callbacks, ModelCheckpoint(every_steps=4)],
        epochs=epochs,
    )
    if stop_at is not None:
        trainer.attach(Interrupt(stop_at, times=times))
    return trainer


def train(experiment: Experiment, trainer: ModelTrainer) -> Experiment:
    experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    try:
        experiment.start()
    except KeyboardInterrupt:
        experiment.stop()
    return experiment


def run_experiment(trainer: ModelTrainer, folder: Path) -> Experiment:
    return train(Experiment.create(SETTINGS, project=folder, name="toy"), trainer)


def go_on(run_id: str, trainer: ModelTrainer, folder: Path, **options: Any) -> Experiment:
    return train(Experiment.resume(run_id, project=folder, **options), trainer)


def artifacts(run_id: str, folder: str = "") -> set[str]:
    return {item.path for item in mlflow.MlflowClient().list_artifacts(run_id, folder)}


def all_artifacts(run_id: str, folder: str = "") -> dict[str, int | None]:
    found = {}
    for item in mlflow.MlflowClient().list_artifacts(run_id, folder):
        found.update(all_artifacts(run_id, item.path) if item.is_dir else {item.path: item.file_size})
    return found


def rows(run_id: str) -> Mapping[tuple[str, int], list[float]]:
    client = mlflow.MlflowClient()
    found: dict[tuple[str, int], list[float]] = {}
    for name in client.get_run(run_id).data.metrics:
        for item in client.get_metric_history(run_id, name):
            if not name.startswith(("system/", "resume.")):
                found.setdefault((name, item.step), []).append(item.value)
    return found


def vanish(experiment: Experiment) -> None:
    """Leave a run as its process does that is killed: nothing more is written, nothing is told."""
    opened = experiment.opened
    opened._resources.close()
    opened.recording.close()
    opened.run.deactivate()
    opened.lease._ended.set()
    opened.lease._lock.release()
