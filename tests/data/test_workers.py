"""Worker processes: who obeys signals, who ends with whom, what is shared, and what there may be too little of."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from sonosco_mlflow.data.manifest import Manifest, Utterance
from toy import batch_digest, tone_loader

PATIENCE = 60.0


@pytest.fixture
def workers() -> Callable[[], list[int]]:
    """What tells which processes this one has begun since: another test's may have left some for all of them."""
    before = psutil.Process().children()
    return lambda: [child.pid for child in psutil.Process().children() if child not in before]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_it_to_the_main_process_to_obey_a_signal(
    number: signal.Signals, tone_manifest: Manifest, workers: Callable[[], list[int]]
) -> None:
    expected = [batch_digest(batch) for batch in tone_loader(tone_manifest).epoch(0)]
    batches = tone_loader(tone_manifest, workers=2).epoch(0)
    found = [batch_digest(next(batches))]
    assert len(workers()) == 2
    # By another process, as a terminal or a scheduler sends it.
    subprocess.run(["kill", f"-{int(number)}", *map(str, workers())], check=True)
    found.extend(batch_digest(batch) for batch in batches)
    assert found == expected
    assert not workers()


HOLDING = """
import sys
from pathlib import Path
from sonosco_mlflow.data.manifest import Manifest, Utterance
from toy import tone_loader

batches = tone_loader(Manifest.read(Path(sys.argv[1])), workers=2).epoch(0)
next(batches)
print("loading", flush=True)
sys.stdin.read()
"""


def end_of_input(program: "subprocess.Popen[str]") -> None:
    assert program.stdin is not None
    program.stdin.close()


@pytest.mark.parametrize(("end", "status"), [(end_of_input, 0), (subprocess.Popen.kill, -signal.SIGKILL)])
def test_no_worker_outlives_a_program_that_ends_in_the_middle_of_an_epoch(
    end: Callable[["subprocess.Popen[str]"], None], status: int, tone_manifest: Manifest, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    tone_manifest.write(manifest)
    command = [sys.executable, "-c", HOLDING, str(manifest)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables) as program:
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "loading\n"
            workers = psutil.Process(program.pid).children()
            end(program)
            assert len(workers) == 2
            assert program.wait(PATIENCE) == status
            assert not psutil.wait_procs(workers, PATIENCE)[1]
        finally:
            program.kill()


# A worker that comes to its first line when its program has been killed.
LATE = """
import os, sys, time
from pathlib import Path
from sonosco_mlflow.data import loader
from sonosco_mlflow.data.manifest import Manifest, Utterance
from toy import tone_loader

main, begin = os.getpid(), loader.leave_signals_to_main

def begin_late(worker):
    print(os.getpid(), flush=True)
    while os.getppid() == main:
        time.sleep(0.01)
    begin(worker)

loader.leave_signals_to_main = begin_late
next(tone_loader(Manifest.read(Path(sys.argv[1])), workers=1).epoch(0))
"""


def test_no_worker_outlives_a_program_that_was_killed_before_it_began(tone_manifest: Manifest, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    tone_manifest.write(manifest)
    command = [sys.executable, "-c", LATE, str(manifest)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env=variables) as program:
        try:
            assert program.stdout is not None
            worker = psutil.Process(int(program.stdout.readline()))
        finally:
            program.kill()
        try:
            assert not psutil.wait_procs([worker], PATIENCE)[1]
        finally:
            if worker.is_running():
                worker.kill()


# ---------------------------------------------------------------------- shared memory


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_of_workers_lie_in_shared_memory(workers: int, tone_manifest: Manifest) -> None:
    for batch in tone_loader(tone_manifest, workers=workers).epoch(0):
        assert batch.features.is_shared() == (workers > 0)


def repeated(manifest: Manifest, times: int) -> Manifest:
    """The recordings of ``manifest`` over and over, under new ids."""
    rows = [
        Utterance(f"{number:04d}-{row.id}", row.audio_filepath, row.duration, row.text, row.speaker)
        for number in range(times)
        for row in manifest
    ]
    return Manifest(rows, manifest.root)


EPOCH = """
import json, resource, sys
from pathlib import Path
import psutil
import toy
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.processor import AudioDataProcessor

# Batches of ten kilobytes and more.
toy.PROCESSOR = AudioDataProcessor(n_mels=80)
manifest, frames, may_open, keep = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "keep"
loader = toy.tone_loader(Manifest.read(manifest), frames_per_batch=frames, workers=2)
resource.setrlimit(resource.RLIMIT_NOFILE, (may_open, may_open))
process, kept, seen = psutil.Process(), [], []
for number, batch in enumerate(loader.epoch(0)):
    if keep:
        kept.append(batch)
    if number % 500 == 250:
        workers = process.children()
        # Of memory, what is a process's own: files that are mapped are not.
        seen.append([[one.num_fds() for one in (process, *workers)], [one.memory_full_info().uss for one in workers]])
print(json.dumps([number + 1, *zip(*seen)]))
"""


def epoch(
    manifest: Manifest,
    folder: Path,
    *,
    frames: int,
    may_open: int = 200,
    keep: bool = False,
    prefix: Sequence[str] = (),
) -> "subprocess.CompletedProcess[str]":
    """Go through an epoch of ``manifest`` in a process of its own, begun by the command ``prefix``."""
    shutil.copytree(manifest.root, folder, dirs_exist_ok=True)
    manifest.write(folder / "manifest.jsonl")
    arguments = [str(folder / "manifest.jsonl"), str(frames), str(may_open), "keep" if keep else "drop"]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*prefix, sys.executable, "-c", EPOCH, *arguments]
    return subprocess.run(command, env=variables, text=True, capture_output=True, timeout=PATIENCE)


def test_thousands_of_batches_take_no_more_files_and_no_more_memory(tone_manifest: Manifest, tmp_path: Path) -> None:
    done = epoch(repeated(tone_manifest, 150), tmp_path, frames=1)
    assert done.returncode == 0, done.stderr
    batches, files, memory = json.loads(done.stdout)
    assert batches == 3000
    assert len(files) == 6
    assert all(len(of_processes) == 3 and max(of_processes) < 100 for of_processes in files)
    # Of the 2000 batches between, those that a worker makes would be ten megabytes and more.
    assert all(last - second < 5e6 for second, last in zip(memory[1], memory[-1], strict=True))


def test_who_keeps_too_many_batches_of_workers_is_told_what_to_do(tone_manifest: Manifest, tmp_path: Path) -> None:
    done = epoch(repeated(tone_manifest, 15), tmp_path, frames=1, keep=True)
    assert done.returncode == 1
    assert "UserError: data.workers is 2, and this process may have 200 files open" in done.stderr
    assert "`ulimit -n" in done.stderr


REFUSED = """
import sys
from pathlib import Path
import psutil, torch
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from toy import tone_loader

def refuse(tensor):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

# Workers are forks of this process, and have what it has.
torch.Tensor.share_memory_ = refuse
manifest = Manifest.read(Path(sys.argv[1]))
assert list(tone_loader(manifest).epoch(0)), "without workers nothing is shared"
try:
    list(tone_loader(manifest, workers=1).epoch(0))
except UserError as error:
    # Though the error, which knows where it came from, is still held.
    print(len(psutil.Process().children()), error)
"""


def test_a_failure_to_share_is_told_and_the_workers_end(tone_manifest: Manifest, tmp_path: Path) -> None:
    tone_manifest.write(tmp_path / "manifest.jsonl")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", REFUSED, str(tmp_path / "manifest.jsonl")]
    done = subprocess.run(command, env=variables, text=True, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"0 data.workers: a batch of .* does not go into /dev/shm, where .* to 0.*\n", done.stdout)


SMALL = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" "$@"')


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*SMALL, "true"], capture_output=True).returncode != 0,
    reason="this machine does not let a process have a /dev/shm of its own",
)
def test_a_small_shared_memory_is_told_at_once(tone_manifest: Manifest, tmp_path: Path) -> None:
    done = epoch(repeated(tone_manifest, 50), tmp_path, frames=1_000_000, prefix=SMALL)
    assert done.returncode == 1
    assert "UserError: data.workers: a batch of" in done.stderr
    assert "of 1.0 MB are free" in done.stderr
    # What there is room for comes as it does elsewhere.
    done = epoch(repeated(tone_manifest, 5), tmp_path, frames=120, prefix=SMALL)
    assert done.returncode == 0, done.stderr
