import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization import durable
from sonosco_mlflow.serialization.checkpoint import (
    BrokenCheckpointError,
    Snapshot,
    checkpoint_name,
    checkpoints_in,
    position_of,
    quarantine,
    read_checkpoint,
    read_newest_checkpoint,
    remove_leftovers,
    verify_checkpoint,
    write_checkpoint,
)

OBJECTS = {"$object": "somewhere:Thing", "parameters": {}}


def state(value: float = 1.0) -> dict[str, object]:
    return {
        "model": {"weight": torch.full((2, 3), value)},
        "trainer": {"step": 4, "best": float("nan"), "scores": {2: 0.5}, "generator": torch.arange(3)},
    }


def snapshot(step: int = 4, value: float = 1.0, batches: int = 0, parent: str | None = None) -> Snapshot:
    return Snapshot.take(OBJECTS, state(value), step, batches=batches, parent=parent, digests={"config": "c0ffee"})


def write(parent: Path, step: int = 4, value: float = 1.0, batches: int = 0) -> Path:
    return write_checkpoint(parent, snapshot(step, value, batches))


def names(parent: Path) -> list[str]:
    return [path.name for path in checkpoints_in(parent)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_one_under_the_name_of_another_step_is_broken(checkpoints: Path) -> None:
    newer = write(checkpoints, step=4).rename(checkpoints / "step-00000099")
    older = write(checkpoints, step=3)
    with pytest.raises(BrokenCheckpointError, match="step-00000099: is the checkpoint of step 4 under another name"):
        verify_checkpoint(newer)
    with pytest.warns(UserWarning, match="under another name"):
        assert read_newest_checkpoint(checkpoints).directory == older


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
        for read in (read_checkpoint, verify_checkpoint):
            with pytest.raises(BrokenCheckpointError, match=f"{name}: altered"):
                read(path.parent)
    path.write_bytes(whole[:-1])
    with pytest.raises(BrokenCheckpointError, match=f"{name}: altered: .* {len(whole) - 1} bytes, expected"):
        read_checkpoint(path.parent)
    path.unlink()
    for read in (read_checkpoint, verify_checkpoint):
        with pytest.raises(BrokenCheckpointError, match=f"{name}: missing"):
            read(path.parent)


class Dead(Exception):
    pass


class DyingOs:
    """Stands for the module ``os``: nothing but closing works after so many operations."""

    def __init__(self, operations: int) -> None:
        self.left = operations

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in ("open", "write", "fsync", "replace", "unlink", "rmdir", "mkdir"):
            return function

        def operate(*arguments: Any) -> Any:
            if self.left == 0:
                if name == "write":
                    function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Dead
            self.left -= 1
            return function(*arguments)

        return operate


@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
def test_a_crash_at_any_operation_leaves_the_older_one_and_nothing_half(
    replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for operations in range(1000):
        folder = tmp_path / str(operations)
        write(folder, step=1)
        if replaced:
            write(folder, step=2, value=2.0)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", DyingOs(operations))
            try:
                write(folder, step=2, value=3.0)
            except Dead:
                died = True
            else:
                died = False
        newest = read_newest_checkpoint(folder)
        assert newest.step in (1, 2)
        assert newest.state["model"]["weight"][0, 0] in {1: [1.0], 2: [2.0, 3.0]}[newest.step]
        for path in checkpoints_in(folder):
            verify_checkpoint(path)
        remove_leftovers(folder)
        write(folder, step=2, value=3.0)
        assert [path.name for path in sorted(folder.iterdir())] == ["step-00000001", "step-00000002"]
        assert read_newest_checkpoint(folder).state["model"]["weight"][0, 0] == 3.0
        if not died:
            break
    assert operations > 20


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints: Path) -> None:
    write(checkpoints, value=1.0)
    (checkpoints / "step-00000004" / "stray").touch()
    path = write(checkpoints, value=2.0)
    assert read_checkpoint(path).state["model"]["weight"][0, 0] == 2.0
    assert [entry.name for entry in checkpoints.iterdir()] == ["step-00000004"]
    assert not (path / "stray").exists()


def test_what_is_there_already_is_not_touched(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(checkpoints)
    monkeypatch.setattr(durable, "os", DyingOs(0))
    assert write(checkpoints) == path


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "model.safetensors"])
def test_a_broken_one_of_the_same_content_is_written_again(name: str, checkpoints: Path) -> None:
    path = write(checkpoints)
    expected = contents(path)
    (path / name).write_bytes(b"{}")
    assert contents(write(checkpoints)) == expected
    (path / name).unlink()
    assert contents(write(checkpoints)) == expected


def test_the_manifest_tells_what_the_checkpoint_is_and_what_came_before_it(checkpoints: Path) -> None:
    path = write_checkpoint(checkpoints, snapshot(batches=2, parent="step-00000003"))
    files = {name: content for name, content in contents(path).items() if name != "manifest.json"}
    assert path.name == "step-00000004.0002"
    assert json.loads((path / "manifest.json").read_text()) == {
        "schema": 3,
        "step": 4,
        "parent": "step-00000003",
        "digests": {"config": "c0ffee"},
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in files.items()
        },
    }
    assert json.loads((write(checkpoints) / "manifest.json").read_text())["parent"] is None


def test_a_snapshot_is_what_the_state_was(checkpoints: Path) -> None:
    weight = torch.ones(2)
    state: dict[str, Any] = {"model": {"weight": weight}, "trainer": {"steps": [1]}}
    taken = Snapshot.take(OBJECTS, state, 4)
    weight.zero_()
    state["trainer"]["steps"].append(2)
    read = read_checkpoint(write_checkpoint(checkpoints, taken)).state
    assert read["model"]["weight"].tolist() == [1.0, 1.0]
    assert read["trainer"]["steps"] == [1]


def test_names_are_positions_and_sort_by_number(checkpoints: Path) -> None:
    positions = [(0, 0), (7, 0), (7, 2), (7, 10), (7, 12345), (8, 0), (99_999_999, 0), (100_000_000, 3), (10**12, 0)]
    made = [checkpoint_name(*position) for position in positions]
    assert made[:4] == ["step-00000000", "step-00000007", "step-00000007.0002", "step-00000007.0010"]
    assert made[-2:] == ["step-100000000.0003", "step-1000000000000"]
    assert [position_of(name) for name in made] == positions
    for name in reversed(made):
        (checkpoints / name).mkdir(parents=True)
    strangers = ["step-7", "step-00000007.2", "step-0000000x", ".partial-step-00000007", "broken-step-00000007-1"]
    # Other spellings of a position that has a name: two directories must not claim the same one.
    strangers += ["step-000000007", "step-00000007.0000", "step-00000007.00002", "step-\u0660000000\u0667"]
    for name in strangers:
        (checkpoints / name).mkdir()
    assert names(checkpoints) == made
    assert [position_of(name) for name in strangers] == [None] * len(strangers)


def test_the_newest_is_the_one_furthest_into_the_step(checkpoints: Path) -> None:
    for step, batches in ((4, 2), (4, 10), (4, 0), (3, 11)):
        write(checkpoints, step, value=step + batches / 100, batches=batches)
    assert read_newest_checkpoint(checkpoints).directory.name == "step-00000004.0010"
    write(checkpoints, 5)
    assert read_newest_checkpoint(checkpoints).step == 5


def test_a_broken_one_is_put_aside_and_stays(checkpoints: Path) -> None:
    for number in (1, 2):
        path = write(checkpoints, value=number)
        (path / "state.json").write_bytes(b"{}")
        put = quarantine(path)
        assert put == checkpoints / f"broken-step-00000004-{number}"
        assert contents(put)["state.json"] == b"{}"
    assert names(checkpoints) == []
    write(checkpoints)
    remove_leftovers(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        *("broken-step-00000004-1", "broken-step-00000004-2", "step-00000004")
    ]


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
    assert names(checkpoints) == [f"step-{step:08d}" for step in (3, 20, 100, 200)]


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
    # A fetch from MLflow brings the checkpoint's own folder.
    shutil.copytree(checkpoints / "step-00000004", checkpoints / ".partial-step-00000005" / "step-00000005")
    remove_leftovers(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == [".mine", "step-00000004"]


def test_what_a_crash_behind_the_last_rename_left_is_in_nobodys_way(checkpoints: Path) -> None:
    write(checkpoints)
    leftover = checkpoints / ".removing-step-00000004"
    leftover.mkdir()
    (leftover / "file").touch()
    path = write(checkpoints, value=2.0)
    assert torch.equal(read_checkpoint(path).state["model"]["weight"], torch.full((2, 3), 2.0))
    assert [entry.name for entry in checkpoints.iterdir()] == ["step-00000004"]
