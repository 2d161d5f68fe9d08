"""What determinism costs in training, as ratios measured side by side.

    python benchmarks/determinism_cost.py                # one to five minutes, a Markdown table
    python benchmarks/determinism_cost.py --seconds 20   # a shorter look

Each round makes one training step under every setting, one right after another in this process and in an order that
rotates, so that what else the machine does falls on all of them. A ratio is taken within a round; the table gives the
median of the rounds and the smallest and largest. The models are the small presets, a batch is 2400 frames.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from sonosco_mlflow import determinism
from sonosco_mlflow.canary import canary
from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.models import MODELS, build_model

UTTERANCES, FRAMES, N_MELS, TOKENS, VOCABULARY = 10, 240, 80, 14, 30
FEWEST_ROUNDS = 3
REPEATS = 50

BASE = "deterministic, 1 thread"


def torch_defaults() -> None:
    determinism.configure(threads=1)
    torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], None]] = {
    BASE: lambda: determinism.configure(threads=1),
    "the same once more": lambda: determinism.configure(threads=1),  # how far the machine's other work moves a ratio
    "torch's defaults, 1 thread": torch_defaults,
    "deterministic, 2 threads": lambda: determinism.configure(threads=2),
}


def reseed() -> None:
    torch.manual_seed(determinism.seed_for(0, "step", 17))


def augmentation_streams() -> None:
    for utterance in range(UTTERANCES):
        determinism.random_stream(0, "augment", 3, f"utterance-{utterance}").random()


# What comes on top of a step, and how often it is repeated to be measured.
EXTRAS: dict[str, tuple[Callable[[], object], int]] = {
    "reseeding, each step": (reseed, REPEATS),
    f"streams of {UTTERANCES} utterances, each step": (augmentation_streams, REPEATS),
    "canary, once a run": (canary, 1),
}


def random_batch() -> Batch:
    draw = determinism.random_stream("determinism_cost")
    return Batch(
        ids=[str(number) for number in range(UTTERANCES)],
        texts=[""] * UTTERANCES,
        features=torch.tensor(2 * draw.random((UTTERANCES, FRAMES, N_MELS)) - 1, dtype=torch.float32),
        feature_lengths=FRAMES - 5 * torch.arange(UTTERANCES),
        tokens=torch.tensor(4 + (VOCABULARY - 4) * draw.random((UTTERANCES, TOKENS))).long(),
        token_lengths=TOKENS - torch.arange(UTTERANCES) % 5,
    )


def step_of(name: str) -> Callable[[], None]:
    """A training step of a new model."""
    model = build_model(name, "small", N_MELS, VOCABULARY, {}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = random_batch()

    def step() -> None:
        model(batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - started) / repeats


def measured(name: str, limit: float) -> dict[str, list[float]]:
    """Each round's ratios by what was measured: throughput to the base's, or an extra's cost to a step of the base."""
    step, names = step_of(name), list(SETTINGS)
    *single, last = names
    ratios: dict[str, list[float]] = {label: [] for label in (*names[1:], *EXTRAS)}
    SETTINGS[last]()
    step()  # it also makes the kernels for two threads
    ends = time.perf_counter() + limit
    rounds = 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() < ends:
        SETTINGS[BASE]()
        step()  # whatever comes next would pay for the two threads of the round before
        taken = {}
        first = rounds % len(single)
        for setting in (*single[first:], *single[:first], last):
            SETTINGS[setting]()
            taken[setting] = seconds(step)
        SETTINGS[BASE]()
        for setting in names[1:]:
            ratios[setting].append(taken[BASE] / taken[setting])
        for label, (work, repeats) in EXTRAS.items():
            ratios[label].append(seconds(work, repeats) / taken[BASE])
        rounds += 1
    return ratios


def cell(label: str, ratios: list[float]) -> str:
    middle, low, high = median(ratios), min(ratios), max(ratios)
    if label in SETTINGS:
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return f"{100 * middle:.2f} % ({100 * low:.2f} to {100 * high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure each model")
    limit = parser.parse_args().seconds
    results = {name: measured(name, limit) for name in sorted(MODELS)}
    rounds = ", ".join(f"{name} {len(next(iter(result.values())))}" for name, result in results.items())
    print(f'Throughput relative to "{BASE}"; costs as shares of one such step. Rounds: {rounds}.\n')
    print(f"| | {' | '.join(results)} |\n|---|{'---|' * len(results)}")
    for label in next(iter(results.values())):
        print(f"| {label} | {' | '.join(cell(label, result[label]) for result in results.values())} |")


if __name__ == "__main__":
    main()
