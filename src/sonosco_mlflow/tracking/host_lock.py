"""A lock between the processes of one machine, for each run of the tracking store."""

import fcntl
import json
import os
import secrets
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path

from sonosco_mlflow.errors import UserError

# The same for all clones of a user. Not TMPDIR, which batch systems set to a folder of its own for each job.
LOCKS = Path("/tmp") / f"sonosco-{os.getuid()}"
# A file in it: a name for all who see each other's locks.
_NAME = "name"


class HostLock:
    """A lock between the processes of one machine, which the operating system opens when its process ends.

    A POSIX record lock, not ``flock``: that one belongs to the open file, which forked workers of a loader inherit, and
    would outlive a killed trainer for as long as they do. A record lock belongs to the process, which has traps of its
    own: it does not exclude a second taker in the same process, and closing any other descriptor of the file drops it.
    So one table for the process keeps account, and no file in it is opened a second time.
    """

    _table_lock = threading.Lock()
    # The table is inherited by forked children, the locks are not: an entry counts in the process that made it.
    _held: dict[tuple[int, Path], int] = {}  # noqa: RUF012

    def __init__(self, run_id: str, folder: Path) -> None:
        self._path = folder / f"run-{run_id}.lock"

    def take(self, since: str) -> bool:
        """Take the lock and note in its file who has it since when; return whether it was free."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(self._path.parent)
        with self._table_lock:
            if self._key() in self._held:
                return False
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if not _lock(descriptor, fcntl.LOCK_EX, attempts=5):
                os.close(descriptor)
                return False
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "since": since}).encode(), 0)
            self._held[self._key()] = descriptor
            return True

    def release(self) -> None:
        """Open the lock.

        Its file stays: one that is deleted could be locked by a process that had opened it before, while the next one
        makes and locks a new file of that name.
        """
        with self._table_lock:
            descriptor = self._held.pop(self._key(), None)
            if descriptor is not None:
                os.close(descriptor)

    def keep(self) -> None:
        """Have the file look used: the cleaners of temporary folders delete what is days old."""
        for path in (self._path, self._path.with_name(_NAME)):
            with suppress(OSError):
                os.utime(path)

    def is_held(self) -> bool:
        """Return whether some process, this one or another, holds the lock. Never takes it."""
        with self._table_lock:
            if self._key() in self._held:
                return True
            try:
                descriptor = os.open(self._path, os.O_RDONLY)
            except FileNotFoundError:
                return False
            try:
                # Shared: those who look do not see each other.
                return not _lock(descriptor, fcntl.LOCK_SH, attempts=1)
            finally:
                os.close(descriptor)

    def holder(self) -> str:
        """Return who says in the file to hold the lock."""
        with self._table_lock:
            if self._key() in self._held:
                return f"this process ({os.getpid()})"
            try:
                note = json.loads(self._path.read_text())
                return f"process {note['pid']} since {note['since']}"
            except (OSError, ValueError, KeyError, TypeError):
                # It has only just taken it.
                return "another process"

    def _key(self) -> tuple[int, Path]:
        return os.getpid(), self._path


def locks_name(folder: Path) -> str:
    """Return a name for those who see the locks in ``folder``: two containers may share a host's name, and no lock."""
    path = folder / _NAME
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder)
        fresh = path.with_name(f"{_NAME}-{secrets.token_hex(8)}")
        fresh.write_text(secrets.token_hex(8))
        # Another process may be at it too: the first one's counts, and is whole as soon as it is there.
        with suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return path.read_text()


def _require_own(folder: Path) -> None:
    # Everybody may make a folder of that name in a common place, and lay links into it.
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(
            f"{folder}: expected a folder that only you may write to; remove it, or have its owner remove it"
        )


def _lock(descriptor: int, kind: int, attempts: int) -> bool:
    # A taker tries more than once: someone who only looks holds a shared lock for an instant.
    for _ in range(attempts):
        try:
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(0.02)
        else:
            return True
    return False
