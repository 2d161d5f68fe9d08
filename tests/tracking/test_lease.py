import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.host_lock import HostLock, locks_name
from sonosco_mlflow.tracking.lease import HEARTBEAT, HOST, OWNER, PID, Lease, condition
from sonosco_mlflow.tracking.store import find_run
from sonosco_mlflow.tracking.tags import STATE

pytestmark = pytest.mark.usefixtures("tracking_store")

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def run_id() -> str:
    run: str = mlflow.MlflowClient().create_run("0", tags={STATE: "running"}).info.run_id
    return run


@pytest.fixture
def locks(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "locks"
    # The table is the process's, and tests share one.
    for key in [key for key in HostLock._held if key[1].is_relative_to(tmp_path)]:
        os.close(HostLock._held.pop(key))


def take(run_id: str, locks: Path, host: str = "here", seconds: float = 0) -> Lease:
    return Lease.take(run_id, host=host, now=lambda: NOON + timedelta(seconds=seconds), locks=locks)


def state(run_id: str, locks: Path, host: str = "here", seconds: float = 0) -> str:
    return condition(find_run(run_id), host=host, now=lambda: NOON + timedelta(seconds=seconds), locks=locks)


def process(program: str) -> "subprocess.Popen[str]":
    """A process that runs ``program`` and has said its first line."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def holding(run_id: str, locks: Path, then: str = "") -> "subprocess.Popen[str]":
    return process(f"""
        import os, time
        from pathlib import Path
        from sonosco_mlflow.tracking.host_lock import HostLock
        assert HostLock({run_id!r}, Path({str(locks)!r})).take("then")
        {then}
        print("ready", flush=True)
        time.sleep(60)
    """)


def test_the_tags_say_who_has_the_run(run_id: str, locks: Path) -> None:
    take(run_id, locks)
    tags = find_run(run_id).data.tags
    assert (tags[HOST], tags[PID], tags[HEARTBEAT]) == ("here", str(os.getpid()), "2026-01-01T12:00:00+00:00")
    assert state(run_id, locks) == "running"


def test_a_process_excludes_itself_until_it_releases(run_id: str, locks: Path) -> None:
    lease = take(run_id, locks)
    with pytest.raises(UserError, match=rf"{run_id} is being trained by this process \({os.getpid()}\)"):
        take(run_id, locks)
    lease.release()
    lease.release()
    assert list(locks.iterdir()), "a lock file that is deleted may be locked twice"
    take(run_id, locks)
    # The lease that ended before must not end this one.
    with pytest.raises(UserError, match="being trained"):
        take(run_id, locks)


def test_other_runs_are_free(run_id: str, locks: Path) -> None:
    take(run_id, locks)
    take(mlflow.MlflowClient().create_run("0").info.run_id, locks)


def test_a_killed_process_loses_the_run_at_once_even_to_a_worker_that_outlives_it(run_id: str, locks: Path) -> None:
    for key, value in {HOST: "here", OWNER: f"{locks_name(locks)}-of-the-process"}.items():
        mlflow.MlflowClient().set_tag(run_id, key, value)
    worker = locks.parent / "worker"
    then = f"""if os.fork() == 0:
            Path({str(worker)!r}).write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        while not Path({str(worker)!r}).exists() or not Path({str(worker)!r}).read_text():
            time.sleep(0.01)"""
    with holding(run_id, locks, then) as child:
        try:
            with pytest.raises(UserError, match=f"by process {child.pid} since then on this machine; wait for it"):
                take(run_id, locks)
            assert state(run_id, locks) == "running"
            # To look must not cost the holder its lock, nor be in the way of another who looks.
            assert HostLock(run_id, locks).is_held()
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert state(run_id, locks) == "vanished"
            os.kill(int(worker.read_text()), 0)
            take(run_id, locks).check()
        finally:
            child.kill()
            os.kill(int(worker.read_text()), signal.SIGKILL)


def test_looking_from_another_process_leaves_the_lock_with_its_holder(run_id: str, locks: Path) -> None:
    # In the holder's own process, opening and closing the file would drop the lock.
    take(run_id, locks)
    assert HostLock(run_id, locks).is_held()
    assert not HostLock(run_id, locks).take("now")
    HostLock(run_id, locks).holder()
    with process(f"""
        from pathlib import Path
        from sonosco_mlflow.tracking.host_lock import HostLock
        lock = HostLock({run_id!r}, Path({str(locks)!r}))
        print("ready" if lock.is_held() and not lock.take("now") else "free", flush=True)
    """):
        pass


def test_a_forked_child_neither_releases_nor_renews(run_id: str, locks: Path) -> None:
    lease = take(run_id, locks)
    lease.start()
    child = os.fork()
    if child == 0:
        lease.release()
        alive = lease._thread is not None and lease._thread.is_alive()
        os._exit(1 if alive else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert HostLock(run_id, locks).is_held()
    with process(f"""
        from pathlib import Path
        from sonosco_mlflow.tracking.host_lock import HostLock
        print("ready" if HostLock({run_id!r}, Path({str(locks)!r})).is_held() else "free", flush=True)
    """):
        pass
    lease.release()


def test_what_a_parent_held_is_not_held_by_its_child(run_id: str, locks: Path) -> None:
    lock = HostLock(run_id, locks)
    assert lock.take("now")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)
        os._exit(0 if lock.take("now") else 1)
    lock.release()
    os.write(writer, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(reader)
    os.close(writer)


def test_another_machine_waits_for_a_run_that_shows_life(run_id: str, locks: Path, tmp_path: Path) -> None:
    take(run_id, locks)
    there = tmp_path / "there"
    message = rf"process {os.getpid()} on here, which showed life 119 s ago.*from 2026-01-01T12:02:00\+00:00"
    with pytest.raises(UserError, match=message):
        take(run_id, there, "there", 119)
    assert state(run_id, there, "there", 119) == "running"
    assert state(run_id, there, "there", 120) == "vanished"
    take(run_id, there, "there", 120)
    # A refused taker keeps nothing.
    with pytest.raises(UserError, match="there, which showed life"):
        take(run_id, tmp_path / "third", "third", 121)
    assert not HostLock(run_id, tmp_path / "third").is_held()


def test_a_container_of_the_same_name_that_sees_no_lock_waits_too(run_id: str, locks: Path, tmp_path: Path) -> None:
    lease = take(run_id, locks)
    there = tmp_path / "there"
    with pytest.raises(UserError, match="which showed life 119 s ago"):
        take(run_id, there, "here", 119)
    assert state(run_id, there, "here", 119) == "running"
    assert state(run_id, there, "here", 120) == "vanished"
    lease.release()
    take(run_id, there, "here", 2)


def test_all_who_see_the_same_locks_have_one_name(tmp_path: Path) -> None:
    program = f"""
        from pathlib import Path
        from sonosco_mlflow.tracking.host_lock import locks_name
        print("ready", flush=True)
        input()
        print(locks_name(Path({str(tmp_path / "locks")!r})))
    """
    children = [process(program) for _ in range(4)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    names = {child.communicate()[0] for child in children}
    assert len(names) == 1
    assert len(names.pop().strip()) == 16
    assert [path.name for path in (tmp_path / "locks").iterdir()] == ["name"]


def test_whoever_is_taken_over_stops(run_id: str, locks: Path, tmp_path: Path) -> None:
    lease = take(run_id, locks)
    lease.renew()
    lease.check()
    take(run_id, tmp_path / "there", "there", 200)
    lease.check()
    lease.renew()
    with pytest.raises(UserError, match=f"{run_id} was taken over by process {os.getpid()} on there"):
        lease.check()
    assert find_run(run_id).data.tags[HEARTBEAT] == "2026-01-01T12:03:20+00:00", "the new holder's life is its own"


def test_of_two_machines_that_come_at_once_one_has_it(
    run_id: str, locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_be_overwritten(client: mlflow.MlflowClient, run: str, **others: object) -> None:
        client.set_tag(run, OWNER, "another")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", write_and_be_overwritten)
    with pytest.raises(UserError, match="was taken over"):
        take(run_id, locks)
    assert not HostLock(run_id, locks).is_held()


def test_a_run_that_came_to_an_end_can_be_taken_anywhere_at_once(run_id: str, locks: Path, tmp_path: Path) -> None:
    take(run_id, locks).release()
    mlflow.MlflowClient().set_tag(run_id, STATE, "interrupted")
    assert state(run_id, tmp_path, "there", 1) == "interrupted"
    take(run_id, tmp_path, "there", 1)


def test_what_nobody_has_taken_is_what_its_tag_says(run_id: str, locks: Path) -> None:
    assert state(run_id, locks) == "running"
    assert state(mlflow.MlflowClient().create_run("0").info.run_id, locks) == "unknown"


@pytest.mark.parametrize("heartbeat", [None, "yesterday", "2026-01-01T12:00:00"])
def test_a_sign_of_life_that_cannot_be_read_is_none(run_id: str, locks: Path, heartbeat: str | None) -> None:
    client = mlflow.MlflowClient()
    client.set_tag(run_id, HOST, "there")
    if heartbeat is not None:
        client.set_tag(run_id, HEARTBEAT, heartbeat)
    assert state(run_id, locks) == "vanished"
    take(run_id, locks)


def test_the_thread_goes_on_showing_life_after_the_server_was_away(
    run_id: str, locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = NOON
    lease = Lease.take(run_id, host="here", now=lambda: moment, locks=locks)
    moment += timedelta(seconds=30)
    failures = iter([MlflowException("the server is away")] * 3)
    get_run = lease._client.get_run

    def get_run_later(run: str) -> Run:
        for failure in failures:
            raise failure
        return get_run(run)

    monkeypatch.setattr(lease._client, "get_run", get_run_later)
    lease.start(interval=0.01)
    thread = lease._thread
    lease.start(interval=0.01)
    assert lease._thread is thread is not None
    deadline = time.monotonic() + 20
    while find_run(run_id).data.tags[HEARTBEAT] != "2026-01-01T12:00:30+00:00":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lease.check()
    lease.release()
    thread.join(20)
    assert not thread.is_alive()


def test_a_failure_while_taking_gives_the_lock_back(run_id: str, locks: Path) -> None:
    with pytest.raises(UserError, match="'nonsense' is not in the tracking store"):
        take("nonsense", locks)
    assert not HostLock("nonsense", locks).is_held()


def test_the_files_of_the_locks_stay_young(run_id: str, locks: Path) -> None:
    lease = take(run_id, locks)
    files = list(locks.iterdir())
    assert len(files) == 2
    for file in files:
        os.utime(file, (0, 0))
    lease.renew()
    assert all(file.stat().st_mtime > 0 for file in files)


def test_a_folder_of_locks_that_others_made_is_not_used(run_id: str, locks: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    locks.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="expected a folder that only you may write to"):
        take(run_id, locks)
    locks.unlink()
    locks.mkdir()
    locks.chmod(0o777)
    with pytest.raises(UserError, match="expected a folder that only you may write to"):
        take(run_id, locks)


def test_a_lock_is_not_written_through_a_link(run_id: str, locks: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    locks.mkdir(mode=0o700)
    (locks / f"run-{run_id}.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        take(run_id, locks)
    assert victim.read_text() == "precious"


def test_a_run_that_was_deleted_is_told_how_it_comes_back(run_id: str, locks: Path) -> None:
    mlflow.delete_run(run_id)
    with pytest.raises(UserError, match=rf"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` brings"):
        Lease.take(run_id, locks=locks)
