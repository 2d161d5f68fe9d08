"""Killed from outside at any time, again and again, with another number of loader workers each time."""

import random

import pytest
from proofs import NewWorld, Proof

from rich_trainer import MODELS

WORKERS = (0, 2, 3)
MOST_KILLS_OF_A_RUN = 6


def kill_at_random(
    proof: Proof, undisturbed: NewWorld, make_world: NewWorld, model: str, kills: int, seed: int = 0
) -> None:
    """Kill runs of ``model`` until there have been so many kills; each run is then continued to its end."""
    stream = random.Random(f"{model} {seed}")
    # Saves that follow no schedule, too: several in each run.
    settings = {"model": model, "epochs": 3, "pace": 0.05, "minutes": 0.003}
    expected = undisturbed(**settings)
    while proof.tried < kills:
        world = make_world(**settings)
        story = []
        for _ in range(min(MOST_KILLS_OF_A_RUN, kills - proof.tried)):
            workers, moment = stream.choice(WORKERS), stream.uniform(0.0, expected.seconds)
            process = world.begin(workers=workers)
            process.kill_after(moment)
            ended = world.end(process)
            story.append(f"{workers} workers, killed after {moment:.2f} s: {ended.status}, steps {[*ended.steps]}")
            if not ended.killed:
                assert ended.status == 0, "\n".join([*story, ended.output])
                break
            proof.note(ended)
        with proof.attempt():
            proof.finish(expected, world, "\n".join(story))
    proof.conclude()


def test_killed_at_random(proof: Proof, undisturbed: NewWorld, make_world: NewWorld) -> None:
    kill_at_random(proof, undisturbed, make_world, "toy", kills=6)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_killed_at_random_many_times(model: str, proof: Proof, undisturbed: NewWorld, make_world: NewWorld) -> None:
    kill_at_random(proof, undisturbed, make_world, model, kills=55, seed=1)
