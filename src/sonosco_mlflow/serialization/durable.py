"""Writing files so that they survive a crash: the one place that writes, syncs and renames.

A file written here either stands under its name, whole and on the disk, or does not stand there at all.
"""

import os
import shutil
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to a new file and sync it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Sync the names in ``directory`` to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target`` in one step, durably; a file of that name is replaced."""
    source.replace(target)
    sync_directory(target.parent)


def replace_bytes(path: Path, content: bytes) -> None:
    """Replace the content of ``path`` in one step: a reader sees the old content or the new, never a mixture."""
    partial = path.with_name(path.name + ".partial")
    write_bytes(partial, content)
    rename(partial, path)


def replace_directory(source: Path, target: Path) -> None:
    """Give the directory ``source`` the name ``target``; a directory of that name is removed, once it is superseded."""
    superseded = target.with_name(f".removing-{target.name}")
    if target.exists():
        rename(target, superseded)
    rename(source, target)
    shutil.rmtree(superseded, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Remove ``directory`` so that it never stands half-removed under its own name."""
    doomed = directory.with_name(f".removing-{directory.name}")
    rename(directory, doomed)
    shutil.rmtree(doomed)
