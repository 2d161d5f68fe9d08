"""Is a killed and resumed training the same as an undisturbed one? Measured for peers and for sonosco_mlflow.

    python benchmarks/resume_peers.py [FOLDER]

Makes environments with uv, and for each row and column of the table trains three times, each in a process of its own:
undisturbed; killed by SIGKILL in the middle of an epoch, some steps after a checkpoint; and resumed from it. Compares
the bytes of the final weights and prints a Markdown table. A row that FOLDER holds from an earlier call is not measured
again.
"""

import argparse
import array
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SEGMENTS = Path(__file__).with_suffix("")
PYTHON = "3.11"
PINS = [
    "torch==2.11.0",
    "torchaudio==2.11.0",  # SpeechBrain's requirement, as a pair with torch
    "numpy==2.4.6",
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "speechbrain==1.1.2",
    "lightning==2.6.6",
    "torchdata==0.11.0",
]

# 25 steps an epoch, of which checkpoints at multiples of 5 are the same whether counted from the start or in the epoch.
SAMPLES, BATCH_SIZE, EPOCHS, CHECKPOINT_EVERY, KILL_AT = 100, 4, 3, 5, 38
STEPS = EPOCHS * SAMPLES // BATCH_SIZE
CHECKPOINT = (KILL_AT - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY


@dataclass(frozen=True)
class Row:
    title: str
    script: str
    variant: str = ""
    environment: str = "peers"


@dataclass(frozen=True)
class Column:
    title: str
    augment: bool
    workers: int
    workers_resumed: int


ROWS = [
    Row("Lightning", "with_lightning.py", "plain"),
    Row("Lightning, StatefulDataLoader", "with_lightning.py", "stateful"),
    Row("the same, generator saved by hand", "with_lightning.py", "by hand"),
    Row("Hugging Face Trainer", "with_transformers.py"),
    Row("SpeechBrain", "with_speechbrain.py"),
    Row("sonosco_mlflow, the peers' augmentation", "with_sonosco.py", "global", "sonosco"),
    Row("**sonosco_mlflow**", "with_sonosco.py", "keyed", "sonosco"),
]
COLUMNS = [
    Column("0 workers", False, 0, 0),
    Column("2 workers", False, 2, 2),
    Column("0 workers, augmentation", True, 0, 0),
    Column("2 workers, augmentation", True, 2, 2),
    Column("0, then 2 workers, augmentation", True, 0, 2),
]


class CaseError(Exception):
    """A case did not do what it says, so it has no result."""


# ---------------------------------------------------------------------- one training segment


def run_segment(
    row: Row, python: Path, folder: Path, augment: bool, workers: int, kill: bool = False, resume: bool = False
) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """Run one process of a training; return how it ended, and its log of steps."""
    name = "resumed" if resume else "killed" if kill else "undisturbed"
    folder.mkdir(parents=True, exist_ok=True)
    segment = {
        "variant": row.variant,
        "folder": str(folder),
        "name": name,
        "samples": SAMPLES,
        "batch_size": BATCH_SIZE,
        "epochs": EPOCHS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "workers": workers,
        "augment": augment,
        "resume": resume,
        "kill_at": KILL_AT if kill else None,
    }
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, **threads, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONHASHSEED": "0"}
    process = subprocess.Popen(
        [str(python), str(SEGMENTS / row.script), json.dumps(segment)],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        # A killed training leaves its loader's workers behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    log = folder / f"{name}.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors), steps


def expect(condition: bool, message: str, process: subprocess.CompletedProcess[str]) -> None:
    if not condition:
        output = process.stdout[-2000:] + process.stderr[-4000:]
        raise CaseError(f"{message}; exit status {process.returncode}\n{output}")


# ---------------------------------------------------------------------- one case


def compare(undisturbed: Path, resumed: Path) -> str:
    """Return ``equal``, or the largest absolute difference of the final weights."""
    one, other = undisturbed.read_bytes(), resumed.read_bytes()
    if one == other:
        return "equal"
    if len(one) != len(other):
        raise CaseError(f"{undisturbed} and {resumed} have different sizes")
    difference = max(abs(a - b) for a, b in zip(array.array("f", one), array.array("f", other), strict=True))
    return f"{difference:.2g}"


def samples_of_epoch(before: Sequence[dict], after: Sequence[dict]) -> tuple[int, int]:
    """Return how many samples the interrupted epoch trained on again, and how many never, in the resumed training."""
    epoch = before[-1]["epoch"]
    steps = [step for step in before if step["step"] <= CHECKPOINT] + list(after)
    trained = [identity for step in steps if step["epoch"] == epoch for identity in step["ids"]]
    return len(trained) - len(set(trained)), SAMPLES - len(set(trained))


def measure(row: Row, python: Path, folder: Path) -> dict[str, str]:
    """Return the cells of a row by the columns' titles."""
    cells: dict[str, str] = {}
    for column in COLUMNS:
        base = folder / f"{'augmented' if column.augment else 'plain'}-{column.workers}"
        undisturbed = base / "undisturbed"
        if not undisturbed.exists():
            train_undisturbed_and_killed(row, column, python, base)
        resumed = base / f"resumed-{column.workers_resumed}"
        shutil.copytree(base / "killed", resumed)
        process, steps = run_segment(row, python, resumed, column.augment, column.workers_resumed, resume=True)
        if process.returncode != 0 and column.workers_resumed != column.workers:
            cells[column.title] = "refused"
            print(f"{row.title} | {column.title} | refused:\n{process.stderr[-4000:]}", file=sys.stderr, flush=True)
            continue
        expect(process.returncode == 0, f"{resumed}: could not resume", process)
        expect(
            steps[0]["step"] == CHECKPOINT + 1,
            f"{resumed}: went on at step {steps[0]['step']}, expected {CHECKPOINT + 1}",
            process,
        )
        expect(steps[-1]["step"] == STEPS, f"{resumed}: ended at step {steps[-1]['step']}, expected {STEPS}", process)
        cell = compare(undisturbed / "undisturbed.weights", resumed / "resumed.weights")
        before = [json.loads(line) for line in (base / "killed" / "killed.jsonl").read_text().splitlines()]
        repeated, unseen = samples_of_epoch(before, steps)
        cells[column.title] = cell + (f"; {repeated} repeated, {unseen} never seen" if repeated or unseen else "")
        print(f"{row.title} | {column.title} | {cells[column.title]}", file=sys.stderr, flush=True)
    return cells


def train_undisturbed_and_killed(row: Row, column: Column, python: Path, base: Path) -> None:
    process, whole = run_segment(row, python, base / "undisturbed", column.augment, column.workers)
    expect(process.returncode == 0, f"{base}: the undisturbed training failed", process)
    expect([step["step"] for step in whole] == list(range(1, STEPS + 1)), f"{base}: not {STEPS} steps", process)
    process, steps = run_segment(row, python, base / "killed", column.augment, column.workers, kill=True)
    expect(process.returncode == -signal.SIGKILL, f"{base}: was not killed", process)
    expect(steps[-1]["step"] == KILL_AT, f"{base}: killed at step {steps[-1]['step']}, expected {KILL_AT}", process)
    # Were this not so, the training could not be repeated at all, and a difference would say nothing about resuming.
    expect(steps == whole[:KILL_AT], f"{base}: two equal trainings differ before the kill", process)


# ---------------------------------------------------------------------- all of it


def make_environment(folder: Path, requirements: Sequence[str]) -> Path:
    """Return the interpreter of a new environment with ``requirements``."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", PYTHON, str(folder)], check=True)
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", str(python), *requirements], check=True)
    return python


def table(results: dict[str, dict[str, str]]) -> str:
    lines = ["| | " + " | ".join(column.title for column in COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {title} | " + " | ".join(cells[c.title] for c in COLUMNS) + " |" for title, cells in results.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="keeps environments and results; by default a new one")
    folder = (parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="resume-peers-"))).resolve()
    pythons = {
        "peers": make_environment(folder / "environment-peers", PINS),
        "sonosco": make_environment(folder / "environment-sonosco", ["-r", str(REPOSITORY / "requirements.txt")]),
    }
    results: dict[str, dict[str, str]] = {}
    for number, row in enumerate(ROWS):
        trainings = folder / f"row-{number}"
        measured = trainings / "cells.json"
        if not measured.exists():
            shutil.rmtree(trainings, ignore_errors=True)
            cells = measure(row, pythons[row.environment], trainings)
            measured.write_text(json.dumps(cells, indent=2) + "\n")
        results[row.title] = json.loads(measured.read_text())
    print(table(results))
    print(f"\nPython {PYTHON}, {', '.join(pin.replace('==', ' ') for pin in PINS)}; CPU, one thread.")


if __name__ == "__main__":
    main()
