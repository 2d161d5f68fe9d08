import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.journal import Row, read_rows
from sonosco_mlflow.tracking.lease import Lease
from sonosco_mlflow.tracking.metric_rows import metric_records
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.recording import Recording
from sonosco_mlflow.tracking.store import download

pytestmark = pytest.mark.usefixtures("tracking_store")


def test_the_journal_is_uploaded_as_it_is_at_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on meanwhile; a server that is sent more than was announced takes the rest for nonsense."""
    sizes: list[tuple[int, int]] = []
    log_file = TrackedRun.log_file

    def slow(self: TrackedRun, path: Path, folder: str = "") -> None:
        before = path.stat().st_size
        writer = threading.Thread(target=recording.journal.write, args=(2, 2, {"train_loss": 1.0}))
        writer.start()
        writer.join()
        sizes.append((before, path.stat().st_size))
        log_file(self, path, folder)

    with TrackedRun.open("Default", "train") as run:
        recording = Recording(run, Mock(Lease), tmp_path / "run")
        recording.journal.write(1, 1, {"train_loss": 2.0})
        with monkeypatch.context() as patch:
            patch.setattr(TrackedRun, "log_file", slow)
            recording._deliver_journal()
    ((before, after),) = sizes
    assert before == after
    assert len(download(run.id, "journal.jsonl", tmp_path).read_bytes().splitlines()) == 1
    assert len(recording.journal.path.read_bytes().splitlines()) == 2


def test_nothing_is_delivered_to_a_run_that_belongs_to_another_process(tmp_path: Path) -> None:
    lease = Mock(Lease)
    lease.confirm.side_effect = UserError("it was taken over")
    with TrackedRun.open("Default", "train") as run:
        recording = Recording(run, lease, tmp_path / "run")
        recording.journal.write(1, 1, {"train_loss": 2.0})
        (tmp_path / "step-00000001").mkdir()
        for deliver in (
            recording.journal.flush,
            lambda: recording._deliver_checkpoint(tmp_path / "step-00000001", frozenset()),
        ):
            with pytest.raises(UserError, match="taken over"):
                deliver()
        assert run.artifacts_in("") == []
        assert metric_records(run.id) == {}


def test_no_row_is_in_the_journal_that_mlflow_keeps_and_not_among_its_metrics(tmp_path: Path) -> None:
    """Training goes on meanwhile; a run that is killed then is one that can be verified."""
    with TrackedRun.open("Default", "train") as run:
        recording = Recording(run, Mock(Lease), tmp_path / "run")
        log_rows = run.log_rows

        def slow(rows: list[Row]) -> None:
            log_rows(rows)
            recording.journal.write(2, 2, {"train_loss": 1.0})

        run.log_rows = slow  # type: ignore[method-assign]
        recording.journal.write(1, 1, {"train_loss": 2.0})
        recording._deliver_journal()
    (row,) = read_rows(download(run.id, "journal.jsonl", tmp_path))
    assert {(name, row.step) for name in row.metrics} == {*metric_records(run.id)} == {("train_loss", 1)}


def test_closing_waits_for_the_delivery_that_is_under_way(tmp_path: Path) -> None:
    """What is kept of the run afterwards, its ledger, is to have all that was delivered."""
    begun, may_end = threading.Event(), threading.Event()

    def deliver() -> None:
        begun.set()
        assert may_end.wait(30)

    with TrackedRun.open("Default", "train") as run:
        recording = Recording(run, Mock(Lease), tmp_path / "run")
        recording.background.deliver(deliver)
        assert begun.wait(30)
        closing = threading.Thread(target=recording.close)
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        may_end.set()
        closing.join(30)
        assert not closing.is_alive()
