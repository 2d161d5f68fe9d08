import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import (
    BrokenCheckpointError,
    checkpoints_in,
    read_checkpoint,
    read_newest_checkpoint,
    remove_leftovers,
    write_checkpoint,
)

OBJECTS = {"$object": "somewhere:Thing", "parameters": {}}


def state(value: float = 1.0) -> dict[str, object]:
    return {
        "model": {"weight": torch.full((2, 3), value)},
        "trainer": {"step": 4, "best": float("nan"), "scores": {2: 0.5}, "generator": torch.arange(3)},
    }


def write(parent: Path, step: int = 4, value: float = 1.0) -> Path:
    return write_checkpoint(parent, step, OBJECTS, state(value), {"config": "c0ffee"})


def test_it_reads_what_it_wrote(checkpoints: Path) -> None:
    path = write(checkpoints)
    assert sorted(file.name for file in path.iterdir()) == [
        *("manifest.json", "model.safetensors", "objects.json", "state.json", "trainer.safetensors")
    ]
    checkpoint = read_checkpoint(path)
    assert (checkpoint.directory, checkpoint.step, checkpoint.objects) == (path, 4, OBJECTS)
    assert checkpoint.digests == {"config": "c0ffee"}
    assert torch.equal(checkpoint.state["model"]["weight"], torch.ones(2, 3))
    assert checkpoint.state["trainer"]["scores"] == {2: 0.5}
    assert checkpoint.state["trainer"]["best"] != checkpoint.state["trainer"]["best"]


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


@pytest.mark.parametrize("name", ["objects.json", "state.json", "model.safetensors", "trainer.safetensors"])
def test_every_flipped_cut_or_missing_byte_is_noticed_and_named(name: str, checkpoints: Path) -> None:
    path = write(checkpoints) / name
    whole = path.read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(BrokenCheckpointError, match=f"{name}: altered"):
            read_checkpoint(path.parent)
    path.write_bytes(whole[:-1])
    with pytest.raises(BrokenCheckpointError, match=f"{name}: altered: .* {len(whole) - 1} bytes, expected"):
        read_checkpoint(path.parent)
    path.unlink()
    with pytest.raises(BrokenCheckpointError, match=f"{name}: missing"):
        read_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda manifest: manifest.pop("files"), "unreadable"),
        (lambda manifest: manifest.update(schema=99), "schema 99, this version reads 1"),
        (
            lambda manifest: manifest["files"].update({"../../secret": {"sha256": "", "bytes": 0}}),
            "leaves the directory",
        ),
        (lambda manifest: manifest["files"].pop("trainer.safetensors"), "trainer.safetensors"),
        (lambda manifest: manifest["files"].pop("state.json"), "state.json"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(change: Any, match: str, checkpoints: Path) -> None:
    path = write(checkpoints) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpointError, match=match):
        read_checkpoint(path.parent)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(content: bytes, checkpoints: Path) -> None:
    path = write(checkpoints) / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=r"manifest\.json: unreadable"):
        read_checkpoint(path.parent)


class DiskFullError(OSError):
    pass


def test_a_crash_at_any_write_leaves_the_older_one_and_nothing_half(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sonosco_mlflow.serialization import checkpoint as module

    write(checkpoints, step=1)
    healthy = module.write_bytes
    for fatal in range(5):
        writes = 0

        def failing(path: Path, content: bytes, fatal: int = fatal) -> None:
            nonlocal writes
            if writes == fatal:
                path.write_bytes(content[: len(content) // 2])
                raise DiskFullError
            writes += 1
            healthy(path, content)

        monkeypatch.setattr(module, "write_bytes", failing)
        with pytest.raises(DiskFullError):
            write(checkpoints, step=2)
        assert [path.name for path in checkpoints_in(checkpoints)] == ["step-00000001"]
        assert read_newest_checkpoint(checkpoints).step == 1
    monkeypatch.setattr(module, "write_bytes", healthy)
    write(checkpoints, step=2)
    assert read_newest_checkpoint(checkpoints).step == 2
    assert not list(checkpoints.glob(".*"))


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints: Path) -> None:
    write(checkpoints, value=1.0)
    (checkpoints / "step-00000004" / "stray").touch()
    path = write(checkpoints, value=2.0)
    assert read_checkpoint(path).state["model"]["weight"][0, 0] == 2.0
    assert [entry.name for entry in checkpoints.iterdir()] == ["step-00000004"]
    assert not (path / "stray").exists()


def test_the_newest_whole_one_is_read_and_broken_ones_are_named_and_left(checkpoints: Path) -> None:
    for step in (3, 20, 100):
        write(checkpoints, step)
    (checkpoints / "step-00000100" / "state.json").write_bytes(b"{}")
    (checkpoints / "step-00000200").mkdir()
    with pytest.warns(UserWarning, match="passed over a broken checkpoint") as warned:
        assert read_newest_checkpoint(checkpoints).step == 20
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    assert "step-00000200: not a checkpoint, it has no manifest.json" in messages[0]
    assert "step-00000100/state.json: altered" in messages[1]
    assert (checkpoints / "step-00000100").exists()
    assert [path.name for path in checkpoints_in(checkpoints)] == [*("step-00000003", "step-00000020", "step-00000100")]


def test_a_checkpoint_asked_for_by_name_is_not_replaced_by_another(checkpoints: Path) -> None:
    write(checkpoints, 1)
    newest = write(checkpoints, 2)
    assert read_newest_checkpoint(newest.parent / "step-00000001").step == 1
    (newest / "objects.json").write_bytes(b"{}")
    with pytest.raises(BrokenCheckpointError, match=r"step-00000002/objects\.json"):
        read_newest_checkpoint(newest)


def test_a_folder_without_checkpoints_is_refused(checkpoints: Path) -> None:
    with pytest.raises(UserError, match="found none, expected a whole checkpoint"):
        read_newest_checkpoint(checkpoints)
    (write(checkpoints) / "state.json").unlink()
    with pytest.warns(UserWarning, match="broken"), pytest.raises(UserError, match="found 1 broken ones"):
        read_newest_checkpoint(checkpoints)


def test_leftovers_are_removed_and_nothing_else(checkpoints: Path) -> None:
    write(checkpoints)
    for name in (".partial-step-00000005", ".removing-step-00000003", ".mine"):
        (checkpoints / name).mkdir()
    remove_leftovers(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == [".mine", "step-00000004"]
