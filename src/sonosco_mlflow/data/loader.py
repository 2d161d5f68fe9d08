"""Batches of an epoch, from any position on, by any number of workers.

The cursor is an argument: ``loader.epoch(3, start=120)`` begins at batch 120 of epoch 3 without touching the 120
before it. What a worker prefetched is nobody's state; the consumer counts what it consumed.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sonosco_mlflow.data.batching import BatchPlan
from sonosco_mlflow.data.dataset import AudioDataset, Sample
from sonosco_mlflow.determinism import one_thread
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import SpecialToken, Tokenizer


@dataclass(frozen=True)
class Batch:
    """Utterances padded to a common length.

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


def _collated(samples: list[Sample | UserError]) -> Batch | UserError:
    mistake = next((sample for sample in samples if isinstance(sample, UserError)), None)
    return mistake or collate([sample for sample in samples if isinstance(sample, Sample)])


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_BETWEEN_LOOKS = 2.0


def _leave_signals_to_main(worker: int) -> None:
    """Let a worker go on when the whole process group is told to stop: the main process finishes its step first.

    To torch a worker that a signal ends is an error, which it raises in the middle of a step. The main process alone
    may end a worker by SIGTERM, as torch does with those that hang. Torch's workers look whether their parent still is
    the one that they began with, and so never miss one that was killed before they had begun: here they end too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    main = multiprocessing.parent_process()
    assert main is not None
    threading.Thread(target=_end_with, args=[main.pid], daemon=True).start()


def _end_with(main: int) -> None:
    told = None
    while os.getppid() == main and (told is None or told.si_pid != main):
        told = signal.sigtimedwait([signal.SIGTERM], _SECONDS_BETWEEN_LOOKS)
    os._exit(0)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Deliver signals after the block; processes that are forked in it inherit that they wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class AudioDataLoader:
    """Padded batches of an :class:`AudioDataset`, in the order of a :class:`BatchPlan`.

    Args:
        dataset: what to load.
        frames_per_batch: bound on the padded size of a batch, in frames.
        seed: key of the order; None orders by length, the same in every epoch (evaluation).
        workers: processes that load ahead; the batches do not depend on it. 0 loads in this process.
        sorta_grad: whether the first epoch goes from short utterances to long ones.
    """

    def __init__(
        self,
        dataset: AudioDataset,
        *,
        frames_per_batch: int,
        seed: int | None = None,
        workers: int = 0,
        sorta_grad: bool = False,
    ) -> None:
        self.dataset = dataset
        self.workers = workers
        self.plan = BatchPlan(dataset.frames, frames_per_batch, seed, sorta_grad=sorta_grad)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the dataset."""
        return self.dataset.tokenizer

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of all that the batches depend on; the number of workers is none of it."""
        return hashlib.sha256(f"{self.dataset.digest} {self.plan.digest}".encode()).hexdigest()

    def batches_in(self, epoch: int) -> int:
        """Return the number of batches of ``epoch``."""
        return len(self._batches(epoch))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from number ``start`` on.

        Raises:
            UserError: an utterance of the next batch cannot be read; the same, whichever process would read it.
        """
        loader = DataLoader(
            _Epoch(self.dataset, epoch),
            batch_sampler=self._batches(epoch)[start:],
            collate_fn=_collated,
            num_workers=self.workers,
            worker_init_fn=_leave_signals_to_main,
            # A generator of its own: the DataLoader would otherwise draw a seed from torch's global one.
            generator=torch.Generator(),
        )
        # A worker that has just been forked could be hit before it has said what it does with signals.
        with _signals_held_back():
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _batches(self, epoch: int) -> list[list[int]]:
        frames = self.dataset.frames_in(epoch)
        plan = self.plan if frames is self.dataset.frames else self.plan.with_frames(frames)
        return plan.batches(epoch)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)
