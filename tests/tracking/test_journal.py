import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking import journal as journal_module
from sonosco_mlflow.tracking.journal import (
    DamagedJournalError,
    DivergedError,
    Journal,
    Recorded,
    Row,
    read_rows,
    storable,
)

LARGEST = 1.7976931348623157e308
NAN, INFINITY = float("nan"), float("inf")


def rows_of(path: Path) -> list[tuple[int, int, dict[str, float]]]:
    return [(row.micro_step, row.step, row.metrics) for row in read_rows(path)]


def at(micro_step: int, step: int) -> Any:
    """As much of a trainer as a journal looks at."""
    return SimpleNamespace(position=micro_step, progress=SimpleNamespace(step=step))


def resumed(path: Path, recorded: dict[tuple[str, int], Recorded], send: Callable[[list[Row]], None]) -> Journal:
    """A journal that goes on from micro-step 2, two steps in, and has all that it keeps in the store."""
    kept = [Row(step, step, 1000 + step, {"train_loss": float(step)}) for step in (1, 2)]
    journal = Journal(path, send)
    journal.resume(
        kept, 2, {**{("train_loss", row.step): Recorded(row.step, row.timestamp) for row in kept}, **recorded}
    )
    return journal


# ---------------------------------------------------------------------- rows and their file


def test_every_row_is_written_and_sent_once_in_order(tmp_path: Path) -> None:
    sent: list[Row] = []
    journal = Journal(tmp_path / "runs" / "journal.jsonl", sent.extend)
    journal.write(2, 1, {"train_loss": 0.1})
    journal.flush()
    journal.write(4, 2, {"train_loss": 0.30000000000000004, "gradient_norm": 2.0})
    journal.flush()
    journal.close()
    journal.flush()

    expected = [(2, 1, {"train_loss": 0.1}), (4, 2, {"train_loss": 0.30000000000000004, "gradient_norm": 2.0})]
    assert [(row.micro_step, row.step, row.metrics) for row in sent] == expected
    assert read_rows(journal.path) == sent
    assert [list(json.loads(line)) for line in journal.path.read_text().splitlines()] == [
        ["micro_step", "step", "timestamp", "metrics"]
    ] * 2


def test_a_row_stands_at_the_trainers_position_and_texts_are_written_but_not_sent(tmp_path: Path) -> None:
    sent: list[Row] = []
    journal = Journal(tmp_path / "journal.jsonl", sent.extend)
    journal.on_metrics(at(6, 3), {"val_loss": 1})
    journal.on_text(at(6, 3), "samples", "| a | b |")
    journal.on_text(at(6, 3), "others", "c\nd")
    journal.on_train_end(at(6, 3))
    assert [(row.micro_step, row.step, row.metrics, row.texts) for row in read_rows(journal.path)] == [
        (6, 3, {"val_loss": 1.0}, {}),
        (6, 3, {}, {"samples": "| a | b |"}),
        (6, 3, {}, {"others": "c\nd"}),
    ]
    assert [row.metrics for row in sent] == [{"val_loss": 1.0}]


def test_what_was_written_before_is_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        journal = Journal(tmp_path / "journal.jsonl", lambda rows: None)
        journal.write(step, step, {"train_loss": 1.0})
        journal.close()
    assert [row.step for row in read_rows(tmp_path / "journal.jsonl")] == [1, 2]


@pytest.mark.parametrize("value", [0.1, -0.0, 5e-324, LARGEST, NAN, INFINITY, -INFINITY])
def test_every_value_comes_back_to_the_bit(value: float) -> None:
    line = Row(1, 2, 3, {"rate": value}, {"note": "naïve\n"}).line()
    again = Row.read(line)
    assert again.metrics["rate"].hex() == value.hex()
    assert again.line() == line
    assert line.count(b"\n") == 1
    # A reader of JSON in another language must get by.
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    "torn", [b"", b"{", b'{"micro_step": 3, "step": 3, "timestamp": 9, "metrics": {"a": 1.0}}', b"\xff", b"\0" * 4096]
)
def test_a_last_line_that_a_crash_cut_short_is_no_row(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(Row(1, 1, 7, {"a": 1.0}).line() + Row(2, 2, 8, {"a": 2.0}).line() + torn)
    assert [row.step for row in read_rows(path)] == [1, 2]


@pytest.mark.parametrize(
    "broken",
    [
        b"{",
        b"\xff\xfe",
        b"",
        b"[]",
        b"3",
        b"{}",
        b'{"step": 2, "timestamp": 8, "metrics": {"a": 1.0}}',
        b'{"micro_step": 2, "step": 2, "timestamp": 8, "metrics": {"a": "x"}}',
        b'{"micro_step": 2, "step": 2, "timestamp": 8, "metrics": {"a": {"float": "nan"}}}',
        b'{"micro_step": 2, "step": 2, "timestamp": 8, "color": 1}',
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(Row(1, 1, 7, {"a": 1.0}).line() + broken + b"\n" + Row(3, 3, 8).line())
    with pytest.raises(DamagedJournalError, match=r"journal\.jsonl:2: not a row of a journal ") as raised:
        read_rows(path)
    assert [row.step for row in raised.value.rows] == [1]


def test_a_missing_journal_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "journal.jsonl") == []


def test_a_row_is_on_the_disk_when_the_journal_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        original(descriptor)

    journal = Journal(tmp_path / "journal.jsonl", lambda rows: None)
    journal.sync()
    journal.write(1, 1, {"train_loss": 1.0})
    # Whoever reads the file sees the row at once: nothing is held back in this process.
    assert len(read_rows(journal.path)) == 1
    monkeypatch.setattr(os, "fsync", fsync)
    journal.sync()
    assert synced == [journal.path.stat().st_size]


# ---------------------------------------------------------------------- sending


def test_rows_that_could_not_be_sent_are_sent_again(tmp_path: Path) -> None:
    sent: list[list[int]] = []
    answers = iter([ConnectionError("down"), ConnectionError("down"), None, None])

    def send(rows: list[Row]) -> None:
        if error := next(answers):
            raise error
        sent.append([row.step for row in rows])

    journal = Journal(tmp_path / "journal.jsonl", send)
    for step in (1, 2):
        journal.write(step, step, {"train_loss": 1.0})
        with pytest.raises(ConnectionError):
            journal.flush()
    journal.flush()
    journal.write(3, 3, {"train_loss": 1.0})
    journal.flush()
    assert sent == [[1, 2], [3]]


def test_rows_are_handed_on_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now)
    sent: list[list[int]] = []
    journal = Journal(tmp_path / "journal.jsonl", lambda rows: sent.append([row.step for row in rows]))
    for step in range(1, 8):
        now += 0.7
        journal.write(step, step, {"train_loss": 1.0})
        journal.on_safe_point(at(step, step))
    assert sent == [[1, 2, 3], [4, 5, 6]]
    journal.on_train_end(at(7, 7))
    assert sent == [[1, 2, 3], [4, 5, 6], [7]]


def test_deliveries_go_where_they_are_told(tmp_path: Path) -> None:
    tasks: list[Callable[[], None]] = []
    sent: list[Row] = []
    journal = Journal(tmp_path / "journal.jsonl", sent.extend, tasks.append)
    journal.write(1, 1, {"train_loss": 1.0})
    journal.on_train_end(at(1, 1))
    assert not sent
    for task in tasks:
        task()
    assert [row.step for row in sent] == [1]


def test_a_flush_beside_the_writing_loses_and_repeats_nothing(tmp_path: Path) -> None:
    sent: list[int] = []
    started, ended = threading.Event(), threading.Event()

    def send(rows: list[Row]) -> None:
        started.set()
        # The lock must be free: the training goes on while the store takes its time.
        ended.wait(0.002)
        sent.extend(row.step for row in rows)

    journal = Journal(tmp_path / "journal.jsonl", send)

    def flush() -> None:
        while not ended.is_set():
            journal.flush()

    thread = threading.Thread(target=flush)
    thread.start()
    for step in range(1, 501):
        journal.write(step, step, {"train_loss": float(step)})
        if step == 1:
            started.wait(5)
    ended.set()
    thread.join()
    journal.flush()
    assert sent == list(range(1, 501))


def test_writing_does_not_wait_for_a_slow_store(tmp_path: Path) -> None:
    began, may_end = threading.Event(), threading.Event()

    def send(rows: list[Row]) -> None:
        began.set()
        assert may_end.wait(10)

    journal = Journal(tmp_path / "journal.jsonl", send)
    journal.write(1, 1, {"train_loss": 1.0})
    thread = threading.Thread(target=journal.flush)
    thread.start()
    assert began.wait(10)
    writing = threading.Thread(target=journal.write, args=(2, 2, {"train_loss": 1.0}))
    writing.start()
    writing.join(5)
    was_blocked = writing.is_alive()
    may_end.set()
    thread.join()
    writing.join()
    assert not was_blocked


# ---------------------------------------------------------------------- a metric has one value a step


def test_a_metric_that_is_recorded_twice_at_a_step_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", lambda rows: None)
    journal.write(2, 1, {"train_loss": 1.0})
    journal.write(2, 1, {"val_loss": 1.0})
    with pytest.raises(UserError, match=r"metric 'val_loss' is recorded a second time at step 1; .*another name"):
        journal.write(3, 1, {"other": 1.0, "val_loss": 2.0})
    journal.write(4, 2, {"train_loss": 1.0, "val_loss": 1.0})
    assert [row.metrics.keys() for row in read_rows(journal.path)] == [
        {"train_loss"},
        {"val_loss"},
        {"train_loss", "val_loss"},
    ]


def test_so_is_one_that_was_recorded_before_the_resume(tmp_path: Path) -> None:
    journal = resumed(tmp_path / "journal.jsonl", {}, lambda rows: None)
    with pytest.raises(UserError, match="'train_loss' is recorded a second time at step 2"):
        journal.write(3, 2, {"train_loss": 2.0})


# ---------------------------------------------------------------------- going on


def test_a_resume_takes_back_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    rows = [
        Row(2, 1, 10, {"train_loss": 1.0}),
        Row(2, 1, 10, texts={"samples": "x"}),
        Row(4, 2, 11, {"train_loss": 2.0}),
        Row(5, 2, 12, {"drawn": 2.5}),
        Row(6, 3, 13, {"train_loss": 3.0}),
    ]
    path = tmp_path / "runs" / "journal.jsonl"
    sent: list[Row] = []
    journal = Journal(path, sent.extend)
    assert journal.resume(rows, 4, {}) == rows[:3]
    assert read_rows(path) == rows[:3]
    journal.write(6, 3, {"train_loss": 3.0})
    assert rows_of(path)[3:] == [(6, 3, {"train_loss": 3.0})]


def test_what_the_store_lacks_of_the_kept_rows_is_sent_with_its_time(tmp_path: Path) -> None:
    rows = [
        Row(1, 1, 10, {"train_loss": 1.0, "gradient_norm": 0.5}),
        Row(1, 1, 10, texts={"samples": "x"}),
        Row(2, 2, 11, {"train_loss": 2.0}),
        Row(3, 3, 12, {"train_loss": 3.0}),
    ]
    sent: list[Row] = []
    journal = Journal(tmp_path / "journal.jsonl", sent.extend)
    journal.resume(rows, 2, {("train_loss", 1): Recorded(1.0, 10)})
    journal.flush()
    assert sent == [Row(1, 1, 10, {"gradient_norm": 0.5}), Row(2, 2, 11, {"train_loss": 2.0})]


def test_a_step_that_is_made_again_keeps_its_time_and_is_not_sent_again(tmp_path: Path) -> None:
    sent: list[Row] = []
    recorded = {("train_loss", 3): Recorded(3.0, 777), ("utterances_per_second", 3): Recorded(50.0, 777)}
    journal = resumed(tmp_path / "journal.jsonl", recorded, sent.extend)
    journal.write(3, 3, {"train_loss": 3.0, "utterances_per_second": 99.0})
    journal.write(4, 4, {"train_loss": 4.0, "utterances_per_second": 99.0})
    journal.flush()
    assert journal.verified_steps == {3}
    again, new = read_rows(journal.path)[-2:]
    assert again == Row(3, 3, 777, {"train_loss": 3.0, "utterances_per_second": 50.0})
    assert new.metrics == {"train_loss": 4.0, "utterances_per_second": 99.0}
    assert sent == [new]


def test_of_a_batch_that_was_cut_off_the_rest_is_sent(tmp_path: Path) -> None:
    sent: list[Row] = []
    journal = resumed(tmp_path / "journal.jsonl", {("train_loss", 3): Recorded(3.0, 777)}, sent.extend)
    journal.write(3, 3, {"train_loss": 3.0, "gradient_norm": 0.5})
    journal.flush()
    assert sent == [Row(3, 3, 777, {"gradient_norm": 0.5})]
    assert journal.verified_steps == {3}


def test_a_timing_alone_verifies_nothing(tmp_path: Path) -> None:
    journal = resumed(tmp_path / "journal.jsonl", {("epoch_seconds", 3): Recorded(9.0, 777)}, lambda rows: None)
    journal.write(3, 3, {"epoch_seconds": 1.0})
    assert journal.verified_steps == set()
    assert read_rows(journal.path)[-1] == Row(3, 3, 777, {"epoch_seconds": 9.0})


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (0.1, 0.1),
        (NAN, NAN),
        (-0.0, -0.0),
        (-0.0, 0.0),  # SQLite's answer
        (INFINITY, LARGEST),
        (-INFINITY, -LARGEST),
        (INFINITY, INFINITY),
        (LARGEST, LARGEST),
    ],
)
def test_the_same_value_is_the_same_as_a_store_gives_it_back(tmp_path: Path, value: float, stored: float) -> None:
    journal = resumed(tmp_path / "journal.jsonl", {("train_loss", 3): Recorded(stored, 777)}, lambda rows: None)
    journal.write(3, 3, {"train_loss": value})
    assert journal.verified_steps == {3}
    # The journal says what was, not what the store can hold.
    assert read_rows(journal.path)[-1].metrics["train_loss"].hex() == value.hex()


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (0.1 + 0.2, 0.3),
        (NAN, 0.0),
        (1.0, NAN),
        (INFINITY, -LARGEST),
        (INFINITY, NAN),
        (5e-324, 0.0),
    ],
)
def test_the_first_different_bit_stops_the_run(tmp_path: Path, value: float, stored: float) -> None:
    sent: list[Row] = []
    journal = resumed(tmp_path / "journal.jsonl", {("train_loss", 3): Recorded(stored, 777)}, sent.extend)
    before = journal.path.read_bytes()
    with pytest.raises(DivergedError, match="step 3 was made again and came out otherwise: train_loss is ") as raised:
        journal.write(3, 3, {"train_loss": value, "other": 1.0})
    assert f"train_loss is {value!r}, the tracking store has {stored!r}" in str(raised.value)
    journal.flush()
    assert not sent
    assert journal.path.read_bytes() == before
    assert journal.verified_steps == set()


def test_up_to_where_a_way_was_left_the_store_keeps_what_it_has(tmp_path: Path) -> None:
    recorded = {("train_loss", step): Recorded(0.5, 777) for step in (3, 4)}
    sent: list[Row] = []
    journal = Journal(tmp_path / "journal.jsonl", sent.extend)
    journal.resume([], 2, recorded, differs_until=3)
    journal.write(3, 3, {"train_loss": 0.25})
    journal.flush()
    assert not sent
    assert [row.metrics for row in read_rows(journal.path)] == [{"train_loss": 0.25}]
    assert (journal.differing_steps, journal.verified_steps) == ({3}, set())
    with pytest.raises(DivergedError, match="step 4 was made again"):
        journal.write(4, 4, {"train_loss": 0.25})


def test_a_store_clips_infinities_and_has_no_negative_zero() -> None:
    assert [storable(value) for value in (INFINITY, -INFINITY, 1.5, 5e-324)] == [LARGEST, -LARGEST, 1.5, 5e-324]
    assert storable(-0.0).hex() == (0.0).hex()
    assert storable(NAN) != storable(NAN)


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["hits@10", "", "a//b", "/a", "../a", "a/../b", 251 * "a", "system/cpu", "resume.x"])
def test_a_name_that_no_store_takes_is_refused_before_it_is_written(tmp_path: Path, name: str) -> None:
    journal = Journal(tmp_path / "journal.jsonl", lambda rows: None)
    with pytest.raises(UserError, match="a metric cannot be called"):
        journal.write(1, 1, {"fine": 1.0, name: 1.0})
    assert not journal.path.exists()
    journal.write(1, 1, dict.fromkeys(("gradient_norm/encoder.0", "a b", "hits:10", "résumé"), 1.0))
