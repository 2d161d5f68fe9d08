"""What a run writes down while it trains, and its way into MLflow.

Everything is on this machine's disk first, the journal before the checkpoint that counts its rows. What was written is
then delivered beside the training: rows, the journal, a checkpoint's files, its manifest, the tag that names it.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sonosco_mlflow.background import Background
from sonosco_mlflow.serialization.checkpoint import CHECKPOINTS, checkpoints_in
from sonosco_mlflow.tracking.checkpoints import upload_checkpoint
from sonosco_mlflow.tracking.journal import JOURNAL, RESUME_METRICS, Journal, Row
from sonosco_mlflow.tracking.lease import Lease
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.resumption import Resumption
from sonosco_mlflow.tracking.segments import Segment
from sonosco_mlflow.tracking.store import is_away
from sonosco_mlflow.tracking.tensorboard import TensorBoard
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.model_checkpoint import ModelCheckpoint

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer


class Recording(Callback, is_part_of_trainer=False):
    """The journal, TensorBoard and checkpoints of one run, kept on the disk and delivered to MLflow.

    Args:
        run: where it is delivered to.
        lease: this process's right to write to it.
        folder: the run's own files.
    """

    def __init__(self, run: TrackedRun, lease: Lease, folder: Path) -> None:
        self.run = run
        self.lease = lease
        self.folder = folder
        self.background = Background(is_away)
        self.journal = Journal(folder / JOURNAL, self._deliver_rows, self.background.deliver)
        self.board: TensorBoard | None = None

    def attach(self, trainer: "ModelTrainer", checkpoint: ModelCheckpoint | None, *, tensorboard: bool) -> None:
        """Record what ``trainer`` does, and keep what ``checkpoint`` saves."""
        trainer.attach(self)
        trainer.attach(self.journal)
        if tensorboard:
            self.board = TensorBoard(self.folder / "tensorboard")
            trainer.attach(self.board)
        if checkpoint is not None:
            checkpoint.directory = self.folder / CHECKPOINTS
            checkpoint.background = self.background
            checkpoint.before_writing.append(self.journal.sync)
            checkpoint.listeners.append(self._deliver_checkpoint)

    def resume(self, resumption: Resumption, segment: Segment, micro_step: int, kept: frozenset[str]) -> None:
        """Take back what was recorded after the checkpoint, and deliver what MLflow lacks of the rest.

        Args:
            resumption: the run that goes on.
            segment: what this process is of it.
            micro_step: batches trained on at the checkpoint.
            kept: names of the checkpoints that the state keeps.
        """
        with tempfile.TemporaryDirectory() as scratch:
            rows = resumption.rows(Path(scratch)) if micro_step else []
        rows = self.journal.resume(rows, micro_step, resumption.records, differs_until=segment.differs_until)
        if self.board is not None:
            self.board.rewrite(rows)
        self.background.deliver(self.journal.flush)
        standing = checkpoints_in(self.folder / CHECKPOINTS)
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

    def close(self) -> None:
        """Close the files and deliver what is written at the end: the whole journal, TensorBoard's events."""
        self.background.close()
        self.journal.close()
        if self.board is not None:
            self.board.close()
            self.run.replace_folder(self.board.directory, "tensorboard")
        self._deliver_journal()
        if self.run.segment > 1:
            counts = {"verified_steps": self.journal.verified_steps, "differing_steps": self.journal.differing_steps}
            metrics = {f"{RESUME_METRICS}{name}": float(len(steps)) for name, steps in counts.items()}
            self.run.log_metrics(metrics, step=self.run.segment)

    def abandon(self) -> None:
        """Close the files, and deliver nothing: the run belongs to another process."""
        self.background.close()
        self.journal.close()
        if self.board is not None:
            self.board.close()

    def _deliver_rows(self, rows: list[Row]) -> None:
        self.lease.confirm()
        self.run.log_rows(rows)

    def _deliver_checkpoint(self, directory: Path, kept: frozenset[str], verify: bool = False) -> None:
        self.lease.confirm()
        self.journal.flush()
        self._deliver_journal()
        upload_checkpoint(self.run, directory, kept, verify=verify)

    def _deliver_journal(self) -> None:
        if self.journal.path.exists():
            # As it is now: a file that grows on its way is more than its announced length, which confuses a server.
            self.run.log_bytes(self.journal.path.read_bytes(), JOURNAL)
