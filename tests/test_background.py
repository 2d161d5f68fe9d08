import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest

from sonosco_mlflow import background as module
from sonosco_mlflow.background import Background, OverdueError, persist, within
from sonosco_mlflow.errors import UserError

LONGEST_WAIT = 10.0  # only a test that fails waits so long


class AwayError(Exception):
    pass


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.004)
    background = Background(is_away=lambda error: isinstance(error, AwayError))
    yield background
    background.close()


class Gate:
    """A task that says that it has begun, and ends when it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.opened.wait(LONGEST_WAIT)


def held(hand_in: Callable[[Callable[[], object]], None]) -> Gate:
    """Keep the thread that writes, or the one that delivers, busy until the gate is opened."""
    gate = Gate()
    hand_in(gate)
    assert gate.begun.wait(LONGEST_WAIT)
    return gate


def threads_of(background: Background) -> list[threading.Thread]:
    threads = [lane.thread for lane in (background._writes, background._deliveries)]
    assert None not in threads
    return [thread for thread in threads if thread is not None]


def beside(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(LONGEST_WAIT)
    return not thread.is_alive()


def waits(thread: threading.Thread) -> bool:
    thread.join(0.05)
    return thread.is_alive()


class Failing:
    """Fails so many times, then notes that it was done."""

    def __init__(self, times: int, error: BaseException, done: list[Any], name: object = "done") -> None:
        self.times = times
        self.error = error
        self.done = done
        self.name = name
        self.tries = 0

    def __call__(self) -> None:
        self.tries += 1
        if self.tries <= self.times:
            raise self.error
        self.done.append(self.name)


# ------------------------------------------------------------------ order


def test_tasks_are_done_in_order_by_another_thread_that_keeps_no_process_alive(background: Background) -> None:
    done: list[object] = []
    threads = set()

    def note(name: str) -> None:
        done.append(name)
        threads.add(threading.current_thread())

    for number in range(20):
        background.deliver(partial(note, f"{number}"))
    background.finish()
    assert done == [f"{number}" for number in range(20)]
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert thread.daemon


def test_no_thread_is_made_before_there_is_work() -> None:
    before = threading.active_count()
    idle = Background()
    idle.check()
    idle.finish_writes()
    idle.finish()
    idle.close()
    assert threading.active_count() == before


def test_a_delivery_that_hangs_holds_up_no_writing(background: Background) -> None:
    done: list[str] = []
    gate = held(background.deliver)
    background.deliver(partial(done.append, "delivered"))
    for number in range(3):
        assert ended(beside(partial(background.write, partial(done.append, f"written {number}"))))
    assert ended(beside(background.finish_writes))
    assert done == ["written 0", "written 1", "written 2"]
    with pytest.raises(UserError, match="2 deliveries have waited 0 s: no answer"):
        background.finish(patience=0.01)
    gate.opened.set()
    background.finish()
    assert done[3:] == ["delivered"]


def test_a_task_may_hand_in_what_follows_from_it(background: Background) -> None:
    done: list[str] = []

    def write() -> None:
        done.append("written")
        background.deliver(partial(done.append, "delivered"))

    background.write(write)
    background.finish()
    assert done == ["written", "delivered"]


def test_a_second_snapshot_waits_until_the_first_one_is_taken(background: Background) -> None:
    done: list[str] = []
    gate = held(background.write)
    background.write(partial(done.append, "first"))
    second = beside(lambda: background.write(partial(done.append, "second")))
    assert waits(second)
    assert done == []
    gate.opened.set()
    assert ended(second)
    background.finish()
    assert done == ["first", "second"]


def test_a_snapshot_need_not_wait_for_the_one_that_is_being_written(background: Background) -> None:
    gate = Gate()
    background.write(gate)
    assert gate.begun.wait(LONGEST_WAIT)
    assert ended(beside(lambda: background.write(lambda: None)))
    gate.opened.set()


# ------------------------------------------------------------------ the other side is away


def test_what_is_refused_for_being_away_is_tried_again_and_the_order_stays(background: Background) -> None:
    done: list[int] = []
    tasks = [Failing(times, AwayError(f"{name}"), done, name) for name, times in enumerate((5, 0, 3, 0))]
    for task in tasks:
        background.deliver(task)
    background.finish()
    assert done == [0, 1, 2, 3]
    assert [task.tries for task in tasks] == [6, 1, 4, 1]
    assert background.absence is None


def test_what_fails_in_its_middle_is_repeated_as_a_whole(background: Background) -> None:
    done: list[str] = []
    last = Failing(2, AwayError(), done, "sent")

    def deliver() -> None:
        done.append("begun")
        last()

    background.deliver(deliver)
    background.deliver(partial(done.append, "next"))
    background.finish()
    assert done == ["begun", "begun", "begun", "sent", "next"]


def test_writing_goes_on_while_the_other_side_is_away(background: Background) -> None:
    done: list[str] = []
    is_back = threading.Event()

    def deliver() -> None:
        if not is_back.is_set():
            raise AwayError
        done.append("delivered")

    background.deliver(deliver)
    for number in range(3):
        background.write(partial(done.append, f"written {number}"))
        background.finish_writes()
    assert done == ["written 0", "written 1", "written 2"]
    with pytest.raises(UserError, match="1 deliveries have waited 0 s"):
        background.finish(patience=0.01)
    background.check()
    is_back.set()
    background.finish()
    assert done[3:] == ["delivered"]


def test_its_error_can_be_seen_while_it_is_away(background: Background) -> None:
    error = AwayError("connection refused")
    background.deliver(Failing(10**9, error, []))
    with pytest.raises(UserError, match="connection refused"):
        background.finish(patience=0.05)
    assert background.absence is error
    background.check()


def test_pauses_grow_to_a_limit_and_start_anew_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    background = Background(is_away=lambda error: isinstance(error, AwayError))
    now = 0.0
    pauses: list[float] = []
    wait = background._changed.wait

    def passes(timeout: float | None = None) -> bool:
        nonlocal now
        if timeout is None or threading.current_thread().name != "sonosco-background":
            return wait(timeout)
        pauses.append(timeout)
        now += timeout
        return False

    monkeypatch.setattr(background._changed, "wait", passes)
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    gate = held(background.deliver)
    for times in (8, 1):
        background.deliver(Failing(times, AwayError(), []))
    gate.opened.set()
    background.finish()
    background.close()
    assert pauses == [0.5, 1, 2, 4, 8, 15, 15, 15, 0.5]


# ------------------------------------------------------------------ tried again where it is asked for


def test_a_task_is_repeated_while_the_other_side_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    done: list[str] = []
    persist(Failing(4, AwayError(), done), lambda error: isinstance(error, AwayError), 60.0)
    assert len(done) == 1
    assert pauses == [0.5, 1, 2, 4]


def test_an_error_of_another_kind_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", Mock(side_effect=AssertionError))
    with pytest.raises(ValueError, match="full"):
        persist(Failing(1, ValueError("full"), []), lambda error: isinstance(error, AwayError), 60.0)


@pytest.mark.parametrize(("patience", "expected"), [(0.0, []), (2.0, [0.5, 1]), (4.0, [0.5, 1, 2])])
def test_what_stays_away_is_raised_at_the_end_of_the_patience(
    monkeypatch: pytest.MonkeyPatch, patience: float, expected: list[float]
) -> None:
    now, pauses = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        pauses.append(seconds)

    def task() -> None:
        nonlocal now
        # Of a task that takes its time, the time of its first try is no absence.
        now += 0.0 if pauses else 50.0
        raise AwayError

    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with pytest.raises(AwayError):
        persist(task, lambda error: True, patience)
    assert pauses == expected


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("error", [ValueError("disk full"), SystemExit(3)], ids=["error", "exit"])
@pytest.mark.parametrize("kind", ["write", "deliver"])
def test_an_error_is_raised_at_the_next_check_and_nothing_is_done_after_it(
    kind: str, error: BaseException, background: Background
) -> None:
    done: list[str] = []
    hand_in = getattr(background, kind)
    gate = held(hand_in)
    hand_in(Failing(1, error, done))
    if kind == "deliver":
        hand_in(partial(done.append, "after it"))
    background.check()
    gate.opened.set()
    with pytest.raises(type(error), match=str(error)):
        background.finish(patience=0.2)
    for ask in (background.check, background.finish):
        with pytest.raises(type(error)):
            ask()
    with pytest.raises(type(error)) if kind == "write" else nullcontext():
        hand_in(partial(done.append, "more"))
    background.settle(patience=0.2)
    background.close()
    background.join()
    assert done == []


def test_a_delivery_that_fails_keeps_nothing_from_the_disk(background: Background) -> None:
    done: list[str] = []
    background.deliver(Failing(1, ValueError("quota exceeded"), done))
    with pytest.raises(ValueError, match="quota exceeded"):
        background.finish()
    assert not background.cannot_write
    background.write(partial(done.append, "state"))
    background.finish_writes()
    assert done == ["state"]


def test_what_was_written_is_delivered_where_no_more_can_be_written(background: Background) -> None:
    done: list[str] = []
    gate = held(background.deliver)
    background.deliver(partial(done.append, "rows"))
    background.write(Failing(1, OSError("disk full"), done))
    with pytest.raises(OSError, match="disk full"):
        background.finish_writes()
    assert background.cannot_write
    beside(gate.opened.set)
    with pytest.raises(OSError, match="disk full"):
        background.finish()
    assert done == ["rows"]


def test_being_away_is_no_excuse_for_the_disk(background: Background) -> None:
    background.write(Failing(1, AwayError("no such disk"), []))
    with pytest.raises(AwayError, match="no such disk"):
        background.finish()


def test_an_error_lets_go_who_waits_to_hand_in_a_snapshot(background: Background) -> None:
    done: list[str] = []
    gate = Gate()

    def fail() -> None:
        gate()
        raise ValueError("disk full")

    background.write(fail)
    assert gate.begun.wait(LONGEST_WAIT)
    background.write(partial(done.append, "first"))
    refused: list[BaseException] = []

    def hand_in_second() -> None:
        with pytest.raises(ValueError, match="disk full") as raised:
            background.write(partial(done.append, "second"))
        refused.append(raised.value)

    second = beside(hand_in_second)
    assert waits(second)
    gate.opened.set()
    assert ended(second)
    assert len(refused) == 1
    with pytest.raises(ValueError, match="disk full"):
        background.check()
    background.close()
    assert done == []


# ------------------------------------------------------------------ the end


def test_finishing_waits_for_the_task_that_is_under_way(background: Background) -> None:
    ways = (
        (background.write, background.finish_writes),
        (background.write, background.finish),
        (background.deliver, background.finish),
    )
    for hand_in, finish in ways:
        gate = held(hand_in)
        thread = beside(finish)
        assert waits(thread)
        gate.opened.set()
        assert ended(thread)


def test_finishing_the_writes_waits_for_no_delivery_that_is_put_off(background: Background) -> None:
    background.deliver(Failing(10**9, AwayError(), []))
    background.write(lambda: None)
    assert ended(beside(background.finish_writes))


def test_patience_has_an_end(background: Background) -> None:
    gate = held(background.deliver)
    with pytest.raises(UserError, match="have waited 0 s"):
        background.finish(patience=0.01)
    gate.opened.set()
    background.finish()


def test_closing_ends_the_thread_and_leaves_undone_what_is_not_done(background: Background) -> None:
    done: list[str] = []
    gates = [held(hand_in) for hand_in in (background.write, background.deliver)]
    threads = threads_of(background)
    for hand_in in (background.write, background.deliver):
        hand_in(partial(done.append, "too late"))
    background.close()
    background.close()
    for gate in gates:
        gate.opened.set()
    assert all(map(ended, threads))
    assert done == []


def test_closing_does_not_wait_out_a_pause(background: Background) -> None:
    background._pause = 1000.0
    away = Failing(10**9, AwayError(), [])
    background.deliver(away)
    background.write(lambda: None)
    background.finish_writes()
    background.close()
    assert all(map(ended, threads_of(background)))
    assert away.tries <= 1


def test_what_is_handed_in_after_the_end_is_refused_rather_than_forgotten(background: Background) -> None:
    background.deliver(lambda: None)
    background.finish()
    background.close()
    for hand_in in (background.write, background.deliver):
        with pytest.raises(RuntimeError, match="closed"):
            hand_in(lambda: None)


def test_joining_waits_for_what_is_under_way(background: Background) -> None:
    gate = held(background.deliver)
    background.close()
    thread = beside(background.join)
    assert waits(thread)
    gate.opened.set()
    assert ended(thread)


# ------------------------------------------------------------------ a call in its time


def test_a_call_gives_what_it_returns_or_raises() -> None:
    assert within(LONGEST_WAIT, lambda: 3) == 3
    assert within(None, lambda: None) is None
    with pytest.raises(ValueError, match="mine"):
        within(LONGEST_WAIT, Failing(1, ValueError("mine"), []))


def test_a_call_that_hangs_is_left_to_itself() -> None:
    gate = Gate()
    with pytest.raises(OverdueError, match="no answer in 0 s"):
        within(0.01, gate)
    assert gate.begun.wait(LONGEST_WAIT)
    gate.opened.set()


# ------------------------------------------------------------------ stress


def test_no_wake_up_is_lost_between_many_threads(background: Background) -> None:
    done: list[tuple[int, int]] = []
    writes: list[tuple[int, int]] = []

    def hand_in(thread: int) -> None:
        for number in range(50):
            if number % 5 == 0:
                background.write(partial(writes.append, (thread, number)))
            else:
                background.deliver(Failing(int(number % 10 == 3), AwayError(), done, (thread, number)))
            if number % 17 == 0:
                background.finish_writes()
            if number % 7 == 0:
                time.sleep(0)

    threads = [beside(partial(hand_in, number)) for number in range(8)]
    assert all(ended(thread) for thread in threads)
    background.finish(patience=LONGEST_WAIT)
    for found, numbers in ((writes, range(0, 50, 5)), (done, [n for n in range(50) if n % 5])):
        assert sorted(found) == sorted((thread, number) for thread in range(8) for number in numbers)
        for thread in range(8):
            assert [number for other, number in found if other == thread] == list(numbers)


def test_no_wake_up_is_lost_between_start_and_end() -> None:
    for _ in range(200):
        background = Background()
        done: list[int] = []
        background.write(partial(done.append, 1))
        background.deliver(partial(done.append, 2))
        background.finish(patience=LONGEST_WAIT)
        background.close()
        assert sorted(done) == [1, 2]
        assert all(map(ended, threads_of(background)))
