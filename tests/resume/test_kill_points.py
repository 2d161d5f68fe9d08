"""Killed at the N-th operation on the disk or on the tracking store, killed again while it recovers, and continued."""

import random
import shutil
from collections.abc import Iterator

import pytest
from faults import Fault
from harness import World
from proofs import NewWorld, Proof

LONGEST_TRIALS = 100_000


def trial(proof: Proof, expected: World, world: World, first: Fault, second: Fault) -> None:
    """Kill a run at ``first``, its continuation at ``second``, and demand that it then ends as if nothing had been."""
    what = f"{first.kind} at {first.seam} operation {first.number}, then at {second.seam} operation {second.number}"
    for fault in (first, second):
        ended = world.launch(fault=fault)
        assert ended.killed or ended.status == 0, f"{what}: ended with {ended.status}\n{ended.output}"
        if ended.killed:
            proof.note(ended)
            what += f"\n  killed at {(ended.operations[fault.seam] or ['nothing'])[-1]}"
    # What stands half-delivered in MLflow shows where nothing else is left.
    elsewhere = ended.killed and first.seam == "store" and first.number % 2 == 0 and (world.project / "runs").exists()
    if elsewhere:
        shutil.rmtree(world.project / "runs")
        what += ", and the run folder was removed"
    proof.finish(expected, world, what, local=not elsewhere)


def second_faults(seed: int) -> Iterator[Fault]:
    """Yield where a recovery is killed: anywhere, at either seam."""
    stream = random.Random(seed)
    while True:
        seam = stream.choice(("disk", "disk", "store"))
        yield Fault("kill", stream.randint(1, 150 if seam == "disk" else 60), seam)


def operations(world: World, seam: str) -> int:
    """Return how many operations an undisturbed run makes."""
    return len((world.folder / "notes" / "1" / seam).read_text().splitlines())


def run_trials(proof: Proof, undisturbed: NewWorld, make_world: NewWorld, seam: str, kind: str, count: int) -> None:
    """Try ``count`` operations spread evenly over all of a run, or every one."""
    expected = undisturbed()
    total = operations(expected, seam)
    numbers = range(1, total + 1, max(1, total // count))
    for number, second in zip(numbers, second_faults(total), strict=False):
        with proof.attempt():
            trial(proof, expected, make_world(), Fault(kind, number, seam), second)
    proof.conclude()


@pytest.mark.parametrize(("seam", "kind", "count"), [("disk", "kill", 4), ("disk", "tear", 1), ("store", "kill", 3)])
def test_killed_at_some_operations(
    seam: str, kind: str, count: int, proof: Proof, undisturbed: NewWorld, make_world: NewWorld
) -> None:
    run_trials(proof, undisturbed, make_world, seam, kind, count)


@pytest.mark.slow
@pytest.mark.parametrize(("seam", "kind"), [("disk", "kill"), ("disk", "tear"), ("store", "kill")])
def test_killed_at_every_operation(
    seam: str, kind: str, proof: Proof, undisturbed: NewWorld, make_world: NewWorld
) -> None:
    run_trials(proof, undisturbed, make_world, seam, kind, LONGEST_TRIALS)
