"""The disk is full, fails, or takes less than it is given: one message that names the file, and nothing lost."""

import errno
import subprocess
import warnings

import pytest
from faults import Fault
from harness import Ended, World, full_disk
from proofs import NewWorld, Proof

from sonosco_mlflow.serialization.checkpoint import checkpoints_in, read_newest_checkpoint

# A full disk stays full until somebody tidies up; a disk that fails may fail once.
FULL = [("write", errno.ENOSPC, True), ("mkdir", errno.ENOSPC, True), ("open", errno.ENOSPC, True)]
BROKEN = [("write", errno.EIO, False), ("fsync", errno.EIO, False), ("replace", errno.EIO, False)]


def assert_told(world: World, ended: Ended, what: str) -> None:
    """Demand that a run failed with one message that names a file of its folder, and that its checkpoints are whole."""
    story = f"{what}\n{ended.output}"
    assert ended.status == 1, f"ended with {ended.status}: {story}"
    assert "Traceback" not in ended.output, story
    (message,) = (line for line in ended.output.splitlines() if line.startswith("sonosco: "))
    assert str(world.project / "runs") in message, f"names no file: {story}"
    assert world.run.info.status == "FAILED", f"{world.run.info.status}: {story}"
    assert world.run.data.tags["sonosco.state"] == "failed", story
    assert world.run.data.tags["sonosco.error"] in message, story
    assert_whole(world, story)


def assert_whole(world: World, story: str) -> None:
    folder = world.run_folder / "checkpoints"
    if checkpoints_in(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_newest_checkpoint(folder)
    assert not list(folder.glob("broken-*")), story


def fail_at(proof: Proof, expected: World, world: World, fault: Fault) -> bool:
    """Let an operation fail, demand that it is told, continue on a sound disk; return whether there was such a one."""
    what = f"{errno.errorcode[fault.error]} at {fault.operations[0]} number {fault.number}"
    ended = world.launch(fault=fault)
    if ended.status == 0:
        return False
    proof.note(ended)
    with proof.attempt():
        assert_told(world, ended, what)
    with proof.attempt():
        proof.finish(expected, world, what)
    return True


@pytest.mark.parametrize(("operation", "error", "lasts"), FULL + BROKEN)
@pytest.mark.parametrize("every", [pytest.param(31, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_an_operation_fails(
    operation: str,
    error: int,
    lasts: bool,
    every: int,
    proof: Proof,
    undisturbed: NewWorld,
    make_world: NewWorld,
) -> None:
    expected = undisturbed()
    notes = (expected.folder / "notes" / "1" / "disk").read_text().splitlines()
    count = sum(line.startswith(f"{operation} ") for line in notes)
    # Not the last few: a run of another rhythm may make some fewer.
    for number in range(min(5, count), max(count - 2, 6), every):
        fail_at(proof, expected, make_world(), Fault("fail", number, "disk", (operation,), error, lasts))
    assert proof.tried
    proof.conclude()


def test_short_writes(proof: Proof, undisturbed: NewWorld, make_world: NewWorld) -> None:
    proof.tried += 1
    world = make_world()
    assert world.launch(fault=Fault("short", number=0)).status == 0
    proof.check(undisturbed(), world)


def test_a_really_full_disk(proof: Proof, undisturbed: NewWorld, make_world: NewWorld) -> None:
    world = make_world()
    try:
        with full_disk(world.project / "runs", "4m") as disk:
            for left in (40_000, 150_000, 300_000):
                ballast = disk / "ballast"
                ballast.write_bytes(bytes(4 * 1024**2 - left))
                ended = proof.note(world.launch())
                if ended.status != 0:
                    assert_told(world, ended, f"{left} bytes left")
                ballast.unlink()
            assert world.launch().status == 0
            proof.check(undisturbed(), world)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file system can be mounted here: {error.stderr.decode().strip()}")
