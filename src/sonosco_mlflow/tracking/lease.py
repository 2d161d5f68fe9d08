"""The lease of a run: no two processes train it at once, and what became of a vanished one can be told.

On one machine a lock of the operating system decides, which ends with its process however that ends. Between machines,
and between containers that do not see each other's locks, there is only the tracking store: the process that holds the
lease shows life in a tag of the run every 30 s, and a run whose last sign of life is two minutes old may be taken over.
Then the former holder, should it live, stops::

    lease = Lease.take(run_id)   # UserError: another process is at it
    lease.start()
    for step in training:
        lease.check()            # UserError: another machine has taken the run over
    lease.confirm()              # asks the store: before each delivery
    lease.release()
"""

import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import mlflow
from mlflow.entities import LifecycleStage, Run, RunTag

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.host_lock import LOCKS, HostLock, locks_name
from sonosco_mlflow.tracking.store import find_run
from sonosco_mlflow.tracking.tags import HEARTBEAT, HOST, OWNER, PID, STATE

RENEWAL = 30.0
"""Seconds between two signs of life."""
STALE = 120.0
"""Seconds after which a run of another machine counts as vanished; clocks may differ by what is left of it."""

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the time of now, with its zone."""
    return datetime.now(UTC)


class Lease:
    """The right of this process to train one run. Made by :meth:`take`."""

    def __init__(self, run_id: str, lock: HostLock, host: str, now: Clock, locks: Path) -> None:
        self.run_id = run_id
        self._lock = lock
        self._host = host
        self._now = now
        self._locks = locks
        self._token = f"{locks_name(locks)}-{secrets.token_hex(8)}"
        self._client = mlflow.MlflowClient()
        self._process = os.getpid()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: str | None = None

    @classmethod
    def take(cls, run_id: str, *, host: str | None = None, now: Clock = utc_now, locks: Path = LOCKS) -> "Lease":
        """Take the lease of a run, and say so in its tags.

        Args:
            run_id: a run of the tracking store.
            host: name of this machine.
            now: the clock.
            locks: folder of the locks, one for all projects of this user on this machine.

        Raises:
            UserError: another process trains the run, here or on another machine, or there is no such run.
        """
        host = host or socket.gethostname()
        lock = HostLock(run_id, locks)
        if not lock.take(_time(now())):
            raise UserError(
                f"run {run_id} is being trained by {lock.holder()} on this machine; wait for it, or stop it"
            )
        try:
            lease = cls(run_id, lock, host, now, locks)
            lease._claim()
        except BaseException:
            lock.release()
            raise
        return lease

    def _claim(self) -> None:
        # Only now: what stood there before the lock was taken may be outdated.
        run = find_run(self.run_id)
        if run.info.lifecycle_stage == LifecycleStage.DELETED:
            raise UserError(
                f"run {self.run_id} was deleted; `mlflow runs restore --run-id {self.run_id}` brings it back"
            )
        tags = run.data.tags
        age = _heartbeat_age(tags, self._now())
        # Here the lock was free: whoever is named there has vanished. Elsewhere a process has it from taking it until
        # it lets go, whatever the run's state says.
        if tags.get(OWNER) and not _is_here(tags, self._host, self._locks) and age < STALE:
            until = _time(self._now() + timedelta(seconds=STALE - age))
            raise UserError(
                f"run {self.run_id} is being trained by process {tags.get(PID)} on {tags[HOST]}, which showed life "
                f"{age:.0f} s ago; wait for it, or stop it there. If it is gone, the run can be taken over from {until}"
            )
        claim = {OWNER: self._token, HOST: self._host, PID: str(self._process), HEARTBEAT: _time(self._now())}
        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in claim.items()])
        # Of two machines that come at once, the one that writes last has it; the other sees it here or in `renew`.
        self.confirm()

    def start(self, interval: float = RENEWAL) -> None:
        """Show life now and every ``interval`` seconds, in a thread, until :meth:`release`; once is enough."""
        if self._thread is not None:
            return

        def work() -> None:
            while self._lost is None and not self._ended.is_set():
                # A tracking server that is down is no reason to stop; the next sign of life may reach it.
                with suppress(Exception):
                    self.renew()
                self._ended.wait(interval)

        # Threads do not survive a fork: the workers of a loader show no life in the name of their trainer.
        self._thread = threading.Thread(target=work, name="sonosco-lease", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """Show life once, unless another process has taken the run over.

        Raises:
            MlflowException: the tracking store cannot be reached.
        """
        self._lock.keep()
        self._look()
        if self._lost is None and not self._ended.is_set():
            self._client.set_tag(self.run_id, HEARTBEAT, _time(self._now()))

    def _look(self) -> None:
        tags = self._client.get_run(self.run_id).data.tags
        if tags.get(OWNER, self._token) != self._token:
            self._lost = (
                f"run {self.run_id} was taken over by process {tags.get(PID)} on {tags.get(HOST)} "
                f"at {tags.get(HEARTBEAT)} or before; this process must not go on with it"
            )

    def confirm(self) -> None:
        """Return if the run is this process's own still; asks the tracking store, before something is written to it.

        Raises:
            UserError: another process has taken the run over.
            MlflowException: the tracking store cannot be reached.
        """
        self._look()
        self.check()

    def check(self) -> None:
        """Return if the run is still this process's own. Asks nobody: for use at every step.

        Raises:
            UserError: another process has taken the run over.
        """
        if self._lost is not None:
            raise UserError(self._lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Show no more life and let others take the run; again, or in a forked child, this does nothing."""
        if os.getpid() != self._process or self._ended.is_set():
            return
        self._ended.set()
        # A store that is away learns nothing of it: other machines then wait until the last sign of life is old.
        with suppress(Exception):
            self.confirm()
            self._client.set_tag(self.run_id, OWNER, "")
        self._lock.release()


VANISHED = "vanished"


def condition(run: Run, *, host: str | None = None, now: Clock = utc_now, locks: Path = LOCKS) -> str:
    """Return what a run is in truth.

    Returns:
        What the tag ``sonosco.state`` says, or ``vanished`` where that is ``running`` and the process is gone, or
        ``unknown`` without the tag. Where no process has taken a lease, nobody can tell whether it lives: ``running``.
    """
    tags = run.data.tags
    state: str = tags.get(STATE, "unknown")
    if state != "running" or HOST not in tags:
        return state
    if tags.get(OWNER) == "":
        # Let go of by a process that could not tell how the run ended.
        return VANISHED
    if _is_here(tags, host or socket.gethostname(), locks):
        lives = HostLock(run.info.run_id, locks).is_held()
    else:
        lives = _heartbeat_age(tags, now()) < STALE
    return state if lives else VANISHED


def _is_here(tags: Mapping[str, str], host: str, locks: Path) -> bool:
    """Return whether the holder of a run is one whose lock can be seen from here."""
    return tags.get(HOST) == host and tags.get(OWNER, "").startswith(f"{locks_name(locks)}-")


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _heartbeat_age(tags: Mapping[str, str], now: datetime) -> float:
    try:
        return (now - datetime.fromisoformat(tags[HEARTBEAT])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return float("inf")
