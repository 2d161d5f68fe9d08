"""Where training stands, for whoever watches: a bar in a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.epoch_time import EpochTimeEstimate

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer
    from sonosco_mlflow.training.validation import Validation

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.2


def duration_text(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds.

    >>> duration_text(3723.4)
    '1:02:03'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class ProgressBar(Callback):
    """Shows epoch, step, loss, utterances per second and time left, and the metrics of each validation.

    It draws from no thread of its own, so that loader processes can be forked beside it, and it never ends a training:
    where its output has gone (a closed pipe), it falls silent.
    """

    def __init__(self) -> None:
        self._estimate = EpochTimeEstimate()
        self._console = Console()
        self._bar: Progress | None = None
        self._shown_at = 0.0
        self._batches = 0
        self._metrics: dict[str, float] = {}

    def on_train_begin(self, trainer: "ModelTrainer") -> None:
        """Put up the bar if there is a terminal."""
        self._estimate.on_train_begin(trainer)
        self._shown_at = 0.0
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                console=self._console,
                auto_refresh=False,
                transient=True,
            )
            self._bar.add_task("")
            self._bar.start()

    def on_epoch_begin(self, trainer: "ModelTrainer") -> None:
        """Count the batches of this epoch."""
        self._estimate.on_epoch_begin(trainer)
        assert trainer.train_loader is not None
        self._batches = trainer.train_loader.batches_in(trainer.progress.epoch)

    def on_metrics(self, trainer: "ModelTrainer", metrics: Mapping[str, float]) -> None:
        """Remember the newest values."""
        self._metrics.update(metrics)

    def on_validation_end(self, trainer: "ModelTrainer", validation: "Validation") -> None:
        """Write the validation's metrics on a line of their own."""
        values = ", ".join(f"{name} {value:.4f}" for name, value in validation.metrics.items())
        self._write(f"step {trainer.progress.step}: {values}")

    def on_safe_point(self, trainer: "ModelTrainer") -> None:
        """Show where training stands, if the last time was long enough ago."""
        pause = SECONDS_BETWEEN_LINES if self._bar is None else SECONDS_BETWEEN_FRAMES
        if time.monotonic() - self._shown_at < pause or "train_loss" not in self._metrics:
            return
        self._shown_at = time.monotonic()
        if self._bar is None:
            self._write(self._line(trainer))
        else:
            self._bar.update(self._bar.task_ids[0], description=self._line(trainer), total=self._batches)
            self._bar.update(self._bar.task_ids[0], completed=trainer.progress.batch, refresh=True)

    def on_train_end(self, trainer: "ModelTrainer") -> None:
        """Write the last line and take the bar down."""
        if "train_loss" in self._metrics:
            self._write(self._line(trainer))
        self._take_down()

    def on_exception(self, trainer: "ModelTrainer", error: BaseException) -> None:
        """Take the bar down, so that the error is readable and the terminal as it was."""
        self._take_down()

    def _line(self, trainer: "ModelTrainer") -> str:
        progress = trainer.progress
        parts = [
            f"epoch {min(progress.epoch + 1, trainer.epochs)}/{trainer.epochs}",
            f"step {progress.step}",
            f"loss {self._metrics['train_loss']:.4f}",
            f"{self._metrics['utterances_per_second']:.1f} utterances/s",
        ]
        left = self._estimate.seconds_left(trainer)
        return "  ".join([*parts, f"{duration_text(left)} left"] if left is not None else parts)

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
            return
        try:
            # print, not rich: rich wraps at the width of a terminal that is not there.
            print(line, file=self._console.file, flush=True)
        except (OSError, ValueError):
            # A pipe or file that was closed.
            return

    def _take_down(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
