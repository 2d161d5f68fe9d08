"""Which utterances make up which batch: a pure function of (lengths, seed, epoch).

Utterances of like length share a batch, so that little is spent on padding, and a batch is bounded by its padded
size in frames rather than by its number of utterances, so that memory and time per batch stay level. Nothing is
carried from one batch or epoch to the next: batch 400 of epoch 7 is known without making any before it.

>>> plan = BatchPlan(frames=[300, 100, 120, 310], frames_per_batch=650, seed=0)
>>> sorted(sorted(batch) for batch in plan.batches(epoch=0))
[[0, 3], [1, 2]]
"""

import copy
import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np

from sonosco_mlflow.determinism import random_stream
from sonosco_mlflow.errors import UserError


class BatchPlan:
    """Length-bucketed batches under a frame budget.

    Args:
        frames: length of each utterance in feature frames, in manifest order.
        frames_per_batch: bound on ``batch size x longest utterance``; an utterance over it has a batch of its own.
        seed: key of the shuffling; None keeps the order of length (evaluation).
        jitter: spread of the random factor on an utterance's length before sorting. It mixes neighbours between
            epochs at a small cost in padding.
        sorta_grad: whether the batches of the first epoch come in the order of their longest utterances, the shortest
            first (Amodei et al. 2016, section 3.3): early in training, CTC goes astray on long utterances.
        curriculum_epochs: number of epochs, from the first on, that see the shortest utterances alone, more of them
            from one to the next: epoch ``e`` of ``n`` has the share ``sqrt((e + 1) / (n + 1))``, which is the square
            root competence of Platanios et al. 2019 with an epoch for its step; epoch ``n`` has all.
    """

    def __init__(
        self,
        frames: Sequence[int],
        frames_per_batch: int,
        seed: int | None = None,
        jitter: float = 0.05,
        sorta_grad: bool = False,
        curriculum_epochs: int = 0,
    ) -> None:
        if frames_per_batch < 1:
            raise UserError(f"data.frames_per_batch is {frames_per_batch}, expected at least 1")
        self.frames = np.asarray(frames, dtype=np.int64)
        self.frames_per_batch = frames_per_batch
        self.seed = seed
        self.jitter = jitter
        self.sorta_grad = sorta_grad
        self.curriculum_epochs = curriculum_epochs

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of all that the batches depend on."""
        # What came later counts only where it is used: a run from before has the digest of then.
        order: list[object] = ["sorta_grad"] if self.sorta_grad else []
        share = [{"curriculum_epochs": self.curriculum_epochs}] if self.curriculum_epochs else []
        settings = json.dumps([self.frames_per_batch, self.seed, self.jitter, *order, *share]).encode()
        return hashlib.sha256(settings + self.frames.astype("<i8").tobytes()).hexdigest()

    def with_frames(self, frames: Sequence[int]) -> "BatchPlan":
        """Return the same plan for utterances of other lengths: an augmentation may change them in an epoch."""
        plan = copy.copy(self)
        plan.frames = np.asarray(frames, dtype=np.int64)
        return plan

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the batches of ``epoch``, each a list of positions in the manifest.

        Every position is in them once; in an epoch of the curriculum, every one of the shortest.
        """
        if self.seed is None:
            return self._cut(np.argsort(self.frames, kind="stable"))
        stream = random_stream(self.seed, "batches", epoch)
        noise = 1.0 + self.jitter * (2.0 * stream.random(len(self.frames)) - 1.0)
        batches = self._cut(self._of_curriculum(np.argsort(self.frames * noise, kind="stable"), epoch))
        if self.sorta_grad and epoch == 0:
            return sorted(batches, key=lambda batch: int(self.frames[batch].max()))
        # argsort of uniform draws rather than permutation(): uniform draws are the same on every instruction set.
        return [batches[i] for i in np.argsort(stream.random(len(batches)), kind="stable")]

    def padding(self, epoch: int) -> float:
        """Return the share of frames in ``epoch`` that are padding, in [0, 1)."""
        frames = padded = 0
        for batch in self.batches(epoch):
            lengths = self.frames[batch]
            frames += int(lengths.sum())
            padded += len(batch) * int(lengths.max())
        return 1.0 - frames / padded if padded else 0.0

    def _of_curriculum(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """Return of ``order``, positions, those that ``epoch`` sees, in this order."""
        if epoch >= self.curriculum_epochs:
            return order
        share = math.sqrt((epoch + 1) / (self.curriculum_epochs + 1))
        seen = np.zeros(len(order), dtype=bool)
        seen[np.argsort(self.frames, kind="stable")[: math.ceil(share * len(order))]] = True
        return np.compress(seen[order], order)

    def _cut(self, order: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = []
        longest = 0
        # Numbers of Python's: to look at NumPy's one by one takes twice as long.
        for position, frames in zip(order.tolist(), self.frames[order].tolist(), strict=True):
            longest_with = max(longest, frames)
            if batches and longest_with * (len(batches[-1]) + 1) <= self.frames_per_batch:
                batches[-1].append(position)
                longest = longest_with
            else:
                batches.append([position])
                longest = frames
        return batches
