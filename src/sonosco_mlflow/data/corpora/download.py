"""Fetch one file over HTTP so that a broken line costs only what had not arrived yet.

The whole file goes to the user's cache under its final name; what has arrived so far lies beside it as
``.part`` and is continued by a range request.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urldefrag, urlsplit

from sonosco_mlflow.data.corpora.base import Progress
from sonosco_mlflow.errors import UserError

_ATTEMPTS = 4
_PIECE = 1 << 18
_TIMEOUT = 60.0  # seconds without a byte


def download(address: str, progress: Progress) -> Path:
    """Return the local copy of ``address``, fetched if it is not in the cache; a part of it is continued.

    Args:
        address: An ``http`` or ``https`` address; it may end in ``#sha256=<hexadecimal digest>``.
        progress: Called with (bytes here, bytes in all).

    Raises:
        UserError: another scheme or fragment, the server cannot be reached or refuses, or the digest differs.
    """
    location, fragment = urldefrag(address)
    if urlsplit(location).scheme not in ("http", "https"):
        raise UserError(f"data.source: found {address!r}. Expected an http or https address, or a local path.")
    expected = fragment.removeprefix("sha256=").lower()
    if fragment and (not fragment.startswith("sha256=") or len(expected) != 64):
        raise UserError(f"data.source: found '#{fragment}'. Expected '#sha256=' and 64 hexadecimal digits.")
    name = PurePosixPath(urlsplit(location).path).name or "download"
    target = _cache_folder() / f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        _fetch(location, part, progress)
        _check(part, expected, address)
        part.replace(target)
    return target


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sonosco-mlflow"


def _fetch(location: str, part: Path, progress: Progress) -> None:
    """Ask for the rest until the file is whole, giving up after a few attempts that ended early."""
    reason: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            if _fetch_rest(location, part, progress):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UserError(
                    f"{location}: the server answered {error.code} {error.reason}. Check the address, or "
                    "give a local archive or folder as the source."
                ) from error
            reason = error
        except (OSError, http.client.HTTPException) as error:
            reason = error
    here = part.stat().st_size if part.exists() else 0
    raise UserError(
        f"{location}: could not be downloaded ({reason or 'the connection ended early'}); {here} bytes are "
        "here. Try again, it goes on from there, or give a local archive or folder as the source."
    ) from reason


def _fetch_rest(location: str, part: Path, progress: Progress) -> bool:
    """Append what is missing; return whether the file is whole."""
    here = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(location, headers={"Range": f"bytes={here}-"} if here else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not here:
            raise
        if error.headers.get("Content-Range") == f"bytes */{here}":
            return True  # it was stopped between the last byte and the renaming
        part.unlink()
        return False
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            here = 0  # the server sends the file from its first byte
        length = response.headers.get("Content-Length")
        total = here + int(length) if length else 0
        with part.open("ab" if here else "wb") as file:
            # read1 hands over what is there: bytes before a broken connection are not lost with it.
            while piece := response.read1(_PIECE):
                file.write(piece)
                here += len(piece)
                progress(here, max(total, here))
    return not total or here == total


def _check(part: Path, expected: str, address: str) -> None:
    if not expected:
        return
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        part.unlink()
        raise UserError(
            f"{address}: the sha256 of what arrived is {found}, so it was deleted. Check the address and the digest."
        )
