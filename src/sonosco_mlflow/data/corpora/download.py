"""Fetches files over HTTP so that a broken line costs only what had not arrived yet.

A whole file goes to the user's cache under its final name. What has arrived so far lies beside it as ``.part``, with
a note of which version of the file it belongs to, and is continued by a range request. Parts of two versions are never
put together: the server is asked for the rest only if the file is still the same, and its answer is checked.
"""

import fcntl
import hashlib
import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.message import Message
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urldefrag, urlsplit

from sonosco_mlflow.data.corpora.base import Progress
from sonosco_mlflow.errors import UserError

_TOGETHER = 4
_ATTEMPTS = 4  # in a row that bring nothing new
_PAUSE = 1.0  # seconds before the second of these; each next one is twice as long
_PIECE = 1 << 18
_TIMEOUT = 60.0  # seconds without a byte
_DIGESTS = {"sha256": 64, "md5": 32}
_ASK_AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


def download(address: str, progress: Progress) -> Path:
    """Return the local copy of ``address``, fetched if it is not in the cache; see :func:`download_all`."""
    return download_all([address], progress)[0]


def download_all(addresses: Sequence[str], progress: Progress) -> list[Path]:
    """Return the local copies of ``addresses``, a few of which are fetched at once; what is in the cache is not.

    Args:
        addresses: ``http`` or ``https`` addresses; each may end in ``#sha256=<hexadecimal digest>`` or ``#md5=...``.
        progress: Called with (bytes here, bytes in all) of all of them, as far as their sizes are known.

    Raises:
        UserError: another scheme or fragment, a server cannot be reached or refuses, or a digest differs. What has
            arrived until then is kept, and the next call goes on from there.
    """
    wanted = [_Wanted.read(address) for address in dict.fromkeys(addresses)]
    missing = [file for file in wanted if not file.target.exists()]
    tally = _Tally([file.address for file in missing], progress)
    with ThreadPoolExecutor(max_workers=_TOGETHER) as pool:
        tasks = [pool.submit(_bring, file, tally) for file in missing]
        try:
            for task in as_completed(tasks):
                task.result()
        except BaseException:
            tally.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [_Wanted.read(address).target for address in addresses]


def download_page(address: str, progress: Progress) -> str:
    """Return the text of a page as it is now; no copy is kept.

    Raises:
        UserError: as :func:`download_all`; or the page has no end, so that links may be missing.
    """
    _Wanted.read(address).target.unlink(missing_ok=True)
    path = download(address, progress)
    text = path.read_text(encoding="utf-8", errors="replace")
    path.unlink()
    if "</html>" not in text.lower():
        raise UserError(f"{address}: the page ends without </html>, so some of it may be missing. Try again.")
    return text


def has_digest(address: str) -> bool:
    """Return whether ``address`` ends in a digest, which vouches for what is fetched."""
    return bool(urldefrag(address).fragment)


@dataclass(frozen=True, slots=True)
class _Wanted:
    address: str
    location: str
    algorithm: str  # empty: no digest is known
    digest: str
    target: Path

    @classmethod
    def read(cls, address: str) -> "_Wanted":
        location, fragment = urldefrag(address)
        if urlsplit(location).scheme not in ("http", "https"):
            raise UserError(f"data.source: found {address!r}. Expected an http or https address, or a local path.")
        algorithm, _, digest = fragment.lower().partition("=")
        if fragment and (len(digest) != _DIGESTS.get(algorithm) or not set(digest) <= set("0123456789abcdef")):
            raise UserError(
                f"data.source: found '#{fragment}'. Expected '#sha256=' and 64, or '#md5=' and 32 hexadecimal digits."
            )
        name = PurePosixPath(urlsplit(location).path).name or "download"
        target = _cache_folder() / f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"
        return cls(address, location, algorithm, digest, target)


@dataclass(frozen=True, slots=True)
class _Version:
    """What a server says of the file that it sends: by these, another one is noticed."""

    validator: str | None  # a strong ETag, or the date of the last change
    total: int | None  # bytes

    @classmethod
    def of(cls, headers: Message, total: int | None) -> "_Version":
        tag = headers.get("ETag")
        strong = tag if tag and not tag.startswith("W/") else None
        return cls(strong or headers.get("Last-Modified"), total)

    @classmethod
    def noted(cls, part: Path) -> "_Version | None":
        try:
            return cls(**json.loads(_note(part).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def note(self, part: Path) -> None:
        partial = part.with_name(f"{part.name}.note.partial")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(_note(part))


class _Tally:
    """Adds up how far several downloads are, and stops them all once one has failed."""

    def __init__(self, addresses: Sequence[str], progress: Progress) -> None:
        self.stopped = threading.Event()
        self._progress = progress
        self._lock = threading.Lock()
        # Of what no size is known, more is to come than is here.
        self._bytes = dict.fromkeys(addresses, (0, 1))
        self._here, self._total = 0, len(self._bytes)

    def count(self, address: str, here: int, total: int | None) -> None:
        with self._lock:
            if self.stopped.is_set():
                raise UserError(f"{address}: stopped, because another download failed.")
            counted = self._bytes[address]
            self._bytes[address] = here, here + 1 if total is None else max(total, here)
            self._here += here - counted[0]
            self._total += self._bytes[address][1] - counted[1]
            self._progress(self._here, self._total)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sonosco-mlflow"


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.note")


def _bring(wanted: _Wanted, tally: _Tally) -> None:
    wanted.target.parent.mkdir(parents=True, exist_ok=True)
    part = wanted.target.with_name(f"{wanted.target.name}.part")
    with _alone_with(part) as file:
        # Another process may have fetched it meanwhile.
        if wanted.target.exists():
            part.unlink()
            return
        _fetch(wanted, part, file, tally)
        _check(wanted, part)
        os.fsync(file.fileno())
        part.replace(wanted.target)
        _note(part).unlink(missing_ok=True)


@contextmanager
def _alone_with(part: Path) -> Iterator[IO[bytes]]:
    """Open ``part`` for appending, when no other process or thread has it open."""
    while True:
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, part):
                yield file
                return


def _is_at(file: IO[bytes], part: Path) -> bool:
    """Return whether ``file`` still is what ``part`` names: whoever had it before may have renamed or deleted it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), part.stat())
    except FileNotFoundError:
        return False


def _fetch(wanted: _Wanted, part: Path, file: IO[bytes], tally: _Tally) -> None:
    """Ask for the rest until the file is whole, giving up after a few attempts in a row that brought nothing new."""
    reason: Exception | None = None
    most = part.stat().st_size
    idle = 0
    while idle < _ATTEMPTS:
        if idle:
            tally.stopped.wait(_PAUSE * 2 ** (idle - 1))
        try:
            if _fetch_rest(wanted, part, file, tally):
                return
            reason = None
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in _ASK_AGAIN:
                raise UserError(
                    f"{wanted.location}: the server answered {error.code} {error.reason}. Check the address, or "
                    "give a local archive or folder as the source."
                ) from error
            reason = error
        except (OSError, http.client.HTTPException) as error:
            reason = error
        here = part.stat().st_size
        idle = 0 if here > most else idle + 1
        most = max(most, here)
    raise UserError(
        f"{wanted.location}: could not be downloaded ({reason or 'the connection ended early, or the file changed'}); "
        f"{part.stat().st_size} bytes are here. Try again, it goes on from there, or give a local archive or folder as "
        "the source."
    ) from reason


def _fetch_rest(wanted: _Wanted, part: Path, file: IO[bytes], tally: _Tally) -> bool:
    """Append what is missing; return whether the file is whole. What may be of another version is dropped."""
    here = part.stat().st_size
    noted = _Version.noted(part) or _Version(None, None)
    if here and not noted.validator and not wanted.digest:
        # Nothing would tell that the rest belongs to it.
        here = _restart(file)
    request = urllib.request.Request(wanted.location)
    if here:
        request.add_header("Range", f"bytes={here}-")
        if noted.validator:
            request.add_header("If-Range", noted.validator)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not here:
            raise
        error.close()
        _, total = _content_range(error.headers)
        if total == here and noted.total in (None, here):
            return True  # it was stopped between the last byte and the renaming
        _restart(file)
        return False
    with response:
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            start, total = _content_range(response.headers)
            version = _Version.of(response.headers, total)
            if start != here or not _same(version, noted):
                _restart(file)
                return False
        elif response.status == HTTPStatus.OK:
            here = _restart(file)  # the server sends the file from its first byte
            length = response.headers.get("Content-Length", "")
            version = _Version.of(response.headers, int(length) if length.isdecimal() else None)
            version.note(part)
        else:
            raise UserError(f"{wanted.location}: the server answered {response.status}. Expected 200 or 206.")
        total = noted.total if version.total is None and here else version.total
        try:
            # read1 hands over what is there: bytes before a broken connection are not lost with it.
            while piece := response.read1(_PIECE):
                file.write(piece)
                here += len(piece)
                tally.count(wanted.address, here, total)
        finally:
            file.flush()
    return total is None or here == total


def _restart(file: IO[bytes]) -> int:
    file.truncate(0)
    return 0


def _content_range(headers: Message) -> tuple[int | None, int | None]:
    """Return the first byte and the size of the whole, as a server says them."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    start, total = match.groups() if match else (None, None)
    return (int(start) if start else None), (int(total) if total and total.isdecimal() else None)


def _same(found: _Version, noted: _Version) -> bool:
    """Return whether the rest that a server sends is of the version that is here already."""
    if found.validator != noted.validator and (found.validator or (noted.validator or "").startswith('"')):
        # Of these two, only a date may be left away where a rest is sent.
        return noted.validator is None
    return found.total == noted.total or None in (found.total, noted.total)


def _check(wanted: _Wanted, part: Path) -> None:
    if not wanted.digest:
        return
    with part.open("rb") as file:
        found = hashlib.file_digest(file, wanted.algorithm).hexdigest()
    if found != wanted.digest:
        part.unlink()
        _note(part).unlink(missing_ok=True)
        raise UserError(
            f"{wanted.address}: the {wanted.algorithm} of what arrived is {found}, so it was deleted. Check the "
            "address and the digest."
        )
