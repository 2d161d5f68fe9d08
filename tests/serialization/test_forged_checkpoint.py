"""Checkpoints that are nonsense, though their manifest may prove every byte of it: refused by name, and never run."""

import hashlib
import json
import os
import pickle
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sonosco_mlflow.serialization.checkpoint import (
    BrokenCheckpointError,
    Snapshot,
    read_checkpoint,
    read_newest_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)


def write(parent: Path, step: int = 4, value: float = 1.0) -> Path:
    state = {"model": {"weight": torch.full((2, 3), value)}, "trainer": {"step": step}}
    return write_checkpoint(parent, Snapshot.take({"$object": "somewhere:Thing", "parameters": {}}, state, step))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda manifest: manifest.pop("files"), "unreadable"),
        (lambda manifest: manifest.pop("schema"), "unreadable"),
        (lambda manifest: manifest.update(schema=0), "its schema is 0, expected a number from 1 to 3"),
        (lambda manifest: manifest.update(schema="3"), "its schema is '3', expected a number"),
        (lambda manifest: manifest.update(schema=None), "its schema is None, expected a number"),
        (lambda manifest: manifest.update(files=list(manifest["files"])), "unreadable"),
        (lambda manifest: manifest.update(files=None), "unreadable"),
        (lambda manifest: manifest.update(files="ab"), "unreadable"),
        (lambda manifest: manifest.update(digests=3), "content is not a state"),
        (lambda manifest: manifest.pop("step"), "'step'"),
        (lambda manifest: manifest.update(step="four"), "step"),
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


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "no UTF-8", "deep"],
)
def test_a_manifest_that_is_none_is_refused(content: bytes, checkpoints: Path) -> None:
    path = write(checkpoints) / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=r"manifest\.json: unreadable"):
        read_checkpoint(path.parent)


def forge(parent: Path, changed: dict[str, bytes]) -> Path:
    """Write a checkpoint, change its files, and make the manifest prove them."""
    path = write(parent)
    manifest = json.loads((path / "manifest.json").read_text())
    for name, content in changed.items():
        (path / name).write_bytes(content)
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    verify_checkpoint(path)
    return path


def refused(path: Path, match: str | None = None) -> None:
    """It is broken when asked for, and passed over when another is there."""
    with pytest.raises(BrokenCheckpointError, match=match):
        read_checkpoint(path)
    write(path.parent, step=1)
    with pytest.warns(UserWarning, match="passed over a broken checkpoint"):
        assert read_newest_checkpoint(path.parent).step == 1


def tensor_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one_tensor(dtype: str, shape: list[int], size: int) -> bytes:
    return tensor_file({"weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, bytes(size))


DEEP = b"[" * 100_000 + b"]" * 100_000
TENSORS = {
    "empty": b"",
    "a header of 10 GB": struct.pack("<Q", 10 * 2**30) + b"{}",
    "a header of 2^64": b"\xff" * 8 + b"{}",
    "a header that is no JSON": tensor_file(b"{{{{"),
    "a header that is deep": tensor_file(DEEP),
    "a list as header": tensor_file([]),
    "a tensor of 10 GB": tensor_file({"weight": {"dtype": "F32", "shape": [10 * 2**28], "data_offsets": [0, 4]}}),
    "a shape that does not fit": one_tensor("F32", [3], 4),
    "a shape below zero": one_tensor("F32", [-1], 4),
    "a shape beyond numbers": one_tensor("F32", [0, 2**63 - 1, 8], 0),
    "offsets that overlap": tensor_file(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("weight", "other")}, bytes(4)
    ),
    "a type that torch lacks": one_tensor("F4", [2], 1),
    "a type that nobody has": one_tensor("X9", [1], 4),
    "other tensors": safetensors.torch.save({"other": torch.ones(1)}),
    "JSON": b"{}",
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_file_that_holds_no_tensors(kind: str, checkpoints: Path) -> None:
    refused(forge(checkpoints, {"model.safetensors": TENSORS[kind]}))


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_opened(checkpoints: Path, tmp_path: Path) -> None:
    struck = tmp_path / "struck"
    pickled = pickle.dumps(Payload(struck))
    torch.save({"weight": Payload(struck)}, tmp_path / "saved.pt")
    for content in (pickled, (tmp_path / "saved.pt").read_bytes()):
        for name in ("model.safetensors", "state.json", "objects.json"):
            refused(forge(checkpoints, {name: content}))
            path = write(checkpoints)
            (path / "manifest.json").write_bytes(content)
            refused(path)
    assert not struck.exists()
    pickle.loads(pickled)
    assert struck.exists(), "the payload proves nothing if it does not work"


STATES = {
    "nothing": b"",
    "null": b"null",
    "a number": b"3",
    "a text": b'"model"',
    "a list": b"[]",
    "no UTF-8": b"\xff\xfe",
    "deep lists": b'{"model": ' + DEEP + b"}",
    "a depth that JSON bears": b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a part without a file": b'{"other": {}}',
    "a part outside": b'{"../model": {}}',
    "a tensor that is not there": b'{"model": {"$tensor": "missing"}}',
    "a float that is none": b'{"model": {"$float": "one"}}',
    "a pair of one": b'{"model": {"$pairs": [[1]]}}',
    "a pair that is a number": b'{"model": {"$pairs": [1]}}',
    "a pair with a list as key": b'{"model": {"$pairs": [[[], 1]]}}',
    "a number of 5000 digits": b'{"model": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", STATES)
def test_a_file_that_holds_no_state(kind: str, checkpoints: Path) -> None:
    refused(forge(checkpoints, {"state.json": STATES[kind]}))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", DEEP], ids=["empty", "cut", "no UTF-8", "deep"])
def test_a_file_that_holds_no_objects(content: bytes, checkpoints: Path) -> None:
    refused(forge(checkpoints, {"objects.json": content}), "content is not a state")


OUTSIDE = ["../x", "/etc/passwd", "a/../../b", "sub/file", "..", ".", "", "../model.safetensors", "a\0b", "x" * 300]


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_a_manifest_lists_files_of_its_own_directory_only(
    name: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(checkpoints)
    manifest = json.loads((path / "manifest.json").read_text())
    content = b"secret"
    (path.parent / "x").write_bytes(content)
    (path / "sub").mkdir()
    (path / "sub" / "file").write_bytes(content)
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    for read in (read_checkpoint, verify_checkpoint):
        with pytest.raises(BrokenCheckpointError, match=r"step-00000004"):
            read(path)


ENTRIES: dict[str, Any] = {
    "null": None,
    "a list": [],
    "a text": "sha256",
    "no digest": {"bytes": 35},
    "no size": {"sha256": True},
    "a digest that is none": {"sha256": None, "bytes": True},
    "a size of 2^70": {"sha256": True, "bytes": 2**70},
    "a size below zero": {"sha256": True, "bytes": -1},
    "a size that is another": {"sha256": True, "bytes": 1},
    "a size that is infinite": {"sha256": True, "bytes": float("inf")},
    "a size that is no number": {"sha256": True, "bytes": float("nan")},
    "a size that is a list": {"sha256": True, "bytes": []},
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_entry_of_the_manifest_that_is_none(kind: str, checkpoints: Path) -> None:
    path = write(checkpoints)
    manifest = json.loads((path / "manifest.json").read_text())
    right = manifest["files"]["state.json"]
    entry = ENTRIES[kind]
    if isinstance(entry, dict):
        entry = {key: right[key] if value is True else value for key, value in entry.items()}
    manifest["files"]["state.json"] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpointError, match=r"state\.json"):
        verify_checkpoint(path)
    refused(path, r"state\.json")


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_directory_in_the_place_of_a_file(name: str, checkpoints: Path) -> None:
    path = write(checkpoints)
    (path / name).unlink()
    (path / name).mkdir()
    refused(path, name)


def test_a_link_is_as_good_as_the_bytes_that_it_leads_to(checkpoints: Path, tmp_path: Path) -> None:
    """A cache of files, as DVC's, puts links in their places: the digest decides, not the way."""
    path = write(checkpoints)
    cached = tmp_path / "cached"
    (path / "state.json").rename(cached)
    (path / "state.json").symlink_to(cached)
    assert read_checkpoint(path).step == 4
    cached.write_bytes(b"{}")
    refused(path, r"state\.json: altered")
    cached.unlink()
    refused(path, r"state\.json: missing")
    (path / "state.json").unlink()
    (path / "state.json").symlink_to(tmp_path)
    refused(path, r"state\.json")
    (path / "state.json").unlink()
    (path / "state.json").symlink_to("state.json")
    refused(path, r"state\.json")


def test_what_has_no_end_is_not_read(checkpoints: Path) -> None:
    path = write(checkpoints)
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")
    found: list[Exception] = []

    def verify() -> None:
        try:
            verify_checkpoint(path)
        except BrokenCheckpointError as error:
            found.append(error)

    thread = threading.Thread(target=verify, daemon=True)
    thread.start()
    thread.join(0.2)
    if thread.is_alive():
        # Lets it go: the other end of the pipe is opened and closed.
        (path / "state.json").write_bytes(b"")
        thread.join()
        pytest.fail("it waits for a pipe")
    assert len(found) == 1


def test_what_is_larger_than_it_should_be_is_not_read(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(checkpoints)
    size = (path / "model.safetensors").stat().st_size
    os.truncate(path / "model.safetensors", 2**32)
    read = Path.read_bytes

    def read_small(file: Path) -> bytes:
        assert file.stat().st_size < 2**20
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", read_small)
    refused(path, rf"model\.safetensors: altered: it has {2**32} bytes, expected {size}")


def test_replacing_a_checkpoint_removes_links_and_not_what_they_lead_to(checkpoints: Path, tmp_path: Path) -> None:
    path = write(checkpoints)
    cached = tmp_path / "cached"
    (path / "state.json").rename(cached)
    (path / "state.json").symlink_to(cached)
    before = cached.read_bytes()
    write(checkpoints, value=2.0)
    assert cached.read_bytes() == before
    assert not (path / "state.json").is_symlink()
