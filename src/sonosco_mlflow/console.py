"""What a person sees of a long command: its progress, and all that it printed, kept in a file as well."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0
# Colours and cursor movements of a terminal.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class _Tee:
    """A stream that writes to another one, and to a file the lines that would remain standing in a terminal."""

    def __init__(self, stream: TextIO, file: TextIO, clean: Callable[[str], str]) -> None:
        self.stream = stream
        self._file = file
        self._clean = clean
        self._line = ""

    def write(self, text: str) -> int:
        for part in re.split("([\r\n])", _CONTROL.sub("", text).replace("\r\n", "\n")):
            # One that outlives its block, in the hands of another, has no file any more.
            if part == "\n" and not self.has_ended:
                self._file.write(self._clean(self._line) + "\n")
            # A carriage return lets the next text overwrite the line, as a progress bar does.
            self._line = "" if part in ("\r", "\n") else self._line + part
        return self.stream.write(text)

    @property
    def has_ended(self) -> bool:
        """Whether its file is closed."""
        return self._file.closed

    def flush(self) -> None:
        if not self.has_ended:
            self._file.flush()
        self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def _living(stream: TextIO) -> TextIO:
    """Return the stream, or, where its block has ended meanwhile, what it writes to."""
    while isinstance(stream, _Tee) and stream.has_ended:
        stream = stream.stream
    return stream


def say(text: str) -> None:
    """Print to stderr, wherever it leads: a reader that has gone away is no reason to leave work undone."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr)


@contextmanager
def console_log(path: Path, clean: Callable[[str], str] = str) -> Iterator[None]:
    """Append to ``path`` what Python prints to stdout and stderr inside the block, without control codes.

    ``clean`` returns what is to stand there of a line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = sys.stdout, sys.stderr
    with path.open("a", encoding="utf-8") as file:
        tees = _Tee(streams[0], file, clean), _Tee(streams[1], file, clean)
        sys.stdout, sys.stderr = tees
        try:
            yield
        finally:
            # Another block may have begun inside, and not have ended yet.
            if sys.stdout is tees[0]:
                sys.stdout = _living(streams[0])
            if sys.stderr is tees[1]:
                sys.stderr = _living(streams[1])


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far several counted stages are: bars in a terminal, a line every few seconds elsewhere.

    Yields:
        A function of (what is made, how many are done, how many there are).
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Above the bars in a terminal; what goes to a file is none of theirs.
    with Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty()) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _progress_lines() -> Callable[[str, int, int], None]:
    shown_at = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal shown_at
        if done == total or time.monotonic() - shown_at > SECONDS_BETWEEN_LINES:
            shown_at = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return show
