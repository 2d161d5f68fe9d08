"""A web server on this machine that sends files, and does so as badly as a test wants it to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread


@dataclass
class Faults:
    """What goes wrong, and how many answers it goes wrong for (-1: all).

    Attributes:
        cut: How many answers end early, after ``limit`` bytes.
        errors: How many answers are ``error`` instead.
        length_error: Is added to each Content-Length.
        ignores_ranges: The whole file is sent, whatever was asked for.
        ignores_if_range: The rest is sent although the file is another one.
        wrong_start: A 206 begins a byte too early, and says so.
        on_answer: Is called before each answer.
    """

    cut: int = 0
    limit: int = 500
    errors: int = 0
    error: int = 500
    length_error: int = 0
    ignores_ranges: bool = False
    ignores_if_range: bool = False
    wrong_start: bool = False
    on_answer: Callable[[], None] = lambda: None


@dataclass
class FileServer:
    """What a server sends: bytes by path, with an ETag or a date each where there is one, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)
    port: int = 0

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    @property
    def ranges(self) -> list[str | None]:
        return [ranges for _, ranges in self.asked]

    @contextmanager
    def running(self) -> Iterator["FileServer"]:
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self)) as server:
            self.port = server.server_port
            thread = Thread(target=partial(server.serve_forever, poll_interval=0.01))
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, server: FileServer, *arguments: object) -> None:
        self.store = server
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        store, faults = self.store, self.store.faults
        asked = self.headers.get("Range")
        with store.lock:
            store.asked.append((self.path, asked))
            faults.on_answer()
            is_error, faults.errors = bool(faults.errors), max(faults.errors - 1, min(faults.errors, 0))
            is_cut, faults.cut = bool(faults.cut), max(faults.cut - 1, min(faults.cut, 0))
        content, tag = store.files.get(self.path), store.tags.get(self.path)
        if is_error or content is None:
            self.send_error(faults.error if content is not None else 404)
            return
        condition = self.headers.get("If-Range")
        changed = condition is not None and condition != tag and not faults.ignores_if_range
        start = 0 if asked is None or changed or faults.ignores_ranges else int(asked[len("bytes=") : -1])
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        start -= faults.wrong_start and start > 0
        rest = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        # RFC 9110, 15.3.7: a 206 that answers an If-Range leaves dates away.
        if tag and tag.endswith('"'):
            self.send_header("ETag", tag)
        elif tag and not start:
            self.send_header("Last-Modified", tag)
        self.send_header("Content-Length", str(len(rest) + faults.length_error))
        self.end_headers()
        self.wfile.write(rest[: faults.limit] if is_cut else rest)

    def log_message(self, *message: object) -> None:
        """Say nothing."""
