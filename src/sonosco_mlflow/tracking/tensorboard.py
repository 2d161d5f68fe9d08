"""TensorBoard: recorded metrics and texts as event files."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch.utils.tensorboard import SummaryWriter

from sonosco_mlflow.training.callbacks.base import Callback

if TYPE_CHECKING:
    from sonosco_mlflow.tracking.journal import Row
    from sonosco_mlflow.training.trainer import ModelTrainer


class TensorBoard(Callback):
    """Writes every recorded metric and text for ``tensorboard --logdir``.

    Args:
        directory: folder of one run; each run wants its own. It is no part of what is serialised: one that is built
            again has None, and writes nothing until it is set.
    """

    unwritten_parameters: ClassVar = frozenset({"directory"})

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = None if directory is None else Path(directory)
        self._writer: SummaryWriter | None = None

    def serialized_parameters(self) -> dict[str, object]:
        """Return the constructor's parameters without the directory."""
        return {}

    def rewrite(self, rows: Iterable["Row"]) -> None:
        """Put ``rows`` in the place of all events so far: what a resume makes again must not be shown twice."""
        assert self.directory is not None
        self.close()
        for path in sorted(self.directory.glob("events.out.tfevents.*")):
            path.unlink()
        for row in rows:
            for name, value in row.metrics.items():
                self._open(0).add_scalar(name, value, row.step, walltime=row.timestamp / 1000)
            for name, text in row.texts.items():
                self._open(0).add_text(name, text, row.step, walltime=row.timestamp / 1000)

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Say so where nothing will be written."""
        if self.directory is None:
            warnings.warn("no events are written: TensorBoard has no directory; set it", stacklevel=2)

    def on_metrics(self, trainer: "ModelTrainer", metrics: Mapping[str, float]) -> None:
        """Write scalars at the current optimizer step."""
        if self.directory is None:
            return
        for name, value in metrics.items():
            self._open(trainer.progress.step).add_scalar(name, value, trainer.progress.step)

    def on_text(self, trainer: "ModelTrainer", name: str, text: str) -> None:
        """Write a Markdown text at the current optimizer step."""
        if self.directory is not None:
            self._open(trainer.progress.step).add_text(name, text, trainer.progress.step)

    def on_safe_point(self, trainer: "ModelTrainer") -> None:
        """Put on the disk, once an epoch, what the writer still holds."""
        if self._writer is not None and trainer.progress.batch == 0:
            self._writer.flush()

    def on_train_end(self, trainer: "ModelTrainer") -> None:
        """Close the event file."""
        self.close()

    def close(self) -> None:
        """Close the event file; a later event opens another beside it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, step: int) -> SummaryWriter:
        # Opened by the first event, so that a trainer that never trains leaves no file. Older files may hold events of
        # steps that are now made again: readers drop those from `purge_step` on.
        if self._writer is None:
            self._writer = SummaryWriter(str(self.directory), purge_step=step or None)
        return self._writer
