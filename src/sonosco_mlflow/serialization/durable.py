"""Writing files so that they survive a crash: the one place that writes, syncs, renames and removes.

A file written here either stands under its name, whole and on the disk, or does not stand there at all. Every
operation goes through a function of ``os`` in this module, so that a test can make any of them fail, or the process
die at it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to the file ``path`` and sync it; its name is durable once its directory is synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with _naming(path):
            _write_all(descriptor, content)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors of an open file name it: the system knows it by a number only."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        # The system may take less than it was given.
        rest = rest[os.write(descriptor, rest) :]


def sync_directory(directory: Path) -> None:
    """Sync the names in ``directory`` to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with _naming(directory):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make ``directory`` and what is missing above it, durably."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    try:
        os.mkdir(directory)
    except FileExistsError:
        # Another process may have made it meanwhile; a file of that name is something else.
        if not directory.is_dir():
            raise
    sync_directory(directory.parent)


def rename(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target`` in one step, durably; a file of that name is replaced."""
    os.replace(source, target)
    sync_directory(target.parent)


def replace_bytes(path: Path, content: bytes) -> None:
    """Replace the content of ``path`` in one step: a reader sees the old content or the new, never a mixture."""
    partial = path.with_name(path.name + ".partial")
    write_bytes(partial, content)
    rename(partial, path)


def remove_directory(directory: Path) -> None:
    """Remove ``directory`` so that it never stands half-removed under its own name."""
    doomed = directory.with_name(f".removing-{directory.name}")
    rename(directory, doomed)
    clear_directory(doomed)


def clear_directory(directory: Path) -> None:
    """Remove a directory that nobody reads any more, and all that is in it; of a link, not what it leads to."""
    if directory.is_symlink():
        os.unlink(directory)
        return
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            clear_directory(entry)
        else:
            os.unlink(entry)
    os.rmdir(directory)


class AppendedFile:
    """A file that only grows. What was appended survives the death of this process; once synced, that of the machine.

    Args:
        path: the file; it is made if need be.
    """

    def __init__(self, path: Path) -> None:
        make_directory(path.parent)
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            sync_directory(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, content: bytes) -> None:
        """Append ``content``, whole or, where that fails, nothing."""
        length = os.lseek(self._descriptor, 0, os.SEEK_END)
        with _naming(self._path):
            try:
                _write_all(self._descriptor, content)
            except OSError:
                os.ftruncate(self._descriptor, length)
                raise

    def sync(self) -> None:
        """Return when all that was appended is on the disk."""
        with _naming(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
