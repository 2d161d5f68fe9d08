"""A file of the newest checkpoint is flipped, cut, deleted or swapped: named, put aside, and the older one used."""

import itertools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from harness import World
from proofs import NewWorld, Proof

from sonosco_mlflow.serialization.checkpoint import MANIFEST
from sonosco_mlflow.tracking.checkpoints import newest_checkpoint
from sonosco_mlflow.tracking.segments import Segment

NEWEST, OLDER = "step-00000003", "step-00000002"
FILES = (MANIFEST, "objects.json", "state.json", "model.safetensors", "optimizer.safetensors", "trainer.safetensors")
KINDS = ("flipped", "cut", "deleted", "swapped")
PLACES = (("disk",), ("MLflow",), ("disk", "MLflow"))


def damage(checkpoint: Path, name: str, kind: str) -> bool:
    """Spoil a file; return whether that changed anything."""
    path = checkpoint / name
    content = path.read_bytes()
    if kind == "deleted":
        path.unlink()
        return True
    middle = len(content) // 2
    spoiled = {
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "cut": content[:middle],
        "swapped": (checkpoint.with_name(OLDER) / name).read_bytes(),
    }[kind]
    path.write_bytes(spoiled)
    return spoiled != content


def folders(world: World) -> dict[str, Path]:
    return {"disk": world.run_folder / "checkpoints", "MLflow": world.artifacts / "checkpoints"}


def spoil(world: World, name: str, kind: str, places: tuple[str, ...]) -> bool:
    spoiled = [damage(folders(world)[place] / NEWEST, name, kind) for place in places]
    return all(spoiled)


@pytest.mark.filterwarnings("ignore:passed over")
def test_every_damage_is_named_and_the_older_one_used(
    killed_copy: Callable[[], World], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = killed_copy()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.store)
    mlflow.set_tracking_uri(None)
    for place, folder in folders(world).items():
        shutil.copytree(folder, tmp_path / place)
    tried = 0
    for name, kind, places in itertools.product(FILES, KINDS, PLACES):
        for place, folder in folders(world).items():
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / place, folder)
        if not spoil(world, name, kind, places):
            continue
        tried += 1
        what = f"{name} {kind} in {' and '.join(places)}"
        local = folders(world)["disk"]
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            found = newest_checkpoint(Segment(str(world.run_id)), local)
        told = "\n".join(str(warning.message) for warning in given)
        assert found is not None, what
        assert found.directory.name == (OLDER if len(places) == 2 else NEWEST), f"{what}: {told}"
        # A manifest that can be read is believed: what it says of another file is what does not fit.
        named = NEWEST if name == MANIFEST else name
        if "disk" in places:
            assert named in told, f"{what}: {told}"
            (aside,) = local.glob("broken-*")
            assert aside.name in told, f"{what}: {told}"
            assert NEWEST in aside.name, what
        assert len(given) == (0 if places == ("MLflow",) else len(places)), f"{what}: {told}"
        assert all(NEWEST in str(warning.message) for warning in given), f"{what}: {told}"
        assert "MLflow" not in places or "disk" not in places or f"runs:/{world.run_id}" in told, f"{what}: {told}"
    assert tried > 60


QUICK = [("model.safetensors", "flipped", ("disk", "MLflow")), (MANIFEST, "deleted", ("disk",))]


@pytest.mark.parametrize(("name", "kind", "places"), QUICK)
def test_damaged(
    name: str,
    kind: str,
    places: tuple[str, ...],
    proof: Proof,
    killed_copy: Callable[[], World],
    undisturbed: NewWorld,
) -> None:
    end_equal(proof, undisturbed(), killed_copy(), name, kind, places)


@pytest.mark.slow
def test_every_damage(proof: Proof, killed_copy: Callable[[], World], undisturbed: NewWorld) -> None:
    for name, kind, places in itertools.product(FILES, KINDS, PLACES):
        with proof.attempt():
            end_equal(proof, undisturbed(), killed_copy(), name, kind, places)
    proof.conclude()


def test_a_whole_checkpoint_under_the_name_of_another(
    proof: Proof, killed_copy: Callable[[], World], undisturbed: NewWorld
) -> None:
    world = killed_copy()
    for folder in folders(world).values():
        shutil.rmtree(folder / NEWEST)
        shutil.copytree(folder / OLDER, folder / NEWEST)
    proof.tried += 1
    proof.finish(undisturbed(), world)


def end_equal(proof: Proof, expected: World, world: World, name: str, kind: str, places: tuple[str, ...]) -> None:
    if spoil(world, name, kind, places):
        proof.tried += 1
        proof.finish(expected, world, f"{name} {kind} in {' and '.join(places)}")
