"""The journal: one line for every recording of metrics, in the order in which they were made.

It is the run's own record. MLflow is fed from it in batches, and a row keeps the time of its first writing, so that
sending it again changes nothing.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sonosco_mlflow.serialization.state import encode_float
from sonosco_mlflow.training.callbacks.base import Callback

if TYPE_CHECKING:
    from sonosco_mlflow.training.trainer import ModelTrainer

# A store's batch costs as much as one row does: rows are sent together, and still soon enough to watch.
SECONDS_BETWEEN_BATCHES = 2.0


@dataclass(frozen=True)
class Row:
    """Metrics recorded together at one optimizer step; ``timestamp`` in milliseconds since 1970."""

    step: int
    timestamp: int
    metrics: dict[str, float]

    def line(self) -> str:
        """Return the row as a line of JSON."""
        metrics = {name: encode_float(value) for name, value in self.metrics.items()}
        return json.dumps({"step": self.step, "timestamp": self.timestamp, "metrics": metrics}) + "\n"


class Journal(Callback):
    """Writes every recording to a file, and hands the rows on in batches.

    Args:
        path: the file; it is appended to.
        send: takes rows that were not sent before, in order.
    """

    def __init__(self, path: Path, send: Callable[[list[Row]], None]) -> None:
        self.path = path
        self.send = send
        self._file: TextIO | None = None
        self._unsent: list[Row] = []
        self._sent_at = time.monotonic()

    def on_metrics(self, trainer: "ModelTrainer", metrics: Mapping[str, float]) -> None:
        """Write a row at the trainer's step."""
        self.write(trainer.progress.step, metrics)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a row."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        row = Row(step, time.time_ns() // 1_000_000, dict(metrics))
        self._file.write(row.line())
        self._unsent.append(row)

    def on_safe_point(self, trainer: "ModelTrainer") -> None:
        """Hand on what has gathered, if the last time was long enough ago."""
        if time.monotonic() - self._sent_at > SECONDS_BETWEEN_BATCHES:
            self.flush()

    def on_train_end(self, trainer: "ModelTrainer") -> None:
        """Hand on the rest."""
        self.flush()

    def flush(self) -> None:
        """Put the rows on the disk and hand on those that were not yet."""
        if self._file is not None:
            self._file.flush()
        if self._unsent:
            self.send(self._unsent)
            self._unsent = []
        self._sent_at = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
