"""For how long saving holds up the training, and what it would cost on the training thread.

    python benchmarks/checkpoint_stall.py [--preset small] [--steps 40] [--every 5]

A model trains on noise, with AdamW, and saves every few steps. Told are, for each save: the seconds that the training
thread was held up; the seconds that writing, syncing and verifying take when done in its place; and the share of the
training that the stalls were. Both ways are measured in the same run, in turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch

from sonosco_mlflow import determinism
from sonosco_mlflow.background import Background
from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.data.processor import AudioDataProcessor
from sonosco_mlflow.models import build_model
from sonosco_mlflow.text import CharacterTokenizer
from sonosco_mlflow.training.callbacks import Callback, ModelCheckpoint
from sonosco_mlflow.training.trainer import ModelTrainer

SECONDS = 4.0
SAMPLE_RATE = 16000


def noise_loader(folder: Path, utterances: int) -> AudioDataLoader:
    """Four seconds of noise an utterance, six utterances a batch."""
    stream = np.random.default_rng(0)
    rows = []
    for number in range(utterances):
        name = f"noise-{number:04d}"
        samples = stream.uniform(-0.1, 0.1, int(SECONDS * SAMPLE_RATE))
        soundfile.write(folder / f"{name}.wav", samples, SAMPLE_RATE)
        rows.append(Utterance(name, f"{name}.wav", SECONDS, "THIS IS NOISE", "noise"))
    dataset = AudioDataset(
        Manifest(rows, folder), AudioDataProcessor(n_mels=80), CharacterTokenizer.of(["THIS IS NOISE"])
    )
    return AudioDataLoader(dataset, frames_per_batch=2400, seed=0)


class Stopwatch(Callback):
    """Notes the stall of each save; saves alternate between both ways."""

    def __init__(self, checkpoint: ModelCheckpoint, every: int, warm_up: int = 2) -> None:
        self.checkpoint = checkpoint
        self.every = every
        self.warm_up = warm_up
        self.beside: list[float] = []
        self.instead: list[float] = []
        self._before = 0.0

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        """Read what the checkpoint before this observer has counted, and change over."""
        stall = self.checkpoint.stall_seconds - self._before
        self._before = self.checkpoint.stall_seconds
        if trainer.progress.step % self.every == 0 and trainer.progress.step > self.warm_up * self.every:
            (self.instead if self._waits(trainer.progress.step) else self.beside).append(stall)

    def _waits(self, step: int) -> bool:
        return (step // self.every) % 2 == 1


def waiting_in_turn(trainer: ModelTrainer, every: int) -> Callable[..., None]:
    """Return a Background.write that every second time returns only when the task is done."""
    write = Background.write

    def in_turn(self: Background, task: Callable[[], object]) -> None:
        write(self, task)
        if (trainer.progress.step // every) % 2 == 1:
            self.finish_writes()

    return in_turn


def measure(name: str, preset: str, steps: int, every: int) -> str:
    """Return one row of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        loader = noise_loader(Path(scratch), utterances=6 * steps)
        torch.manual_seed(0)
        model = build_model(name, preset, n_mels=80, vocabulary_size=loader.tokenizer.vocabulary_size, settings={})
        checkpoint = ModelCheckpoint(Path(scratch) / "checkpoints", every_steps=every, every_epochs=None)
        trainer = ModelTrainer(model, train_loader=loader, callbacks=[checkpoint], epochs=1)
        watch = Stopwatch(checkpoint, every)
        trainer.attach(watch)
        started = time.perf_counter()
        with mock.patch.object(Background, "write", waiting_in_turn(trainer, every)):
            trainer.start_training()
        seconds = time.perf_counter() - started - sum(watch.instead)
        state = sum(tensor.numel() for tensor in model.state_dict().values()) * 3 * 4 / 1e6
        beside, instead = statistics.median(watch.beside), statistics.median(watch.instead)
        share = sum(watch.beside) * 2 / seconds
        return (
            f"| {name}, {preset} | {state:.0f} MB | {1000 * beside:.1f} ms | {1000 * instead:.0f} ms "
            f"| {instead / beside:.0f} | {100 * share:.2f} % |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--models", default="tds,las,deepspeech2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5)
    arguments = parser.parse_args()
    determinism.configure(threads=1)
    print("| model | state | stall of a save | on the training thread | ratio | share of the training |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in arguments.models.split(","):
        print(measure(name, arguments.preset, arguments.steps, arguments.every), flush=True)


if __name__ == "__main__":
    main()
