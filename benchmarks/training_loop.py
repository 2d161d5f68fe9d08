"""What everything around the model costs: the training as it is, against a bare loop over the same batches.

    sonosco data
    python benchmarks/training_loop.py [--models tds,las,deepspeech2] [--epochs 2] [--pairs 5]

The training is a run of the recipe in ``params.yaml``, with its data loader, step metrics, callbacks, journal, MLflow,
TensorBoard and checkpoints. The bare loop makes the same optimizer steps on the same batches and has nothing else. Each
is a process of its own, and they take turns; what is read is the ratio of each pair. Validation, which the bare loop
does not have, is not counted, nor is what comes before the first step and after the last.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import mlflow
import torch

from sonosco_mlflow import determinism
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.recipe import Loaders, build_loaders, build_trainer
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation


class Stopwatch:
    """Counts the seconds that a trainer spends in its validations."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._evaluate = ModelTrainer.evaluate

    def evaluate(self, trainer: ModelTrainer, loader: AudioDataLoader, prefix: str) -> Validation:
        begun = time.perf_counter()
        try:
            return self._evaluate(trainer, loader, prefix)
        finally:
            self.seconds += time.perf_counter() - begun


def whole(config: Config, loaders: Loaders) -> float:
    """Return the seconds of a training with everything on."""
    with tempfile.TemporaryDirectory() as scratch:
        mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
        with contextlib.redirect_stdout(io.StringIO()):
            experiment = Experiment.create(config, project=Path(scratch))
            trainer = build_trainer(config, loaders)
            experiment.setup_model_trainer(trainer)
            watch = Stopwatch()
            with mock.patch.object(ModelTrainer, "evaluate", lambda *call: watch.evaluate(*call)):
                begun = time.perf_counter()
                trainer.start_training()
                seconds = time.perf_counter() - begun - watch.seconds
            experiment.stop()
        return seconds


def bare(config: Config, loaders: Loaders) -> float:
    """Return the seconds of the same steps, and of nothing else."""
    determinism.configure(config.training.threads)
    trainer = build_trainer(config, loaders)
    model, optimizer = trainer.model, trainer.optimizer
    parameters = list(model.parameters())
    model.train()
    begun = time.perf_counter()
    for epoch in range(config.training.epochs):
        if hasattr(model, "soft_window"):
            model.soft_window = epoch < config.training.soft_window_epochs
        for batch in loaders.train.epoch(epoch):
            optimizer.zero_grad()
            model(batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.training.gradient_clip or float("inf"))
            optimizer.step()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tds,las,deepspeech2")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--one", choices=["whole", "bare"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        overrides = {"model.name": arguments.models, "training.epochs": str(arguments.epochs)}
        config = Config.load(Path("params.yaml"), overrides)
        loaders = build_loaders(config, DataFolder(Path("data")))
        print({"whole": whole, "bare": bare}[arguments.one](config, loaders))
        return
    print(
        "| model | bare loop | training | ratio, median of pairs | lowest | highest |\n|---|---:|---:|---:|---:|---:|"
    )
    for name in arguments.models.split(","):
        pairs = []
        for number in range(arguments.pairs):
            order = ["whole", "bare"] if number % 2 else ["bare", "whole"]
            seconds = {
                kind: float(
                    subprocess.run(
                        [sys.executable, __file__, "--one", kind, "--models", name, "--epochs", str(arguments.epochs)],
                        check=True,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                    ).stdout
                )
                for kind in order
            }
            pairs.append((seconds["bare"], seconds["whole"], seconds["whole"] / seconds["bare"]))
        without, with_all, ratios = zip(*pairs, strict=True)
        print(
            f"| {name} | {statistics.median(without):.1f} s | {statistics.median(with_all):.1f} s "
            f"| {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
