"""A checkpoint: one directory that is either whole and proven by digests, or not a checkpoint.

::

    step-00001234/
      objects.json          class and parameters of every object, nested
      state.json            the state's plain values, sorted keys
      model.safetensors     the state's tensors, one file a part
      optimizer.safetensors
      trainer.safetensors
      manifest.json         schema, step, parent, digests, and {file: sha256, bytes}; written last

It is made in a temporary sibling, each file synced, and renamed when it is whole. The same state gives the same bytes.
State that was taken between two optimizer steps has the number of batches since the last one behind the step's:
``step-00001234.0002``.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.durable import (
    clear_directory,
    make_directory,
    rename,
    sync_directory,
    write_bytes,
)
from sonosco_mlflow.serialization.migrations import MIGRATIONS, SCHEMA
from sonosco_mlflow.serialization.state import Json, join_tree, json_bytes, split_tree, tensor_bytes

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, on its disk and among its artifacts."""
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d{4,}))?")


class BrokenCheckpointError(UserError):
    """A checkpoint that is not what its manifest says; the message names the directory and the file."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is not written yet: the state as it was at one moment, whatever happens to the objects since.

    Attributes:
        step: optimizer steps made.
        batches: batches of the unfinished optimizer step.
        objects: the document that a Deserializer builds the objects from.
        documents: the plain values of each part of the state.
        tensors: the tensors of each part, owned.
        parent: name of the checkpoint before it, or None.
        digests: of what the state belongs to (config, data, code ...).
    """

    step: int
    objects: Any
    documents: dict[str, Json]
    tensors: dict[str, dict[str, Tensor]]
    batches: int = 0
    parent: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def take(
        cls,
        objects: Any,
        state: Mapping[str, object],
        step: int,
        *,
        batches: int = 0,
        parent: str | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> "Snapshot":
        """Copy ``state``: parts by name, each a tree of plain data and tensors."""
        split = {part: split_tree(tree, copy=True) for part, tree in state.items()}
        return cls(
            step=step,
            objects=objects,
            documents={part: document for part, (document, _) in split.items()},
            tensors={part: tensors for part, (_, tensors) in split.items()},
            batches=batches,
            parent=parent,
            digests=dict(digests or {}),
        )

    @property
    def name(self) -> str:
        """The name of its directory."""
        return checkpoint_name(self.step, self.batches)


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

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Return a block in which the state is given to objects: what does not fit is said to be of this checkpoint.

        Raises:
            UserError: something failed in the block.
        """
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.directory}: {error}") from error
        except KeyError as error:
            raise UserError(f"{self.directory}: the state lacks {error}") from error
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            message = f"{self.directory}: the state does not fit what it is loaded into: {error}"
            raise UserError(message) from error


def checkpoint_name(step: int, batches: int = 0) -> str:
    """Return the directory name of the checkpoint of ``step``, ``batches`` into the next one.

    >>> checkpoint_name(1234)
    'step-00001234'
    """
    return f"step-{step:08d}.{batches:04d}" if batches else f"step-{step:08d}"


def position_of(name: str) -> tuple[int, int] | None:
    """Return step and batches that a checkpoint's name states, or None if it is no checkpoint's name."""
    match = _NAME.fullmatch(name)
    position = (int(match[1]), int(match[2] or 0)) if match else None
    # A position has one name only: another spelling of it is a stranger's.
    return position if position is not None and checkpoint_name(*position) == name else None


def checkpoints_in(parent: Path) -> list[Path]:
    """Return the directories under ``parent`` that are named as checkpoints are, oldest first; they may be broken."""
    if not parent.is_dir():
        return []
    positions = {path: position_of(path.name) for path in parent.iterdir()}
    return sorted((path for path, position in positions.items() if position is not None), key=lambda p: positions[p])  # type: ignore[arg-type, return-value]


def write_checkpoint(parent: Path, snapshot: Snapshot) -> Path:
    """Write ``snapshot`` under ``parent`` and return its directory; a checkpoint of the same name is replaced."""
    target = parent / snapshot.name
    partial = parent / f".partial-{snapshot.name}"
    contents: dict[str, bytes] = {"objects.json": json_bytes(snapshot.objects)}
    for part, tensors in snapshot.tensors.items():
        contents[f"{part}.safetensors"] = tensor_bytes(tensors)
    contents["state.json"] = json_bytes(snapshot.documents)
    files: Json = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    manifest: Json = {
        "schema": SCHEMA,
        "step": snapshot.step,
        "parent": snapshot.parent,
        "files": files,
        "digests": dict(snapshot.digests),
    }
    proof = json_bytes(manifest)
    if _is_proven_by(proof, target):
        # A run that repeats its way after a crash comes by here again.
        return target
    make_directory(parent)
    if partial.exists():
        clear_directory(partial)
    make_directory(partial)
    for name, content in contents.items():
        write_bytes(partial / name, content)
    write_bytes(partial / MANIFEST, proof)
    sync_directory(partial)
    superseded = parent / f".removing-{snapshot.name}"
    if superseded.exists():
        # A crash left it.
        clear_directory(superseded)
    if target.exists():
        rename(target, superseded)
    rename(partial, target)
    if superseded.exists():
        clear_directory(superseded)
    return target


def _is_proven_by(manifest: bytes, directory: Path) -> bool:
    path = directory / MANIFEST
    if not path.is_file() or path.read_bytes() != manifest:
        return False
    try:
        verify_checkpoint(directory)
    except BrokenCheckpointError:
        return False
    return True


def verify_checkpoint(directory: Path) -> None:
    """Read back every byte of a checkpoint and compare it with the manifest.

    Raises:
        BrokenCheckpointError: a file is missing, altered or unreadable; the message names it.
        UserError: a later version of this package wrote it.
    """
    for name, entry in _read_manifest(directory)["files"].items():
        _verified(directory / name, entry)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte of it.

    Raises:
        BrokenCheckpointError: a file is missing, altered or unreadable, or it is not of the step that its directory is
            named after; the message names it.
        UserError: a later version of this package wrote it.
    """
    manifest = _read_manifest(directory)
    contents = {name: _verified(directory / name, entry) for name, entry in manifest["files"].items()}
    try:
        documents = json.loads(contents["state.json"])
        objects = json.loads(contents["objects.json"])
        state = {
            part: join_tree(document, safetensors.torch.load(contents[f"{part}.safetensors"]))
            for part, document in documents.items()
        }
        for schema in range(manifest["schema"], SCHEMA):
            objects, state = MIGRATIONS[schema](objects, state)
        return Checkpoint(directory, manifest["step"], objects, state, dict(manifest["digests"]))
    except KeyError as error:
        raise BrokenCheckpointError(f"{directory / MANIFEST}: does not list {error}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError, SafetensorError) as error:
        raise BrokenCheckpointError(f"{directory}: digests right, but its content is not a state: {error}") from error


def read_newest_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint in ``path``, or the newest whole one of those that lie in it.

    A broken checkpoint is passed over with a warning that names it, and is left as it is.

    Raises:
        BrokenCheckpointError: ``path`` is itself a checkpoint, and is broken.
        UserError: there is no whole checkpoint.
    """
    if (path / MANIFEST).exists():
        return read_checkpoint(path)
    candidates = checkpoints_in(path)
    for directory in reversed(candidates):
        try:
            return read_checkpoint(directory)
        except BrokenCheckpointError as error:
            warnings.warn(f"passed over a broken checkpoint: {error}", stacklevel=2)
    found = f"{len(candidates)} broken ones" if candidates else "none"
    raise UserError(f"{path}: found {found}, expected a whole checkpoint (a folder step-* with a {MANIFEST})")


def quarantine(directory: Path) -> Path:
    """Put a broken checkpoint out of the way, beside the others, and return where it lies now."""
    number = 1
    while (target := directory.with_name(f"broken-{directory.name}-{number}")).exists():
        number += 1
    rename(directory, target)
    return target


def remove_leftovers(parent: Path) -> None:
    """Remove what a crash in the middle of writing, fetching or removing left under ``parent``."""
    for pattern in (".partial-step-*", ".removing-step-*"):
        for directory in parent.glob(pattern):
            clear_directory(directory)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(_content(path))
        schema = manifest["schema"]
        if isinstance(schema, int) and schema > SCHEMA:
            # It may be whole, and newer than all others: nothing may go on without it.
            raise UserError(f"{path}: schema {schema}, this version reads 1 to {SCHEMA}; use the version that wrote it")
        if schema not in range(1, SCHEMA + 1):
            raise BrokenCheckpointError(f"{path}: its schema is {schema!r}, expected a number from 1 to {SCHEMA}")
        if any(Path(name).name != name for name in manifest["files"].keys()):  # noqa: SIM118
            raise BrokenCheckpointError(f"{path}: a file name leaves the directory")
        if not isinstance(manifest["step"], int):
            raise BrokenCheckpointError(f"{path}: its step is {manifest['step']!r}, expected a number")
        position = position_of(directory.name)
        if position is not None and position[0] != manifest["step"]:
            raise BrokenCheckpointError(f"{directory}: is the checkpoint of step {manifest['step']} under another name")
        return dict(manifest)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BrokenCheckpointError(f"{directory}: not a checkpoint, it has no {MANIFEST}") from error
    except OSError as error:
        raise BrokenCheckpointError(f"{path}: cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{path}: unreadable ({error})") from error


def _content(path: Path, size: int | None = None) -> bytes:
    # A pipe or a device would be waited for, or never end.
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is no file")
    found = path.stat().st_size
    if size is not None and found != size:
        # It may be larger than the memory is.
        raise BrokenCheckpointError(f"{path}: altered: it has {found} bytes, expected {size}")
    return path.read_bytes()


def _verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    try:
        expected, size = str(entry["sha256"]), int(entry["bytes"])
        content = _content(path, size)
    except FileNotFoundError as error:
        raise BrokenCheckpointError(f"{path}: missing, though {MANIFEST} lists it") from error
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise BrokenCheckpointError(f"{path}: cannot be read or checked ({error!r})") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise BrokenCheckpointError(f"{path}: altered: sha256 {digest[:16]}..., expected {expected[:16]}...")
    return content
