"""What a run writes down while it trains, and its way into MLflow.

Everything is on this machine's disk first, the journal before the checkpoint that counts its rows. What was written is
then delivered beside the training: rows, the journal, a checkpoint's files, its manifest, the tag that names it.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from sonosco_mlflow.background import Background
from sonosco_mlflow.serialization.checkpoint import CHECKPOINTS, position_of
from sonosco_mlflow.tracking.checkpoints import put_aside_others, upload_checkpoint
from sonosco_mlflow.tracking.journal import JOURNAL, RESUME_METRICS, Journal, Records, Row, now_ms
from sonosco_mlflow.tracking.lease import Lease
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.segments import Segment
from sonosco_mlflow.tracking.store import is_away
from sonosco_mlflow.tracking.tensorboard import TensorBoard
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.model_checkpoint import ModelCheckpoint

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer

CheckpointFollower = Callable[[str, bytes, frozenset[str], list[Row]], None]
"""Takes the name and the manifest of a checkpoint that is delivered, the names of all kept, the rows of its step."""


class Recording(Callback, is_part_of_trainer=False):
    """The journal, TensorBoard and checkpoints of one run, kept on the disk and delivered to MLflow.

    Args:
        run: where it is delivered to.
        lease: this process's right to write to it.
        folder: the run's own files.
        is_current: whether its files are the run's, as those of a new run are; else :meth:`resume` makes them so.
    """

    def __init__(self, run: TrackedRun, lease: Lease, folder: Path, *, is_current: bool = True) -> None:
        self.run = run
        self.lease = lease
        self.folder = folder
        self.background = Background(is_away)
        self.journal = Journal(folder / JOURNAL, self._deliver_rows, self.background.deliver)
        self.board: TensorBoard | None = None
        self._follow: CheckpointFollower | None = None
        self._is_current = is_current
        self._detach = ExitStack()

    def attach(
        self,
        trainer: "ModelTrainer",
        checkpoint: ModelCheckpoint | None,
        *,
        tensorboard: bool,
        follow: CheckpointFollower | None = None,
    ) -> None:
        """Record what ``trainer`` does, and keep what ``checkpoint`` saves; ``follow`` hears of what MLflow has."""
        self._follow = follow
        observers: list[Callback] = [self, self.journal]
        if tensorboard:
            self.board = TensorBoard(self.folder / "tensorboard")
            observers.append(self.board)
        for observer in observers:
            trainer.attach(observer)
            self._detach.callback(trainer.observers.remove, observer)
        if checkpoint is not None:
            self._detach.callback(setattr, checkpoint, "directory", checkpoint.directory)
            checkpoint.directory = self.folder / CHECKPOINTS
            checkpoint.background = self.background
            self._detach.callback(setattr, checkpoint, "background", None)
            checkpoint.before_writing.append(self.journal.sync)
            self._detach.callback(checkpoint.before_writing.remove, self.journal.sync)
            checkpoint.listeners.append(self._deliver_checkpoint)
            self._detach.callback(checkpoint.listeners.remove, self._deliver_checkpoint)

    def resume(
        self, rows: list[Row], records: Records, segment: Segment, micro_step: int, kept: frozenset[str]
    ) -> None:
        """Take back what was recorded after the checkpoint, and deliver what MLflow lacks of the rest.

        Args:
            rows: the journal of the run that goes on.
            records: what MLflow has of it.
            segment: what this process is of it.
            micro_step: batches trained on at the checkpoint.
            kept: names of the checkpoints that the state keeps.
        """
        rows = self.journal.resume(rows, micro_step, records, differs_until=segment.differs_until)
        if self.board is not None:
            self.board.rewrite(rows)
        self._is_current = True
        self.background.deliver(self.journal.flush)
        standing = put_aside_others(segment, self.folder / CHECKPOINTS)
        names = kept | {path.name for path in standing}
        for path in standing:
            self.background.deliver(partial(self._deliver_checkpoint, path, names, verify=True))

    def on_safe_point(self, trainer: "ModelTrainer") -> None:
        """Raise what went wrong beside the training, and stop where another process has taken the run over."""
        self.background.check()
        self.lease.check()

    def finish(self, patience: float) -> None:
        """Return when everything is delivered.

        Raises:
            UserError: the tracking server stayed away for ``patience`` seconds.
            Exception: what went wrong beside the training.
        """
        self.background.deliver(self.journal.flush)
        self.background.finish(patience)

    def stop(self) -> None:
        """Let go of the trainer, and begin nothing more of what waits to be delivered."""
        self._detach.close()
        self.background.close()

    def close(self) -> None:
        """Stop, wait for what was begun, and close the files."""
        self.stop()
        self.background.join()
        self.journal.close()
        if self.board is not None:
            self.board.close()

    def deliver_end(self) -> None:
        """Deliver what is written at the end: the whole journal, TensorBoard's events. It can be repeated."""
        if not self._is_current:
            return
        if self.board is not None and self.board.directory is not None:
            self.run.replace_folder(self.board.directory, "tensorboard")
        self._deliver_journal()
        if self.run.segment > 1:
            self.run.log_rows([self._counts])

    @cached_property
    def _counts(self) -> Row:
        """How many steps were made again, as a row; made once, so that sending it again changes nothing."""
        counts = {"verified_steps": self.journal.verified_steps, "differing_steps": self.journal.differing_steps}
        metrics = {f"{RESUME_METRICS}{name}": float(len(steps)) for name, steps in counts.items()}
        return Row(0, self.run.segment, now_ms(), metrics)

    def _deliver_rows(self, rows: list[Row]) -> None:
        self.lease.confirm()
        self.run.log_rows(rows)

    def _deliver_checkpoint(self, directory: Path, kept: frozenset[str], verify: bool = False) -> None:
        self.lease.confirm()
        self._deliver_journal()
        manifest = upload_checkpoint(self.run, directory, kept, self.lease.confirm, verify=verify)
        if manifest is not None and self._follow is not None:
            step, _ = position_of(directory.name) or (0, 0)
            self._follow(directory.name, manifest, kept, self.journal.rows_at(step))

    def _deliver_journal(self) -> None:
        # As it was at one moment: a file that grows on its way is more than its announced length, which confuses a
        # server. Read first: no row is in the journal that is not in MLflow.
        content = self.journal.content()
        self.journal.flush()
        if content:
            self.run.log_bytes(content, JOURNAL)
