"""Which share of a training's time it waits for data, without a worker and with one.

    sonosco data
    python benchmarks/loader_wait.py [--models tds,las,deepspeech2] [--batches 110] [--rounds 3]

The training is that of ``params.yaml`` in its first epoch, from the stored features and, with ``augment.speeds``, from
the recordings. In a round each has its turn, one right after another, in one process. Waiting is what passes between
asking for a batch and having it, on the clock, from the start of the workers on; so it counts what else the machine
does, and a worker needs a core of its own to be of use. The table gives the median of the rounds and the smallest and
largest.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from unittest import mock

from sonosco_mlflow import determinism
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.loader import AudioDataLoader, Batch
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.recipe import Loaders, build_loaders, build_trainer

SOURCES = {"stored features": {}, "recordings, at three speeds": {"augment.speeds": "[0.9, 1.0, 1.1]"}}


def share_of_waiting(config: Config, loaders: Loaders, batches: int) -> float:
    """Return it for so many batches of a new training."""
    trainer = build_trainer(config, loaders)
    trainer.val_loader, trainer.callbacks, trainer.epochs = None, [], 1
    epoch = AudioDataLoader.epoch
    waited = 0.0

    def watched(loader: AudioDataLoader, number: int, start: int = 0) -> Iterator[Batch]:
        nonlocal waited
        source = islice(epoch(loader, number, start), batches)
        while True:
            begun = time.perf_counter()
            batch = next(source, None)
            waited += time.perf_counter() - begun
            if batch is None:
                trainer.stop_training("enough")
                return
            yield batch

    begun = time.perf_counter()
    with (
        mock.patch.object(AudioDataLoader, "epoch", watched),
        mock.patch.object(AudioDataLoader, "batches_in", return_value=batches),
    ):
        trainer.start_training()
    return waited / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tds,las,deepspeech2")
    parser.add_argument("--batches", type=int, default=110)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the data folder")
    arguments = parser.parse_args()
    print("| model | read from | waiting, no worker | waiting, one worker |\n|---|---|---:|---:|")
    for model in arguments.models.split(","):
        for source, settings in SOURCES.items():
            config = Config.load(Path("params.yaml"), {"model.name": model, **settings})
            determinism.configure(config.training.threads)
            loaders = build_loaders(config, DataFolder(arguments.data))
            assert loaders.train.batches_in(0) >= arguments.batches, "fewer batches than are asked for"
            shares: dict[int, list[float]] = {0: [], 1: []}
            for round_ in range(-1, arguments.rounds):
                for workers in (0, 1) if round_ % 2 else (1, 0):
                    loaders.train.workers = workers
                    share = share_of_waiting(config, loaders, arguments.batches)
                    if round_ >= 0:  # whoever comes first pays for what is made once
                        shares[workers].append(100 * share)
            cells = [
                f"{statistics.median(found):.1f} % ({min(found):.1f} to {max(found):.1f})" for found in shares.values()
            ]
            print(f"| {model} | {source} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
