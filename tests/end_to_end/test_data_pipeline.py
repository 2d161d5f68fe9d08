"""The data stages as DVC runs them: kept in a remote and brought back, and killed at any moment."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest

from project import DATA_STAGES, environment, make_project, run
from servers import ObjectStore

DVC = ["dvc"]  # what a researcher types: the one beside this interpreter
GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commit(project: Path, message: str) -> None:
    run([*GIT, "add", "--all"], project)
    run([*GIT, "commit", "--quiet", "-m", message], project)


def assert_clean(project: Path, variables: Mapping[str, str] | None = None) -> None:
    """Demand that DVC has nothing to say of the data, its cache, its remote and the stages."""
    for command in (["data", "status", "--json"], ["status", "--json", *DATA_STAGES]):
        assert json.loads(run([*DVC, *command], project, variables=variables).stdout) == {}


@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_what_was_pushed_is_pulled_when_cache_and_data_are_gone(
    tmp_path: Path, object_store: ObjectStore, kind: str
) -> None:
    project = make_project(tmp_path / "project")
    address = str(tmp_path / "remote") if kind == "folder" else f"s3://kept/{tmp_path.name}"
    run([*DVC, "remote", "add", "--default", "kept", address], project)
    if kind == "object store":
        run([*DVC, "remote", "modify", "kept", "endpointurl", object_store.address], project)
    variables = object_store.client_variables()
    run([*DVC, "repro", "dataset"], project, variables=variables)
    commit(project, "data")
    assert_clean(project, variables)
    made = contents(project / "data")
    assert {Path(name).parts[0] for name in made} == {"corpora", "manifests", "features", "dataset"}

    run([*DVC, "push", *DATA_STAGES], project, variables=variables)
    shutil.rmtree(project / ".dvc" / "cache")
    shutil.rmtree(project / "data")
    # A stage that would be run has no recordings.
    (project / "tones").rename(tmp_path / "tones")
    run([*DVC, "pull", *DATA_STAGES], project, variables=variables)
    assert contents(project / "data") == made
    (tmp_path / "tones").rename(project / "tones")
    assert "didn't change" in run([*DVC, "repro", "dataset"], project, variables=variables).stdout
    assert_clean(project, variables)


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_repro_leaves_nothing_that_another_does_not_finish(tmp_path: Path, kills: int) -> None:
    """Killed with all that it had started, at moments from its beginning to its end, and once more while it goes on."""
    project = make_project(tmp_path / "project")
    began = time.monotonic()
    run([*DVC, "repro", "dataset"], project)
    seconds = time.monotonic() - began
    undisturbed, lock = contents(project / "data"), (project / "dvc.lock").read_bytes()
    killed = 0
    for moment in np.linspace(0.2, 0.9, kills):
        run(["git", "clean", "--quiet", "-xdff"], project)
        killed += killed_after(project, float(moment) * seconds)
        killed_after(project, 0.4 * seconds)
        run([*DVC, "repro", "dataset"], project)
        assert contents(project / "data") == undisturbed
        assert (project / "dvc.lock").read_bytes() == lock
    assert killed > kills / 2, "the last may have come too late on a machine that has become quicker"
    commit(project, "data")
    assert_clean(project)
    assert run(["git", "status", "--porcelain"], project).stdout == ""


def test_a_stage_that_has_outlived_its_dvc_is_waited_for_and_ends(tmp_path: Path) -> None:
    """As where the system, short of memory, kills DVC and not the process that it waits for."""
    project = make_project(tmp_path / "project")
    run([*DVC, "repro", "dataset"], project)
    undisturbed, lock = contents(project / "data"), (project / "dvc.lock").read_bytes()
    run(["git", "clean", "--quiet", "-xdff"], project)
    first = begin_repro(project)
    stage = stage_at_work(project, "features")
    stage.suspend()
    try:
        first.kill()
        first.wait()
        second = begin_repro(project, subprocess.PIPE)
        assert second.stderr is not None
        said = ""
        while "another process is at it" not in said:
            line = second.stderr.readline()
            assert line, said
            said += line
        assert stage.is_running()
    finally:
        stage.resume()
    said += second.communicate()[1]
    assert second.returncode == 0, said
    assert not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE
    assert contents(project / "data") == undisturbed
    assert (project / "dvc.lock").read_bytes() == lock


def begin_repro(project: Path, stderr: int = subprocess.DEVNULL) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*DVC, "repro", "dataset"],
        cwd=project,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
    )


def stage_at_work(project: Path, name: str) -> psutil.Process:
    """Wait until DVC has a stage of that name run, and until it is at its work; return its process."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for path in (project / ".sonosco" / "locks").glob(f"{name}@*.lock"):
            for process in psutil.process_iter(["cmdline", "open_files"]):
                if str(path) in {file.path for file in process.info["open_files"] or ()}:
                    return process
        time.sleep(0.01)
    raise AssertionError(f"the stage {name} has not begun")


def killed_after(project: Path, seconds: float) -> bool:
    """Kill a `dvc repro` of the data, and all that it had started, after so long; return whether it was under way."""
    process = begin_repro(project)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        for victim in [process, *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.wait()
    return process.returncode == -9
