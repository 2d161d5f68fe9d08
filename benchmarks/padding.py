"""Which share of the frames that a model computes on is padding.

    python benchmarks/padding.py [an4.tar.gz]

Of AN4's training split, where its archive is given, and of 28,539 lengths like those of LibriSpeech's train-clean-100,
though none of them: 1 to 35 s, 12.3 s on average, most between 10 and 16. In the order of an epoch (the mean of the
first four), of an epoch of a curriculum of three (the worst), of evaluation, and where utterances that follow each
other in a random order share a batch.
"""

import sys
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np

from sonosco_mlflow.data.batching import BatchPlan
from sonosco_mlflow.data.corpora import bring_corpus
from sonosco_mlflow.data.processor import AudioDataProcessor

BUDGETS = [2400, 3200, 6000, 12_000, 24_000]


def an4_frames(archive: str) -> list[int]:
    processor = AudioDataProcessor()
    with tempfile.TemporaryDirectory() as folder:
        train = bring_corpus("an4", Path(folder), source=archive)["train"]
    return [processor.frames(round(utterance.duration * processor.sample_rate)) for utterance in train]


def librispeech_like_frames(count: int = 28_539) -> list[int]:
    stream = np.random.default_rng(0)
    most, few, fewest, kind = stream.random((3, count)).sum(axis=0), *stream.random((3, count))
    seconds = np.where(kind < 0.74, 9.2 + 3 * most, 1 + 14 * few)
    return (100 * np.where(kind > 0.995, 17 + 18 * fewest, seconds)).astype(int).tolist()


def padding_of_random_order(frames: list[int], budget: int) -> float:
    batch: list[int] = []
    padded = 0
    for length in np.random.default_rng(0).permutation(frames).tolist():
        if batch and max(*batch, length) * (len(batch) + 1) > budget:
            padded += max(batch) * len(batch)
            batch = []
        batch.append(length)
    return 1 - sum(frames) / (padded + max(batch) * len(batch))


def main() -> None:
    lengths = {"like LibriSpeech's": librispeech_like_frames()}
    if len(sys.argv) > 1:
        lengths = {"AN4's": an4_frames(sys.argv[1]), **lengths}
    print("| lengths | `data.frames_per_batch` | training | in a curriculum | evaluation | random order |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, frames in lengths.items():
        for budget in BUDGETS:
            plan = BatchPlan(frames, budget, seed=0)
            curriculum = BatchPlan(frames, budget, seed=0, curriculum_epochs=3)
            shares = [
                mean(plan.padding(epoch) for epoch in range(4)),
                max(curriculum.padding(epoch) for epoch in range(3)),
                BatchPlan(frames, budget).padding(0),
                padding_of_random_order(frames, budget),
            ]
            print(f"| {name} | {budget:,} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")


if __name__ == "__main__":
    main()
