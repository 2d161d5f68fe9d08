"""Reads files of a corpus out of a folder, a tar or a zip archive, one after the other.

Nothing is unpacked blindly. Only regular files whose name is wanted are looked at, no name of an archive becomes a
path by itself, no more is read of a file than its header says, and an archive that is cut off or damaged is told from
a whole one: by the checksums of gzip, bzip2, xz and zip, by headers of tar, and by the mark at its end.

>>> for member in members(Path("an4.tar.gz"), re.compile(r"etc/(.*)$"), "AN4"):  # doctest: +SKIP
...     print(member.match[1], len(member.read()))
"""

import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sonosco_mlflow.data.walking import files_below
from sonosco_mlflow.errors import UserError

PLAIN_NAME = r"(?!\.)[^/\\\x00-\x1f\x7f]+"
"""A pattern of names that stay in their folder, and that are not hidden."""
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip", ".tar.xz", ".tar.bz2")

_PIECE = 1 << 20
_LARGEST_IN_MEMORY = 1 << 30
_ZIP_BEGINNINGS = (b"PK\x03\x04", b"PK\x05\x06")
_UNDER_A_PASSWORD = 1
_LARGEST_EXTENSION = 1 << 20
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    NotImplementedError,  # a compression that zipfile does not know
)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file whose name was wanted; one of an archive must be read before the next one is asked for.

    Attributes:
        match: The match of its name.
        place: How to name it in a message.
        path: Where it lies; None in an archive.
    """

    match: re.Match[str]
    place: str
    path: Path | None
    _size: int
    _source: Path
    _open: Callable[[], IO[bytes]]

    def read(self) -> bytes:
        """Return its content.

        Raises:
            UserError: it is damaged, or larger than anything that is read as a whole.
        """
        if self._size > _LARGEST_IN_MEMORY:
            raise UserError(f"{self.place}: holds {self._size} bytes. Expected at most {_LARGEST_IN_MEMORY}.")
        return b"".join(self._pieces())

    def lay(self, path: Path) -> Path:
        """Return where its bytes lie: in a folder where they always did, from an archive at ``path``.

        Raises:
            UserError: it is damaged, or cannot be written.
        """
        if self.path is not None:
            return self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        except OSError as error:
            raise _unwritable(path, error) from error
        with file:
            for piece in self._pieces():
                try:
                    file.write(piece)
                except OSError as error:
                    raise _unwritable(path, error) from error
        return path

    def text(self) -> str:
        """Return its content, which is UTF-8.

        Raises:
            UserError: it is not, or it is damaged.
        """
        try:
            return self.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.place}: found bytes that are not UTF-8 at offset {error.start}. Expected UTF-8."
            ) from error

    def _pieces(self) -> Iterator[bytes]:
        left = self._size
        with _damage_named(self._source):
            with self._open() as file:
                # What zip and gzip sum up is compared when the end is read.
                while piece := file.read(_PIECE):
                    left -= len(piece)
                    if left < 0:
                        break
                    yield piece
            if left:
                raise EOFError(f"{self.place} has another length than its header says")


def members(source: Path, wanted: re.Pattern[str], expected: str) -> Iterator[Member]:
    """Yield each regular file of a folder or archive whose name is ``wanted``; names begin with the folder's own.

    An archive is read to its end, so that one that is cut off is noticed although nothing in it was wanted.

    Args:
        source: A folder, or an archive: tar, with any of gzip, bzip2 and xz or without, or zip.
        wanted: Searched for in the names, whose folders are separated by "/".
        expected: What the source should be, for a message.

    Raises:
        UserError: there is no such source, or it is damaged; then it is said what to do.
    """
    if source.is_dir():
        yield from _of_folder(source, wanted)
    elif not source.is_file():
        raise UserError(
            f"data.source: {source} is not there. Expected {expected}, as a folder or an archive "
            f"({', '.join(ARCHIVE_SUFFIXES)})."
        )
    elif _is_zip(source):
        yield from _of_zip(source, wanted)
    else:
        yield from _of_tar(source, wanted)


def archives_in(folder: Path) -> list[Path]:
    """Return the archives that lie in ``folder`` itself, sorted."""
    return sorted(path for path in folder.iterdir() if is_archive(path))


def is_archive(path: Path) -> bool:
    """Return whether ``path`` is a file with the name of an archive."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES) and not path.name.startswith(".") and path.is_file()


def _of_folder(source: Path, wanted: re.Pattern[str]) -> Iterator[Member]:
    root = source.resolve()
    for path in files_below(root):
        match = wanted.search(path.relative_to(root.parent).as_posix())
        if match:
            yield Member(match, str(path), path, path.stat().st_size, source, _opener(path))


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def _of_zip(source: Path, wanted: re.Pattern[str]) -> Iterator[Member]:
    with _damage_named(source), zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            match = wanted.search(member.filename)
            if match and not member.is_dir() and kind in (0, stat.S_IFREG):
                place = f"{source}: {member.filename}"
                if member.flag_bits & _UNDER_A_PASSWORD:
                    raise UserError(f"{place}: is under a password. Unpack the archive and give the folder.")
                yield Member(match, place, None, member.file_size, source, _zip_opener(archive, member))


def _zip_opener(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: archive.open(member)


def _of_tar(source: Path, wanted: re.Pattern[str]) -> Iterator[Member]:
    with _damage_named(source), tarfile.open(source, tarinfo=_StrictHeader) as archive:
        for member in archive:
            # Bytes of a name that are no UTF-8 would be refused wherever it is written.
            name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            match = wanted.search(name)
            # A sparse file may be large with nothing in it.
            if match and member.isreg() and not member.issparse():
                yield Member(match, f"{source}: {name}", None, member.size, source, _tar_opener(archive, member))
        # The sum over all that gzip and others hold is compared only where the last byte is read.
        while archive.fileobj is not None and archive.fileobj.read(_PIECE):
            pass


def _tar_opener(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        file = archive.extractfile(member)
        if file is None:
            raise tarfile.ReadError(f"{member.name} is no regular file")
        return file

    return opened


class _StrictHeader(tarfile.TarInfo):
    """A header of a member. One that is damaged or absent is an error, and not the end of the archive as elsewhere."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # a block of zeros: the mark at the end of a whole archive
            raise tarfile.ReadError(str(error) if buf else "it ends without the mark of an archive's end") from error
        # Those that extend the next header are read into memory.
        largest = header.size if header.isreg() else _LARGEST_EXTENSION
        if not 0 <= header.size <= largest:
            raise tarfile.ReadError(f"{header.name}: a header says that it holds {header.size} bytes")
        return header


@contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    kind = "file" if source.is_dir() else "zip archive" if _is_zip(source) else "tar archive"
    try:
        yield
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0].rstrip(":")  # tarfile lists all that it has tried
        raise UserError(
            f"{source}: cannot be read as a {kind} ({reason}). It is damaged or was not copied to its end: delete it "
            "and fetch it anew."
        ) from error


def _is_zip(source: Path) -> bool:
    with source.open("rb") as file:
        return file.read(4) in _ZIP_BEGINNINGS


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror or error}).")
