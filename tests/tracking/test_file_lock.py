"""Locks between processes, and a stage whose DVC is gone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sonosco_mlflow.tracking.file_lock import locked

SOURCES = str(Path(__file__).parents[2] / "src")
HOLDS = """
import sys, time
from pathlib import Path
from sonosco_mlflow.tracking.file_lock import stage_of_dvc
with stage_of_dvc("features@tones", Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""
STARTS_AND_WAITS = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {HOLDS!r}, sys.argv[1]])
"""


class HadToWait(Exception):
    pass


def refuse() -> None:
    raise HadToWait


def test_a_stage_ends_with_the_process_that_has_started_it_and_another_goes_on(tmp_path: Path) -> None:
    lock = tmp_path / ".sonosco" / "locks" / "features@tones.lock"
    command = [sys.executable, "-c", STARTS_AND_WAITS, str(tmp_path)]
    with subprocess.Popen(command, env={"PYTHONPATH": SOURCES}, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "held\n"
        with pytest.raises(HadToWait), locked(lock, refuse):
            pass
        parent.kill()
    began = time.monotonic()
    with locked(lock):
        pass
    # By itself it would have let go after a minute.
    assert time.monotonic() - began < 30


def test_who_finds_a_lock_free_is_not_told_to_wait(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "new" / "file.lock", refuse):
            pass
