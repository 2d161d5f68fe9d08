import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from sonosco_mlflow.console import console_log, stage_progress


def test_what_is_printed_is_kept_and_still_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streams = sys.stdout, sys.stderr
    for text in ("one", "two"):
        with console_log(tmp_path / "logs" / "console.log"):
            print(text)
            print("to stderr", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == streams
    assert (tmp_path / "logs" / "console.log").read_text() == "one\nto stderr\ntwo\nto stderr\n"
    assert capsys.readouterr().out == "one\ntwo\n"


def test_of_a_progress_bar_the_lines_above_it_and_its_last_state_are_kept(tmp_path: Path) -> None:
    with console_log(tmp_path / "console.log"):
        console = Console(force_terminal=True, width=60)
        with Progress(console=console, auto_refresh=False, transient=True) as bar:
            task = bar.add_task("training", total=3)
            for step in range(3):
                bar.update(task, advance=1, refresh=True)
                bar.console.print(f"step {step}")
    *lines, last = filter(None, (tmp_path / "console.log").read_text().splitlines())
    assert lines == ["step 0", "step 1", "step 2"]
    assert "100%" in last


def test_stages_are_counted_in_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress() as progress:
        for done in range(1, 4):
            progress("corpus", done, 3)
    assert capsys.readouterr().err == "corpus: 3 of 3\n"


PROGRAM = """
from sonosco_mlflow.console import stage_progress
with stage_progress() as progress:
    progress("recordings", 1, 2)
    print("a finding")
"""


def test_what_is_printed_beside_a_bar_goes_where_it_should() -> None:
    terminal, theirs = pty.openpty()
    try:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}
        )
        shown = os.read(terminal, 100_000)
    finally:
        os.close(theirs)
        os.close(terminal)
    assert result.stdout == b"a finding\n"
    assert b"recordings" in shown
