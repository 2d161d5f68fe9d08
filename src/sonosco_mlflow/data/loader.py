"""Batches of an epoch, from any position on, by any number of workers.

The cursor is an argument: ``loader.epoch(3, start=120)`` begins at batch 120 of epoch 3 without touching the 120
before it. What a worker prefetched is nobody's state; the consumer counts what it consumed.

Where several processes train, each has a part of the same batches in the same order::

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loader = AudioDataLoader(dataset, frames_per_batch=6000, seed=0, rank=rank, ranks=ranks)
    for step, batch in enumerate(loader.epoch(3, start=120)):
        ...  # batch 120 + step * ranks + rank; 120 + (step + 1) * ranks is where all of them go on
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sonosco_mlflow.data.batching import BatchPlan
from sonosco_mlflow.data.dataset import AudioDataset, Sample
from sonosco_mlflow.data.workers import leave_signals_to_main, one_ahead, open_files_explained, share, signals_held_back
from sonosco_mlflow.determinism import one_thread
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import SpecialToken, Tokenizer


@dataclass(frozen=True)
class Batch:
    """Utterances padded to a common length; of none, where another rank has the last batch of an epoch.

    Attributes:
        ids: utterance ids.
        texts: reference transcripts.
        features: ``[batch, time, mel]`` float32, zero beyond each utterance's length.
        feature_lengths: ``[batch]`` int64, frames.
        tokens: ``[batch, length]`` int64 without start or end of sentence, ``SpecialToken.PAD`` beyond the length.
        token_lengths: ``[batch]`` int64.
    """

    ids: list[str]
    texts: list[str]
    features: Tensor
    feature_lengths: Tensor
    tokens: Tensor
    token_lengths: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def frames(self) -> int:
        """Number of frames that are not padding."""
        return int(self.feature_lengths.sum())

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors on ``device``."""
        return replace(
            self,
            features=self.features.to(device),
            feature_lengths=self.feature_lengths.to(device),
            tokens=self.tokens.to(device),
            token_lengths=self.token_lengths.to(device),
        )


def collate(samples: list[Sample]) -> Batch:
    """Pad ``samples`` to a :class:`Batch`, in their order."""
    features = torch.nn.utils.rnn.pad_sequence([sample.features for sample in samples], batch_first=True)
    tokens = torch.nn.utils.rnn.pad_sequence(
        [sample.tokens for sample in samples], batch_first=True, padding_value=float(SpecialToken.PAD)
    )
    return Batch(
        ids=[sample.id for sample in samples],
        texts=[sample.text for sample in samples],
        features=features,
        feature_lengths=torch.tensor([len(sample.features) for sample in samples]),
        tokens=tokens,
        token_lengths=torch.tensor([len(sample.tokens) for sample in samples]),
    )


def _no_utterances(size: int) -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    return Batch([], [], torch.zeros(0, 0, size), none, none.reshape(0, 0), none)


class _Epoch(Dataset[Sample | UserError]):
    """The dataset as one epoch sees it: the epoch is a key of the augmentation.

    A mistake of the user's is returned: raised in a worker, it would come as that process's traceback.
    """

    def __init__(self, dataset: AudioDataset, epoch: int) -> None:
        self.dataset = dataset
        self.epoch = epoch

    def __getitem__(self, position: int) -> Sample | UserError:
        # As in a worker: to resample sums over samples, and sums are split by the number of threads.
        with one_thread():
            try:
                return self.dataset.sample(position, self.epoch)
            except UserError as error:
                return error


@dataclass(frozen=True)
class _Message:
    """A batch on its way from a worker.

    Each tensor is fetched from the worker by a request of its own, which it answers when it comes to it. So the
    features alone lie in shared memory, and the rest is in the message itself.
    """

    ids: list[str]
    texts: list[str]
    features: Tensor
    numbers: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, batch: Batch) -> Self:
        share(batch.features)
        numbers = (batch.feature_lengths.numpy(), batch.tokens.numpy(), batch.token_lengths.numpy())
        return cls(batch.ids, batch.texts, batch.features, numbers)

    def batch(self) -> Batch:
        return Batch(self.ids, self.texts, self.features, *map(torch.from_numpy, self.numbers))


def _collated(samples: list[Sample | UserError]) -> Batch | _Message | UserError:
    mistake = next((sample for sample in samples if isinstance(sample, UserError)), None)
    if mistake is not None:
        return mistake
    batch = collate([sample for sample in samples if isinstance(sample, Sample)])
    if get_worker_info() is None:
        return batch
    try:
        return _Message.of(batch)
    except UserError as error:
        return error


class AudioDataLoader:
    """Padded batches of an :class:`AudioDataset`, in the order of a :class:`BatchPlan`.

    Args:
        dataset: what to load.
        frames_per_batch: bound on the padded size of a batch, in frames.
        seed: key of the order; None orders by length, the same in every epoch (evaluation).
        workers: processes that load ahead; the batches do not depend on it. 0 loads in this process.
        sorta_grad: whether the first epoch goes from short utterances to long ones.
        curriculum_epochs: epochs at the beginning that see only the shortest utterances, more from one to the next.
        rank: which of the processes that train together this is, from 0 on.
        ranks: how many these are. The order of the batches does not depend on it.

    Raises:
        UserError: there is no such rank, or ``frames_per_batch`` is below 1.
    """

    def __init__(
        self,
        dataset: AudioDataset,
        *,
        frames_per_batch: int,
        seed: int | None = None,
        workers: int = 0,
        sorta_grad: bool = False,
        curriculum_epochs: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if not 0 <= rank < ranks:
            raise UserError(f"rank is {rank} of {ranks} ranks, expected at least 0 and less than their number")
        self.dataset = dataset
        self.workers = workers
        self.rank = rank
        self.ranks = ranks
        self.plan = BatchPlan(
            dataset.frames, frames_per_batch, seed, sorta_grad=sorta_grad, curriculum_epochs=curriculum_epochs
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the dataset."""
        return self.dataset.tokenizer

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of all that the batches depend on; the numbers of workers and ranks are none of it."""
        return hashlib.sha256(f"{self.dataset.digest} {self.plan.digest}".encode()).hexdigest()

    def batches_in(self, epoch: int) -> int:
        """Return the number of batches of ``epoch``, of all ranks together."""
        return len(self._plan_of(epoch).batches(epoch))

    def padding_in(self, epoch: int) -> float:
        """Return the share of frames in the batches of ``epoch``, of all ranks together, that are padding."""
        return self._plan_of(epoch).padding(epoch)

    def require_all_batches(self) -> None:
        """Refuse to be a part of the batches where all of them are wanted.

        Raises:
            UserError: there are several ranks.
        """
        if self.ranks > 1:
            raise UserError(
                f"the loader gives rank {self.rank} of {self.ranks} its part of the batches, where one process goes "
                "through all of them; make it without rank and ranks"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from number ``start`` on; of several ranks, each yields every so many.

        All ranks yield equally many. Where the last step has no batch left for a rank, it yields one of no utterances,
        ``len(batch) == 0``, so that no rank waits for another and no utterance is left out or comes twice.

        Args:
            epoch: number of the epoch.
            start: batches of it that all ranks together are done with, however many these were.

        Raises:
            UserError: an utterance of the next batch cannot be read, the same whichever process would read it; or the
                workers lack shared memory or files.
        """
        left = self._plan_of(epoch).batches(epoch)[start:]
        mine = left[self.rank :: self.ranks]
        loader = DataLoader(
            _Epoch(self.dataset, epoch),
            batch_sampler=mine,
            collate_fn=_collated,
            num_workers=self.workers,
            worker_init_fn=leave_signals_to_main,
            # A generator of its own: the DataLoader would otherwise draw a seed from torch's global one.
            generator=torch.Generator(),
        )
        # A worker that has just been forked could be hit before it has said what it does with signals.
        with signals_held_back():
            batches = iter(loader)
        try:
            with open_files_explained(self.workers):
                for batch in one_ahead(batches) if self.workers else batches:
                    if isinstance(batch, UserError):
                        raise batch
                    yield batch.batch() if isinstance(batch, _Message) else batch
        finally:
            # The workers end with it, which the traceback of an error would keep.
            del batches
        if len(mine) * self.ranks < len(left):
            yield _no_utterances(self.dataset.processor.size)

    def _plan_of(self, epoch: int) -> BatchPlan:
        frames = self.dataset.frames_in(epoch)
        return self.plan if frames is self.dataset.frames else self.plan.with_frames(frames)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)
