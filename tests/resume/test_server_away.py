"""The tracking server goes away in the middle of a batch and comes back: no row is lost or doubled."""

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import outage
import pytest
from harness import Process, World
from outage import Wire
from proofs import NewWorld, Proof

from servers import PATIENCE, TrackingServer

SETTINGS = {"epochs": 8, "pace": 0.6}
LONG = {"epochs": 60, "pace": 1.0}
SECONDS_DOWN = 60.0


@pytest.mark.parametrize("befalls", [outage.client_is_refused, outage.client_hangs], ids=["refused", "hangs"])
def test_in_the_middle_of_a_batch(
    proof: Proof, undisturbed: NewWorld, make_world: NewWorld, befalls: Callable[[], None]
) -> None:
    world = make_world(**SETTINGS)
    ended = proof.note(world.launch(sabotage=befalls))
    assert ended.status == 0, ended.output
    # A checkpoint is written at each step: the training has waited for none of them.
    assert max(later - step for step, later in pairwise(ended.steps.values())) < outage.SECONDS_AWAY / 2
    proof.check(undisturbed(**SETTINGS), world)


@pytest.fixture
def served(make_world: NewWorld) -> Iterator[tuple[World, TrackingServer]]:
    """A world whose store is behind a server."""
    world = make_world()
    with sqlite3.connect(world.folder / "mlflow.db") as database:
        database.execute("UPDATE experiments SET artifact_location = 'mlflow-artifacts:/artifacts'")
    database.close()
    server = TrackingServer(world.folder)
    try:
        server.start()
        yield world, server
    finally:
        server.kill()


def wait_for_step(process: Process, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.lives and time.monotonic() < deadline:
        if len(process.steps) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not made: {process.output}")


def brought_home(world: World) -> World:
    """Let the artifacts that were served lie where they do without a server."""
    shutil.move(world.folder / "served" / "artifacts", world.folder / "artifacts")
    return world


@pytest.mark.slow
def test_a_server_is_killed_and_comes_back(
    proof: Proof, undisturbed: NewWorld, served: tuple[World, TrackingServer]
) -> None:
    world, server = served
    expected = undisturbed(**LONG)
    process = world.begin(**LONG, store=server.address)
    wait_for_step(process, 10)
    server.kill()
    down = time.time()
    time.sleep(SECONDS_DOWN)
    server.start()
    up = time.time()
    ended = proof.note(world.end(process))
    assert ended.status == 0, ended.output
    assert sum(down < moment < up for moment in ended.steps.values()) > SECONDS_DOWN / 4
    proof.check(expected, brought_home(world))


@pytest.mark.slow
def test_answers_are_cut_and_connections_refused(
    proof: Proof, undisturbed: NewWorld, served: tuple[World, TrackingServer]
) -> None:
    world, server = served
    expected = undisturbed(**LONG)
    wire = Wire(server.port)
    process = world.begin(**LONG, store=wire.address)
    for step in (5, 15, 25):
        wait_for_step(process, step)
        for state, seconds in (("cut", 3.0), ("refused", 4.0), ("whole", 0.0)):
            wire.state = state
            time.sleep(seconds)
        proof.tried += 1
    ended = proof.note(world.end(process), kill=False)
    wire.close()
    assert ended.status == 0, ended.output
    proof.check(expected, brought_home(world))
