"""A run that is killed and continued, as often as a test likes, in processes of their own.

>>> undisturbed = world(tmp_path / "a").finish()                                       # doctest: +SKIP
>>> killed = world(tmp_path / "b")                                                     # doctest: +SKIP
>>> assert killed.launch(fault=Fault("kill", number=70)).killed                        # doctest: +SKIP
>>> assert not compare_runs(undisturbed, killed.finish())                              # doctest: +SKIP
"""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import victim
from victim import Launch

LONGEST_LAUNCH = 300.0


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status; negative is the number of the signal that killed it.
        output: what it printed.
        operations: the operations at each seam, in order.
        seconds: from its launch to its end.
        recovery: seconds from its launch to its first step, or None if it made none.
        steps: when each optimizer step was made, in seconds since 1970.
    """

    status: int
    output: str
    operations: dict[str, list[str]]
    seconds: float
    recovery: float | None
    steps: dict[int, float]

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Process:
    """A training that goes on beside the test."""

    def __init__(self, launch: Launch) -> None:
        self.notes = launch.notes
        self.notes.mkdir(parents=True)
        self.started = time.time()
        # A fork of a process that has imported everything: importing takes far longer than training.
        self._process = _forks().Process(target=victim.run, args=(launch,))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float = LONGEST_LAUNCH) -> bool:
        """Wait for its end, at most so long, and return whether it came."""
        self._process.join(seconds)
        return not self.lives

    @property
    def run_id(self) -> str | None:
        """The run that it has begun, if it has."""
        return self._note("run") or None

    @property
    def steps(self) -> dict[int, float]:
        """When each optimizer step was made."""
        # The last line may be in the making.
        lines = [line.split() for line in self._note("steps").split("\n")[:-1]]
        return {int(step): float(moment) for step, moment in lines}

    @property
    def output(self) -> str:
        return self._note("output")

    def kill(self) -> None:
        # It may have ended by itself; its status tells.
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def kill_after(self, seconds: float) -> None:
        if not self.wait(seconds):
            self.kill()

    def end(self) -> Ended:
        """Return how it ended; one that does not end is killed, and fails the test."""
        in_time = self.wait()
        if not in_time:
            self.kill()
            self.wait()
        assert in_time, f"did not end in {LONGEST_LAUNCH:.0f} s\n{self.output}"
        assert self._process.exitcode is not None
        steps = self.steps
        return Ended(
            status=self._process.exitcode,
            output=self.output,
            operations={seam: self._note(seam).splitlines() for seam in ("disk", "store")},
            seconds=time.time() - self.started,
            recovery=min(steps.values()) - self.started if steps else None,
            steps=steps,
        )

    def _note(self, name: str) -> str:
        path = self.notes / name
        return path.read_text() if path.exists() else ""


@dataclass
class World:
    """All that one run has: a project, a corpus, a tracking store and its artifacts, in a folder that can be copied.

    Attributes:
        settings: of :class:`victim.Launch`, for every process.
        seconds: that the last process took.
        place: of the project.
    """

    folder: Path
    settings: dict[str, Any]
    run_id: str | None = None
    launches: int = 0
    seconds: float = 0.0
    place: str = "project"

    @property
    def project(self) -> Path:
        return self.folder / self.place

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts" / str(self.run_id) / "artifacts"

    @property
    def run_folder(self) -> Path:
        (folder,) = (path for path in (self.project / "runs").iterdir() if path.is_dir())
        return folder

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.store)

    @property
    def run(self) -> mlflow.entities.Run:
        return self.client.get_run(str(self.run_id))

    def begin(self, **settings: Any) -> Process:
        """Start the training, or continue it, in a process that is not waited for."""
        self.launches += 1
        launch = Launch(
            **{
                "project": self.project,
                "corpus": self.corpus,
                "store": self.store,
                "notes": self.folder / "notes" / str(self.launches),
                "run_id": self.run_id,
                **self.settings,
                **settings,
            }
        )
        return Process(launch)

    def end(self, process: Process) -> Ended:
        """Wait for a process, and learn from it which run it began."""
        ended = process.end()
        self.run_id = self.run_id or process.run_id
        self.seconds = ended.seconds
        return ended

    def launch(self, **settings: Any) -> Ended:
        """Start the training, or continue it, and wait for its end."""
        return self.end(self.begin(**settings))

    def finish(self, **settings: Any) -> "World":
        """Start the training, or continue it, without disturbance."""
        ended = self.launch(**settings)
        assert ended.status == 0, f"ended with {ended.status}\n{ended.output}"
        return self

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def copy(self, folder: Path) -> "World":
        """Return an equal world at another place."""
        shutil.copytree(self.folder, folder, symlinks=True)
        with sqlite3.connect(folder / "mlflow.db") as database:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                places = (str(self.folder), str(folder))
                database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", places)
        database.close()
        return replace(self, folder=folder)


def new_world(folder: Path, template: Path, **settings: Any) -> World:
    """Return the world of a run that has not begun; ``template`` holds a project, a corpus and an empty store."""
    empty = World(template, settings)
    return empty.copy(folder)


def make_template(folder: Path, database: Path) -> Path:
    """Make what every world begins with. Its project is a repository of its own: its code is what a test changes."""
    project = folder / "project"
    project.mkdir(parents=True)
    (project / "train.py").write_text("# the code of this project\n")
    (project / ".gitignore").write_text("runs/\n")
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "first"]):
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.hooksPath=/dev/null", *command]
        subprocess.run(git, cwd=project, check=True)
    shutil.rmtree(project / ".git" / "hooks", ignore_errors=True)
    (folder / "mlflow.db").write_bytes(database.read_bytes())
    with sqlite3.connect(folder / "mlflow.db") as store:
        store.execute("UPDATE experiments SET artifact_location = ?", [str(folder / "artifacts")])
    store.close()
    return folder


_SERVER_PATH = (Path(__file__).parents[2] / "src", Path(__file__).parents[1], Path(__file__).parent)


def _forks() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    # The server starts with the first process, and takes its variables from here.
    path = os.pathsep.join(map(str, _SERVER_PATH))
    os.environ["PYTHONPATH"] = path
    os.environ["OMP_NUM_THREADS"] = "1"
    return context


@contextmanager
def full_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a small file system at ``folder`` for a while."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


assert sys.platform == "linux", "processes are killed and forked as Linux does it"
