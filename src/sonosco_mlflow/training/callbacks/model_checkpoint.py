"""When the state is saved, and which checkpoints are kept.

There are two kinds of saves. *Scheduled* ones follow from the state alone (every so many steps or epochs, a validation
that ranks), and a checkpoint's own state already counts it: a run that continues from it keeps and removes the
same directories as one that was never stopped. *Extra* ones come when they come (the start, so many minutes, a signal,
an error, an end that is on no schedule); no state counts them, and they go when newer checkpoints stand, at the latest
when training ends.

The training thread only copies the state; another one writes, verifies, removes, and hands on.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sonosco_mlflow.background import Background
from sonosco_mlflow.errors import UserError, require_positive
from sonosco_mlflow.serialization.checkpoint import (
    BrokenCheckpointError,
    Snapshot,
    checkpoint_name,
    checkpoints_in,
    quarantine,
    read_checkpoint,
    remove_leftovers,
    verify_checkpoint,
    write_checkpoint,
)
from sonosco_mlflow.serialization.durable import remove_directory
from sonosco_mlflow.serialization.serializer import Serializer
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.monitor import monitored
from sonosco_mlflow.training.callbacks.retention import Retention
from sonosco_mlflow.training.interruption import LeaveAtOnce

if TYPE_CHECKING:
    from torch import Tensor

    from sonosco_mlflow.training.trainer import ModelTrainer
    from sonosco_mlflow.training.validation import Validation

# Below the folder of checkpoints, for states that lack what a failed callback missed: nothing continues from them.
FAILED = "failed"


class ModelCheckpoint(Callback):
    """Saves the trainer: at the end of epochs, when training stops, when a validation ranks, and as asked.

    Kept are the last ``keep_last`` scheduled checkpoints, the best ``keep_best``, and every ``keep_every_steps``-th
    step; another is removed only after the newer one has been read back and verified. It comes last among the
    callbacks, so that what it saves is what they decided.

    Args:
        directory: folder of this run's checkpoints; None leaves it to an Experiment. It is no part of what is
            serialised: equal runs in different places have equal checkpoints.
        every_steps: save also every so many optimizer steps.
        every_minutes: save also at the first step after so many minutes.
        every_epochs: save at the end of every so many epochs; None does not.
        keep_last: at least 2, so that a broken newest one costs little.
        keep_best: checkpoints of the lowest ``monitor``.
        keep_every_steps: keep for good each checkpoint whose step is a multiple of this.
        monitor: a metric of the validation.

    Attributes:
        serializer: writes the trainer's objects.
        background: writes and delivers; None makes one for each training.
        before_writing: called before a checkpoint is written, for what must be on the disk before it.
        fetch: brings the checkpoint of a name that is kept, and is not in ``directory``, into a folder.
        listeners: called with the directory of each checkpoint once it is verified, and the names of all that are kept.
        digests: written into each checkpoint's manifest, of what the state belongs to.
        stall_seconds: for how long saving has held up the training so far.

    Raises:
        UserError: ``keep_last`` is below 2, or a period is not above 0.
    """

    unwritten_parameters: ClassVar = frozenset({"directory"})

    def __init__(
        self,
        directory: str | Path | None = None,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        every_epochs: int | None = 1,
        keep_last: int = 2,
        keep_best: int = 1,
        keep_every_steps: int | None = None,
        monitor: str = "val_loss",
    ) -> None:
        if keep_last < 2:
            raise UserError(f"keep_last is {keep_last}, expected at least 2: the newest checkpoint may be broken")
        periods = {"every_steps": every_steps, "every_minutes": every_minutes, "every_epochs": every_epochs}
        require_positive(type(self).__name__, **periods, keep_every_steps=keep_every_steps)
        self.directory = None if directory is None else Path(directory)
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.every_epochs = every_epochs
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_every_steps = keep_every_steps
        self.monitor = monitor
        self.serializer = Serializer()
        self.background: Background | None = None
        self.before_writing: list[Callable[[], None]] = []
        self.fetch: Callable[[str, Path], Path] | None = None
        self.listeners: list[Callable[[Path, frozenset[str]], None]] = []
        self.digests: dict[str, str] = {}
        self.stall_seconds = 0.0
        self._own_background: Background | None = None
        self._retention = Retention(keep_last, keep_best, keep_every_steps)
        self._saved_at = time.monotonic()
        self._saved_micro_step: int | None = None

    def serialized_parameters(self) -> dict[str, object]:
        """Return the constructor's parameters without the directory."""
        names = (
            "every_steps",
            "every_minutes",
            "every_epochs",
            "keep_last",
            "keep_best",
            "keep_every_steps",
            "monitor",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def kept(self) -> frozenset[str]:
        """Names of the scheduled checkpoints that are kept."""
        return frozenset(map(checkpoint_name, self._retention.steps))

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Finish what a crash left undone, start the clock, and save the state before the first step.

        Raises:
            UserError: this is not the trainer's last callback, or the trainer cannot be written down.
        """
        if not trainer.callbacks or trainer.callbacks[-1] is not self:
            raise UserError(
                "ModelCheckpoint must be the last of the trainer's callbacks, or it would save a state that the others "
                "are still changing; put it at the end of callbacks=[...]"
            )
        if self.directory is None:
            warnings.warn(
                "nothing is saved: ModelCheckpoint has no directory; set it, or train in an Experiment", stacklevel=2
            )
            return
        # Refused now rather than at the first checkpoint, hours later.
        self.serializer.describe(trainer)
        if "model" in trainer.external_parameters:
            warnings.warn(
                f"the parameters of {type(trainer.model).__name__} are not known: checkpoints keep its state, but "
                "deserialize needs the model itself as model=...; @serializable on its class makes it known",
                stacklevel=2,
            )
        remove_leftovers(self.directory)
        if trainer.progress.micro_step == 0:
            self._put_aside_others(self.directory)
        if self.background is None:
            self.background = self._own_background = Background()
        self._saved_at = time.monotonic()
        if trainer.progress.micro_step == 0:
            self._save(trainer)

    @staticmethod
    def _put_aside_others(directory: Path) -> None:
        others = [path for path in checkpoints_in(directory) if path.name != checkpoint_name(0)]
        for path in others:
            quarantine(path)
        if others:
            warnings.warn(
                f"{directory} held {len(others)} checkpoints of another training; they are put aside as broken-*. Give "
                "each training a folder of its own, or continue the one that stands there",
                stacklevel=3,
            )

    def on_validation_end(self, trainer: "ModelTrainer", validation: "Validation") -> None:
        """Note what the current step is worth."""
        self._retention.rate(trainer.progress.step, monitored(validation, self.monitor))

    def on_safe_point(self, trainer: "ModelTrainer") -> None:
        """Save if it is time to; on schedule between two optimizer steps only, so that a step is saved once.

        Raises:
            Exception: what went wrong beside the training since the last step; of a ``background`` that was given,
                whoever gave it asks.
        """
        if self.background is None:
            return
        if self._own_background is not None:
            self._own_background.check()
        if trainer.failure is not None:
            # A callback before this one has missed something.
            return
        if self._is_scheduled(trainer):
            # Also where it was saved a moment ago: callbacks between that one and this may have moved since.
            self._saved_micro_step = None
            self._save(trainer)
        elif self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes:
            self._save(trainer)

    def on_train_end(self, trainer: "ModelTrainer") -> None:
        """Return when all is written, and only what is to be kept still stands."""
        if self.background is None:
            return
        if not self._is_scheduled(trainer):
            self._save(trainer)
        self.background.write(partial(self._tidy, self._path(trainer), self.kept))
        self.background.finish_writes()
        self._close_own_background()

    def on_exception(self, trainer: "ModelTrainer", error: BaseException) -> None:
        """Save what there is, if it is consistent, and return when it is written.

        A state that lacks what a failed callback missed is kept apart, in ``failed/``.
        """
        if self.background is None or self.directory is None or isinstance(error, LeaveAtOnce):
            return
        try:
            if trainer.at_safe_point and not self.background.cannot_write:
                if trainer.failure is None:
                    self._save(trainer)
                else:
                    self.background.write(partial(write_checkpoint, self.directory / FAILED, self._snapshot(trainer)))
                self.background.finish_writes()
        finally:
            self._close_own_background()

    def save(self, trainer: "ModelTrainer") -> Path:
        """Save now, whatever the schedule, and return the checkpoint's directory once it is whole.

        Raises:
            UserError: there is no directory to save into, or the trainer is in the middle of a micro-step, of which a
                part of the state knows and a part does not: ``on_safe_point`` is where a callback may save.
            BrokenCheckpointError: what was read back is not what was written; nothing older was removed.
        """
        self._saved_micro_step = None
        return self.saved(trainer)

    def saved(self, trainer: "ModelTrainer") -> Path:
        """Return the checkpoint's directory as :meth:`save` does, and save only what is not saved yet."""
        if not trainer.is_whole:
            raise UserError(
                "the trainer is in the middle of a step, of which its state knows only a part; have the callback save "
                "in on_safe_point"
            )
        path = self._path(trainer)
        is_training = self.background is not None
        if self.background is None:
            self.background = self._own_background = Background()
        try:
            self._save(trainer)
            self.background.finish_writes()
        finally:
            if not is_training:
                self._close_own_background()
        return path

    def last_steps(self, count: int) -> list[int]:
        """Return the steps of the last ``count`` scheduled checkpoints that are kept."""
        return self._retention.steps[-count:]

    def best_steps(self, count: int) -> list[int]:
        """Return the steps of the best ``count`` scheduled checkpoints that are kept, the best first."""
        return self._retention.best_steps(count)

    def model_state(self, step: int) -> "Mapping[str, Tensor]":
        """Return the model's state in the checkpoint of ``step``, one that is kept.

        Raises:
            UserError: it is neither in ``directory`` nor to be fetched, or it is broken.
        """
        if self.background is not None:
            self.background.finish_writes()
        name = checkpoint_name(step)
        if self.directory is not None and (self.directory / name).exists():
            try:
                return _model_in(self.directory / name)
            except BrokenCheckpointError as error:
                if self.fetch is None:
                    raise
                warnings.warn(f"a checkpoint to be averaged is broken here, and is fetched: {error}", stacklevel=2)
        if self.fetch is None:
            raise UserError(f"{self.directory}: holds no {name}, which is to be averaged; put it back")
        with tempfile.TemporaryDirectory() as scratch:
            return _model_in(self.fetch(name, Path(scratch)))

    def state_dict(self) -> dict[str, object]:
        """Return which scheduled steps are kept, and what they are worth."""
        return self._retention.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        self._retention.load_state_dict(state)
        self._saved_micro_step = None

    # ------------------------------------------------------------------ on the training thread

    def _path(self, trainer: "ModelTrainer") -> Path:
        if self.directory is None:
            raise UserError("ModelCheckpoint has no directory to save into; set it, or train in an Experiment")
        return self.directory / checkpoint_name(trainer.progress.step, trainer.batches_into_step)

    def _is_scheduled(self, trainer: "ModelTrainer") -> bool:
        progress = trainer.progress
        if progress.micro_step == 0 or trainer.batches_into_step:
            return False
        return (
            (self.every_epochs is not None and progress.batch == 0 and progress.epoch % self.every_epochs == 0)
            or (self.every_steps is not None and progress.step % self.every_steps == 0)
            or self._retention.is_among_best(progress.step)
        )

    def _snapshot(self, trainer: "ModelTrainer") -> Snapshot:
        step, batches = trainer.progress.step, trainer.batches_into_step
        before = [kept for kept in self._retention.steps if (kept, 0) < (step, batches)]
        parent = checkpoint_name(before[-1]) if before else None
        return self.serializer.snapshot(trainer, step, batches=batches, parent=parent, digests=self.digests)

    def _save(self, trainer: "ModelTrainer") -> None:
        assert self.background is not None
        if self._saved_micro_step == trainer.progress.micro_step:
            return
        started = time.perf_counter()
        if self._is_scheduled(trainer):
            # Whoever asks for it: what continues from this state must know of it as one that was never stopped does.
            self._retention.add(trainer.progress.step)
        self.background.write(partial(self._write, self._snapshot(trainer), self.kept, trainer.finished))
        self._saved_micro_step = trainer.progress.micro_step
        self._saved_at = time.monotonic()
        self.stall_seconds += time.perf_counter() - started

    def _close_own_background(self) -> None:
        if self._own_background is not None:
            try:
                self._own_background.finish()
            finally:
                self._own_background.close()
                self.background = self._own_background = None

    # ------------------------------------------------------------------ beside it

    def _write(self, snapshot: Snapshot, kept: frozenset[str], finished: bool) -> None:
        assert self.directory is not None
        assert self.background is not None
        for prepare in self.before_writing:
            prepare()
        path = write_checkpoint(self.directory, snapshot)
        verify_checkpoint(path)
        kept |= {path.name}
        if not finished:
            kept |= {other.name for other in checkpoints_in(self.directory)[-self.keep_last :]}
        self._remove_others(kept)
        self._tell(path, kept)

    def _tidy(self, newest: Path, kept: frozenset[str]) -> None:
        kept |= {newest.name}
        if self._remove_others(kept) and newest.exists():
            self._tell(newest, kept)

    def _remove_others(self, kept: frozenset[str]) -> bool:
        assert self.directory is not None
        others = [path for path in checkpoints_in(self.directory) if path.name not in kept]
        for path in others:
            remove_directory(path)
        return bool(others)

    def _tell(self, path: Path, kept: frozenset[str]) -> None:
        assert self.background is not None
        for listener in self.listeners:
            self.background.deliver(partial(listener, path, kept))


def _model_in(path: Path) -> "Mapping[str, Tensor]":
    state: dict[str, Tensor] = read_checkpoint(path).state["model"]
    return state
