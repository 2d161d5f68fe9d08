"""Continued elsewhere: in another folder, and from nothing but what MLflow kept."""

import shutil
from collections.abc import Callable

import pytest
from harness import World
from proofs import NewWorld, Proof


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
