"""A checkpoint: one directory that is either whole and proven by digests, or not a checkpoint.

::

    step-00001234/
      objects.json          class and parameters of every object, nested
      state.json            the state's plain values, sorted keys
      model.safetensors     the state's tensors, one file a part
      optimizer.safetensors
      trainer.safetensors
      manifest.json         schema, step, digests, and {file: sha256, bytes}; written last

It is made in a temporary sibling, each file synced, and renamed when it is whole. The same state gives the same bytes.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.durable import replace_directory, sync_directory, write_bytes
from sonosco_mlflow.serialization.state import Json, join_tree, json_bytes, split_tree, tensor_bytes

SCHEMA = 1
MANIFEST = "manifest.json"


class BrokenCheckpointError(UserError):
    """A checkpoint that is not what its manifest says; the message names the directory and the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read.

    Attributes:
        directory: where it lies.
        step: optimizer steps made.
        objects: the document that a Deserializer builds the objects from.
        state: the state's parts by name.
        digests: of what the state belongs to (config, data, code ...).
    """

    directory: Path
    step: int
    objects: Any
    state: dict[str, Any]
    digests: dict[str, str]


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint of ``step``.

    >>> checkpoint_name(1234)
    'step-00001234'
    """
    return f"step-{step:08d}"


def write_checkpoint(
    parent: Path,
    step: int,
    objects: Any,
    state: Mapping[str, object],
    digests: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint under ``parent`` and return its directory.

    Args:
        parent: folder of the run's checkpoints.
        step: optimizer steps made; names the directory. A checkpoint of the same step is replaced.
        objects: a Serializer's document.
        state: parts by name, each a tree of plain data and tensors with a safetensors file of its own.
        digests: kept as they are, for whoever resumes.
    """
    target = parent / checkpoint_name(step)
    partial = parent / f".partial-{checkpoint_name(step)}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    contents: dict[str, bytes] = {"objects.json": json_bytes(objects)}
    documents: dict[str, Json] = {}
    for part, tree in state.items():
        documents[part], tensors = split_tree(tree)
        contents[f"{part}.safetensors"] = tensor_bytes(tensors)
    contents["state.json"] = json_bytes(documents)
    for name, content in contents.items():
        write_bytes(partial / name, content)
    files: Json = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    manifest: Json = {"schema": SCHEMA, "step": step, "files": files, "digests": dict(digests or {})}
    write_bytes(partial / MANIFEST, json_bytes(manifest))
    sync_directory(partial)
    replace_directory(partial, target)
    return target


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte of it.

    Raises:
        BrokenCheckpointError: a file is missing, altered or unreadable, or the schema is unknown; the message names it.
    """
    manifest = _read_manifest(directory)
    contents = {name: _verified(directory / name, entry) for name, entry in manifest["files"].items()}
    try:
        documents = json.loads(contents["state.json"])
        state = {
            part: join_tree(document, safetensors.torch.load(contents[f"{part}.safetensors"]))
            for part, document in documents.items()
        }
        return Checkpoint(directory, manifest["step"], json.loads(contents["objects.json"]), state, manifest["digests"])
    except KeyError as error:
        raise BrokenCheckpointError(f"{directory / MANIFEST}: does not list {error}") from error


def checkpoints_in(parent: Path) -> list[Path]:
    """Return the directories under ``parent`` that hold a complete checkpoint's manifest, oldest first."""
    return sorted(path.parent for path in parent.glob(f"step-*/{MANIFEST}"))


def read_newest_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint in ``path``, or the newest whole one of those that lie in it.

    A broken checkpoint is passed over with a warning that names it, and is left as it is.

    Raises:
        BrokenCheckpointError: ``path`` is itself a checkpoint, and is broken.
        UserError: there is no whole checkpoint.
    """
    if (path / MANIFEST).exists():
        return read_checkpoint(path)
    candidates = sorted(path.glob("step-*"), reverse=True)
    for directory in candidates:
        try:
            return read_checkpoint(directory)
        except BrokenCheckpointError as error:
            warnings.warn(f"passed over a broken checkpoint: {error}", stacklevel=2)
    found = f"{len(candidates)} broken ones" if candidates else "none"
    raise UserError(f"{path}: found {found}, expected a whole checkpoint (a folder step-* with a {MANIFEST})")


def remove_leftovers(parent: Path) -> None:
    """Remove what a crash in the middle of writing or removing left under ``parent``."""
    for pattern in (".partial-step-*", ".removing-step-*"):
        for directory in parent.glob(pattern):
            shutil.rmtree(directory)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["schema"] != SCHEMA:
            raise BrokenCheckpointError(
                f"{path}: schema {manifest['schema']}, this version reads {SCHEMA}; use the version that wrote it"
            )
        if any(Path(name).name != name for name in manifest["files"]):
            raise BrokenCheckpointError(f"{path}: a file name leaves the directory")
        return dict(manifest)
    except FileNotFoundError as error:
        raise BrokenCheckpointError(f"{directory}: not a checkpoint, it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpointError(f"{path}: unreadable ({error})") from error


def _verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise BrokenCheckpointError(f"{path}: missing, though {MANIFEST} lists it") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise BrokenCheckpointError(
            f"{path}: altered: sha256 {digest[:16]}... and {len(content)} bytes, "
            f"expected {entry['sha256'][:16]}... and {entry['bytes']} bytes"
        )
    return content
