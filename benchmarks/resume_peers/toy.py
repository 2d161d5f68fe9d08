"""The training that every case runs, and what the cases share: data, model, log of steps, the kill."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

FRAMES, BANDS, CLASSES = 20, 8, 6


@dataclass(frozen=True)
class Segment:
    """One process's part of a training; it arrives as JSON on the command line."""

    variant: str
    folder: str
    name: str
    samples: int
    batch_size: int
    epochs: int
    checkpoint_every: int
    workers: int
    augment: bool
    resume: bool
    kill_at: int | None

    @classmethod
    def from_command_line(cls) -> "Segment":
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        segment = cls(**json.loads(sys.argv[1]))
        segment.checkpoints.mkdir(parents=True, exist_ok=True)
        return segment

    @property
    def checkpoints(self) -> Path:
        return Path(self.folder) / "checkpoints"

    @property
    def steps(self) -> int:
        return self.epochs * self.samples // self.batch_size

    @property
    def last_checkpoint_before_kill(self) -> int:
        assert self.kill_at is not None
        return (self.kill_at - 1) // self.checkpoint_every * self.checkpoint_every

    def write_weights(self, model: nn.Module) -> None:
        tensors = [tensor.detach().numpy().tobytes() for _, tensor in sorted(model.state_dict().items())]
        (Path(self.folder) / f"{self.name}.weights").write_bytes(b"".join(tensors))


class StepLog:
    """Writes one line for each training step, and at the chosen one kills this process, as an operator would.

    Args:
        segment: tells where, and at which step.
        whole: ``whole(step)`` tells whether the checkpoint of ``step`` is complete; the kill waits for it.
    """

    def __init__(self, segment: Segment, whole: Callable[[int], bool]) -> None:
        self._segment = segment
        self._whole = whole
        self._file = (Path(segment.folder) / f"{segment.name}.jsonl").open("w")

    def step(self, epoch: int, step: int, ids: Iterable[int], loss: Tensor) -> None:
        line = {"epoch": epoch, "step": step, "ids": [int(identity) for identity in ids], "loss": loss.item().hex()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if step == self._segment.kill_at:
            expected = self._segment.last_checkpoint_before_kill
            deadline = time.monotonic() + 60
            while not self._whole(expected):
                if time.monotonic() > deadline:
                    sys.exit(f"step {step}: there is no whole checkpoint of step {expected}")
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)


def augmented(features: Tensor) -> Tensor:
    """Noise and a mask in time, drawn from torch's global generator, as people do."""
    features = features + 0.1 * torch.randn(features.shape)
    start = int(torch.randint(FRAMES - 5, ()))
    features[start : start + 5] = 0.0
    return features


class ToyDataset(Dataset[dict[str, Tensor]]):
    """Noisy patterns, each of one of six classes."""

    def __init__(self, samples: int, augment: bool) -> None:
        stream = torch.Generator().manual_seed(0)
        patterns = torch.randn(CLASSES, 1, BANDS, generator=stream)
        self.labels = torch.arange(samples) % CLASSES
        self.features = patterns[self.labels] + torch.randn(samples, FRAMES, BANDS, generator=stream)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        features = self.features[position]
        if self.augment:
            features = augmented(features)
        return {"features": features, "labels": self.labels[position], "ids": torch.tensor(position)}


class ToyModel(nn.Module):
    """A small LSTM with dropout that names the class of a pattern."""

    def __init__(self, bands: int = BANDS, hidden: int = 16, classes: int = CLASSES, dropout: float = 0.2) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(bands, hidden, num_layers=2, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, classes)

    def forward(self, features: Tensor) -> Tensor:
        hidden, _ = self.recurrent(features)
        return self.output(self.dropout(hidden.mean(dim=1)))
