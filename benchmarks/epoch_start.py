"""What it takes to begin an epoch of a million utterances, at its first batch and far into it.

    python benchmarks/epoch_start.py [--utterances 1000000] [--starts 0,400000] [--rounds 5]

Lengths are like LibriSpeech's, 12 s on average, in batches of 2,400 frames, which most of them fill alone. Features are
made up in memory, so that what is measured is the way to a batch and not the disk. Seconds are the processor's: of the
plan of the epoch, and from asking for the epoch to having its first batch, that plan included. In a round each has one
turn; the table gives the median of the rounds, and the ratio to the first within a round.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.data.processor import AudioDataProcessor
from sonosco_mlflow.text import CharacterTokenizer


class MadeUp:
    """Features of nothing, as many frames as are asked for."""

    n_mels, digest, place = 80, "", "memory"

    def __init__(self, frames: dict[str, int]) -> None:
        self._frames = frames

    def __contains__(self, utterance_id: str) -> bool:
        return utterance_id in self._frames

    def frames(self, utterance_id: str) -> int:
        return self._frames[utterance_id]

    def read(self, utterance_id: str) -> np.ndarray:
        return np.zeros((self._frames[utterance_id], self.n_mels), np.float32)

    def shards(self) -> Iterator[np.ndarray]:
        return iter(())


def loader_of(utterances: int) -> AudioDataLoader:
    stream = np.random.default_rng(0)
    seconds = np.where(
        stream.random(utterances) < 0.74, stream.normal(13.8, 1.5, utterances), stream.uniform(1, 15, utterances)
    )
    frames = (100 * seconds.clip(1, 35)).astype(int).tolist()
    rows = [Utterance(f"{number:07d}", "a.wav", length / 100, "YES", "a") for number, length in enumerate(frames)]
    store = MadeUp({row.id: length for row, length in zip(rows, frames, strict=True)})
    dataset = AudioDataset(Manifest(rows, Path()), AudioDataProcessor(), CharacterTokenizer([*"ESY"]), store=store)
    return AudioDataLoader(dataset, frames_per_batch=2400, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--starts", default="0,400000")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loader = loader_of(arguments.utterances)
    starts = [int(start) for start in arguments.starts.split(",")]
    print(f"{arguments.utterances:,} utterances, {loader.batches_in(0):,} batches\n")
    works: dict[str, Callable[[], object]] = {
        f"first batch, from {start:,} on": lambda start=start: next(loader.epoch(0, start)) for start in starts
    }
    works["plan alone"] = lambda: loader.plan.batches(0)
    seconds: dict[str, list[float]] = {title: [] for title in works}
    for round_ in range(-1, arguments.rounds):
        for title, work in works.items():
            begun = time.process_time()
            work()
            if round_ >= 0:  # whoever comes first pays for what is made once
                seconds[title].append(time.process_time() - begun)
    reference = next(iter(seconds.values()))
    print("| | seconds | beside the first |\n|---|---|---|")
    for title, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, reference, strict=True)]
        print(f"| {title} | {median(taken):.2f} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


if __name__ == "__main__":
    main()
