import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sonosco_mlflow.processes import run_interruptibly

SAVES = """
import sys, time
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    open("saved", "w").write("state")
    sys.exit(130)
"""


def test_what_a_process_prints_and_how_it_ends_come_back(tmp_path: Path) -> None:
    program = "import os, sys; print(os.environ['X'], os.getcwd()); sys.exit(3)"
    ended = run_interruptibly([sys.executable, "-c", program], tmp_path, {"X": "y"}, subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (3, f"y {tmp_path}\n")


def test_an_interrupt_is_passed_on_and_what_is_saved_is_waited_for(tmp_path: Path) -> None:
    # A shell has what it runs in the background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # To this thread, whose waiting it breaks off.
        threading.Timer(1.5, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            run_interruptibly([sys.executable, "-c", SAVES], tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").read_text() == "state"
