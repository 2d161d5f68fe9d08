"""The files of a run's code in one zip archive, whose bytes depend on the files alone."""

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path

from sonosco_mlflow.digests import file_digest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.imported_code import CODE
from sonosco_mlflow.tracking.repository import LARGEST_FILE
from sonosco_mlflow.tracking.secrecy import is_secret

_DATE = (1980, 1, 1, 0, 0, 0)


class Packing:
    """Files packed into an archive under their names; ``entries`` has the mode and sha256 of each."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.left_out: dict[str, tuple[int, str]] = {}
        self.withheld: list[str] = []
        self.entries: dict[str, tuple[int, str]] = {}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in sorted(files.items()):
                # Deleted and not committed; or a submodule, whose commit is part of the repository's own.
                if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
                    continue
                if is_secret(path):
                    self.withheld.append(name)
                    # A program with a token in it is code all the same; its digest gives nothing away.
                    if path.suffix in CODE:
                        self.entries[name] = self.left_out[name] = _kind(path), file_digest(path)
                    continue
                self.entries[name] = self._add(archive, path, name)
        self.archive = buffer.getvalue()

    def _add(self, archive: zipfile.ZipFile, path: Path, name: str) -> tuple[int, str]:
        kind = _kind(path)
        if path.lstat().st_size > LARGEST_FILE:
            self.left_out[name] = kind, file_digest(path)
            return self.left_out[name]
        content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()
        entry = zipfile.ZipInfo(os.fsencode(name).decode(errors="backslashreplace"), _DATE)
        # Of a name that is not UTF-8 the archive can have an image only.
        entry.comment = b"" if entry.filename == name else os.fsencode(name)
        entry.external_attr = kind << 16
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, content)
        return kind, hashlib.sha256(content).hexdigest()


def _kind(path: Path) -> int:
    """Return of a file's mode what counts: which kind of file it is, and the executable bit, as in git."""
    mode = path.lstat().st_mode
    return stat.S_IFMT(mode) | (0o755 if mode & stat.S_IXUSR else 0o644)


def archived_files(archive: bytes) -> dict[str, tuple[int, str]]:
    """Return mode and sha256 of each file in an archive."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        return {
            _name(entry): (entry.external_attr >> 16, hashlib.sha256(files.read(entry)).hexdigest())
            for entry in files.infolist()
        }


def archived_contents(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Return mode and content of each file in an archive."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        return {_name(entry): (entry.external_attr >> 16, files.read(entry)) for entry in files.infolist()}


def largest_files(archive: bytes, count: int) -> dict[str, int]:
    """Return what those files take of an archive that take most of it, in bytes."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        entries = sorted(files.infolist(), key=lambda entry: entry.compress_size, reverse=True)
    return {_name(entry): entry.compress_size for entry in entries[:count]}


def _name(entry: zipfile.ZipInfo) -> str:
    return os.fsdecode(entry.comment) if entry.comment else entry.filename


def unpack(archive: bytes, folder: Path) -> None:
    """Write the files of a snapshot into ``folder``, which is made; modes and links are what they were.

    Raises:
        UserError: a file of the archive would lie outside of ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = folder.resolve()
    links = {}
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for entry in files.infolist():
            path = _place(root, _name(entry))
            mode = entry.external_attr >> 16
            if stat.S_ISLNK(mode):
                links[_name(entry)] = os.fsdecode(files.read(entry))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files.read(entry))
            path.chmod(stat.S_IMODE(mode))
    # Last: no file is written through a link.
    for name, target in links.items():
        # Once more: one that stands by now may lead out of the folder.
        path = _place(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


def _place(root: Path, name: str) -> Path:
    """Return where a file of a snapshot belongs, inside of ``root``."""
    path = root / name
    if not path.resolve().is_relative_to(root):
        raise UserError(f"the code snapshot names '{name}', which leaves its folder; it was not made by us")
    return path
