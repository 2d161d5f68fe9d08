"""Continued elsewhere: in another folder, and from nothing but what MLflow kept."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import World
from proofs import NewWorld, Proof

from sonosco_mlflow.tracking import checkpoints


def moved(world: World) -> World:
    world.project.rename(world.folder / "elsewhere")
    world.place = "elsewhere"
    return world


def emptied(world: World) -> World:
    shutil.rmtree(world.project / "runs")
    return world


@pytest.mark.parametrize(
    ("change", "local"),
    [(moved, True), (emptied, False), (lambda world: moved(emptied(world)), False)],
    ids=["another folder", "without the run folder", "both"],
)
def test_moved(
    change: Callable[[World], World],
    local: bool,
    proof: Proof,
    killed_copy: Callable[[], World],
    undisturbed: NewWorld,
) -> None:
    proof.tried += 1
    proof.finish(undisturbed(), change(killed_copy()), local=local)


def die_in_a_fetch() -> None:
    """Have this process killed once a checkpoint has come from MLflow, before it stands under its name."""
    fetch = checkpoints.download

    def download(run_id: str, artifact: str, folder: Path) -> Path:
        fetched = fetch(run_id, artifact, folder)
        if folder.name.startswith(".partial-"):
            os.kill(os.getpid(), signal.SIGKILL)
        return fetched

    checkpoints.download = download


def test_killed_in_a_fetch_and_continued_from_another_checkpoint(
    proof: Proof, killed_copy: Callable[[], World], undisturbed: NewWorld
) -> None:
    """What the fetch left is of a name that the later process does not ask for."""
    world = emptied(killed_copy())
    assert proof.note(world.launch(sabotage=die_in_a_fetch)).killed
    assert list(world.run_folder.glob("checkpoints/.partial-step-00000003/*/*"))
    shutil.rmtree(world.artifacts / "checkpoints" / "step-00000003")
    proof.finish(undisturbed(), world, local=False)


@pytest.mark.slow
def test_moved_again_and_again(proof: Proof, make_world: NewWorld, undisturbed: NewWorld) -> None:
    """Each segment finds an empty run folder in a place of its own."""
    settings = {"epochs": 4, "pace": 0.05}
    expected = undisturbed(**settings)
    world = make_world(**settings)
    for number in range(5):
        process = world.begin()
        process.kill_after(expected.seconds * 0.6)
        ended = world.end(process)
        if not ended.killed:
            assert ended.status == 0, ended.output
            break
        proof.note(ended)
        if (world.project / "runs").exists():
            emptied(world)
        world.project.rename(world.folder / f"place-{number}")
        world.place = f"place-{number}"
    proof.finish(expected, world, local=False)
