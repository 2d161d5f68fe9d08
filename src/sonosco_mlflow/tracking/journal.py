"""The journal: one line for every recording of metrics or texts, in the order in which they were made.

It is the run's own record; MLflow and TensorBoard show what it holds. A row keeps the time of its first writing, so
that sending it again changes nothing. It is on the disk before the checkpoint that counts it. A run that continues from
a checkpoint takes back the rows after it and makes them anew; what the tracking store already has of those is compared
bit for bit and not sent again.
"""

import json
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.durable import AppendedFile, make_directory, replace_bytes
from sonosco_mlflow.serialization.state import encode_float
from sonosco_mlflow.training.callbacks.base import Callback, is_timing

if TYPE_CHECKING:
    from sonosco_mlflow.training.callbacks.history import History
    from sonosco_mlflow.training.trainer import ModelTrainer

# A store's batch costs as much as one row does: rows are sent together, and still soon enough to watch.
SECONDS_BETWEEN_BATCHES = 2.0
JOURNAL = "journal.jsonl"
# Of a resume's own; a run that was never stopped has none.
RESUME_METRICS = "resume."
SYSTEM_METRICS = "system/"
RESERVED = (SYSTEM_METRICS, RESUME_METRICS)


class DivergedError(UserError):
    """A step that was made again came out otherwise than the tracking store says it did."""


class DamagedJournalError(UserError):
    """A line of a journal is no row.

    Attributes:
        rows: those before it. What a crash kept from the disk lies behind the rows that a checkpoint counts.
    """

    def __init__(self, message: str, rows: "list[Row]") -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Recorded:
    """One row that the tracking store holds: the value of a metric at a step, and when it was written."""

    value: float
    timestamp: int


Records = Mapping[tuple[str, int], Recorded]


@dataclass(frozen=True)
class Row:
    """What was recorded together; ``timestamp`` in milliseconds since 1970.

    Attributes:
        micro_step: the one to whose end it belongs (:attr:`ModelTrainer.position`): checkpoints from there on count it.
        step: optimizer steps made by then, the position that is shown.
        timestamp: of the first writing.
        metrics: by name.
        texts: Markdown by name.
    """

    micro_step: int
    step: int
    timestamp: int
    metrics: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def line(self) -> bytes:
        """Return the row as a line of JSON."""
        content = {**vars(self), "metrics": {name: encode_float(value) for name, value in self.metrics.items()}}
        return (json.dumps({key: value for key, value in content.items() if value != {}}) + "\n").encode()

    @classmethod
    def read(cls, line: bytes) -> "Row":
        """Read what :meth:`line` returned.

        Raises:
            ValueError: it is no such line.
        """
        content = json.loads(line)
        metrics = {
            name: float(value["$float"]) if isinstance(value, dict) else float(value)
            for name, value in content.pop("metrics", {}).items()
        }
        return cls(**content, metrics=metrics)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a journal; a last line that a crash cut short is none.

    Raises:
        DamagedJournalError: a line in its middle is no row; the message names it.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(Row.read(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedJournalError(f"{path}:{number}: not a row of a journal ({error})", rows) from error
    return rows


def missing_row(rows: Iterable[Row], history: "History", names: Iterable[str], first_step: int) -> str | None:
    """Return the first metric of ``history`` that ``rows`` lack, as "train_loss at step 12", or None.

    Args:
        rows: of the journal.
        history: what the checkpoint knows of the metrics.
        names: of those that the trainer itself records within a step. What callbacks record between two steps may be
            of a later one, which takes it back.
        first_step: steps made before the run began.
    """
    written = {(name, row.step): storable(value) for row in rows for name, value in row.metrics.items()}
    for name in sorted({*names} & {*history.names()}):
        for step, value in zip(*history.curve(name), strict=True):
            found = written.get((name, step))
            if step > first_step and (found is None or found.hex() != storable(value).hex()):
                return f"{name} at step {step}"
    return None


def rows_of(recorded: Records, micro_step: int, step: int, names: Iterable[str]) -> list[Row]:
    """Return rows of what the tracking store has up to a checkpoint, in the place of a journal that is lost.

    Args:
        recorded: what the store has; texts are not in it.
        micro_step: the checkpoint's position.
        step: its optimizer steps.
        names: of the metrics that the trainer records within a step; others at the last one may be of a later position.
    """
    known = {*names}
    rows: dict[tuple[int, int], dict[str, float]] = {}
    for (name, at), found in sorted(recorded.items(), key=lambda item: (item[0][1], item[1].timestamp, item[0][0])):
        if at < step or (at == step and name in known):
            rows.setdefault((at, found.timestamp), {})[name] = found.value
    return [Row(micro_step, at, timestamp, metrics) for (at, timestamp), metrics in rows.items()]


class Journal(Callback, is_part_of_trainer=False):
    """Writes every recording to a file, and hands the rows on in batches.

    Args:
        path: the file; it is appended to.
        send: takes rows that were not sent before, in order.
        deliver: has the given delivery done soon; by default at once.

    Attributes:
        verified_steps: steps that were made again and came out as the tracking store has them.
        differing_steps: steps that came out otherwise.
    """

    def __init__(
        self,
        path: Path,
        send: Callable[[list[Row]], None],
        deliver: Callable[[Callable[[], None]], None] = lambda task: task(),
    ) -> None:
        self.path = path
        self.send = send
        self.deliver = deliver
        self.verified_steps: set[int] = set()
        self.differing_steps: set[int] = set()
        self._recorded: Records = {}
        self._differs_until = -1
        self._last_steps: dict[str, int] = {}
        self._file: AppendedFile | None = None
        self._lock = threading.Lock()
        self._unsent: list[Row] = []
        self._sent_at = time.monotonic()

    def resume(self, rows: list[Row], micro_step: int, recorded: Records, *, differs_until: int = -1) -> list[Row]:
        """Become the journal as it was at ``micro_step``, and return its rows.

        Args:
            rows: what is known of the journal.
            micro_step: batches trained on at the checkpoint; rows after it are taken back.
            recorded: what the tracking store holds of this run. What it lacks of the kept rows is sent, what it holds
                beyond them is to come out again.
            differs_until: last step that may come out otherwise, because a change was allowed since. The store keeps
                its first row, which no call can replace; this file has the new one.
        """
        kept = [row for row in rows if row.micro_step <= micro_step]
        make_directory(self.path.parent)
        replace_bytes(self.path, b"".join(row.line() for row in kept))
        with self._lock:
            self._recorded = recorded
            self._differs_until = differs_until
            self._last_steps = {name: row.step for row in kept for name in row.metrics}
            self._unsent = [missing for row in kept if (missing := self._not_recorded(row)).metrics]
        return kept

    def on_metrics(self, trainer: "ModelTrainer", metrics: Mapping[str, float]) -> None:
        """Write a row at the trainer's position."""
        self.write(trainer.position, trainer.progress.step, metrics)

    def on_text(self, trainer: "ModelTrainer", name: str, text: str) -> None:
        """Write a row with a text at the trainer's position."""
        with self._lock:
            self._append(Row(trainer.position, trainer.progress.step, now_ms(), texts={name: text}))

    def write(self, micro_step: int, step: int, metrics: Mapping[str, float]) -> None:
        """Write a row of metrics.

        Raises:
            UserError: a metric was already recorded at this step.
            DivergedError: the tracking store has another value at this step.
        """
        for name in metrics:
            _check_name(name)
            if self._last_steps.get(name) == step:
                raise UserError(
                    f"the metric '{name}' is recorded a second time at step {step}; a metric has one value a step: "
                    "record it once, in on_step_end say, or under another name"
                )
            self._last_steps[name] = step
        row = self._compared(Row(micro_step, step, now_ms(), {name: float(value) for name, value in metrics.items()}))
        missing = self._not_recorded(row)
        with self._lock:
            self._append(row)
            if missing.metrics:
                self._unsent.append(missing)

    def on_safe_point(self, trainer: "ModelTrainer") -> None:
        """Hand on what has gathered, if the last time was long enough ago."""
        if time.monotonic() - self._sent_at > SECONDS_BETWEEN_BATCHES:
            self._sent_at = time.monotonic()
            self.deliver(self.flush)

    def on_train_end(self, trainer: "ModelTrainer") -> None:
        """Hand on the rest."""
        self.deliver(self.flush)

    def content(self) -> bytes:
        """Return the file as it now is; a row in it has been sent, or is sent by the next :meth:`flush`."""
        with self._lock:
            return self.path.read_bytes() if self.path.exists() else b""

    def rows_at(self, step: int) -> list[Row]:
        """Return the rows of an optimizer step, as far as the tracking store has, or will have, these very values."""

        def same(row: Row, name: str) -> bool:
            # Where a change was allowed, the store keeps the first value.
            stored = self._recorded.get((name, row.step))
            return stored is None or storable(row.metrics[name]).hex() == storable(stored.value).hex()

        lines = self.content().split(b"\n")[:-1]
        # Not one in a thousand is of that step: no other is read.
        rows = [Row.read(line) for line in lines if f'"step": {step},'.encode() in line]
        return [
            Row(
                row.micro_step,
                row.step,
                row.timestamp,
                {name: row.metrics[name] for name in row.metrics if same(row, name)},
            )
            for row in rows
            if row.step == step
        ]

    def sync(self) -> None:
        """Return when every row is on the disk."""
        if self._file is not None:
            self._file.sync()

    def flush(self) -> None:
        """Send the rows that were not yet; those that could not be sent are sent the next time."""
        with self._lock:
            rows = list(self._unsent)
        if rows:
            self.send(rows)
            with self._lock:
                del self._unsent[: len(rows)]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.sync()
            finally:
                file.close()

    def _append(self, row: Row) -> None:
        if self._file is None:
            self._file = AppendedFile(self.path)
        self._file.append(row.line())

    def _not_recorded(self, row: Row) -> Row:
        missing = {name: value for name, value in row.metrics.items() if (name, row.step) not in self._recorded}
        return Row(row.micro_step, row.step, row.timestamp, missing)

    def _compared(self, row: Row) -> Row:
        """Return ``row`` as it was first written, where the tracking store has it."""
        found = {name: self._recorded[name, row.step] for name in row.metrics if (name, row.step) in self._recorded}
        for name, recorded in found.items():
            if is_timing(name) or storable(row.metrics[name]).hex() == storable(recorded.value).hex():
                continue
            self.differing_steps.add(row.step)
            self.verified_steps.discard(row.step)
            if row.step > self._differs_until:
                raise DivergedError(
                    f"step {row.step} was made again and came out otherwise: {name} is {row.metrics[name]!r}, the "
                    f"tracking store has {recorded.value!r}. Something has changed since the checkpoint was written, "
                    "or draws from a source that is in no state: a generator of its own, a clock, another kind of "
                    "processor. Nothing was recorded, and the checkpoint is as it was"
                )
        if not found:
            return row
        if not all(map(is_timing, found)) and row.step not in self.differing_steps:
            self.verified_steps.add(row.step)
        timings = {name: recorded.value for name, recorded in found.items() if is_timing(name)}
        timestamp = next(iter(found.values())).timestamp
        return Row(row.micro_step, row.step, timestamp, {**row.metrics, **timings})


def _check_name(name: str) -> None:
    """Refuse what no tracking store takes, before a checkpoint counts it: no resume could deliver it."""
    if not re.fullmatch(r"[\w\-. :/]{1,250}", name) or posixpath.normpath(name) != name or name.startswith(("/", "..")):
        raise UserError(
            f"a metric cannot be called {name!r}: expected up to 250 letters, digits, _ - . : / and spaces, as a path"
        )
    if name.startswith(RESERVED):
        raise UserError(f"a metric cannot be called {name!r}: {' and '.join(RESERVED)} are MLflow's own and a resume's")


def storable(value: float) -> float:
    """Return ``value`` as an SQL store gives it back: it has no infinities, and may have no negative zero."""
    largest = 1.7976931348623157e308
    return min(max(value, -largest), largest) + 0.0 if value == value else value


def now_ms() -> int:
    """Return the time of now in milliseconds since 1970, as a row has it."""
    return time.time_ns() // 1_000_000
