"""What a run keeps, by digest: each of its artifacts, and each file of its models.

The ledger is itself an artifact, ``ledger.json``, written when everything else is there; a tag of the run has its
sha256. Whoever can write to a tracking store can write both, so this finds what was damaged, lost or altered by
mistake; it is no signature.

::

    {"checkpoints/step-00000012/model.safetensors": {"sha256": "8b0c...", "bytes": 51234}, ...}
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from sonosco_mlflow.digests import file_digest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.store import artifact_bytes, models_of

LEDGER = "ledger.json"


@dataclass(frozen=True)
class Entry:
    """The digest and size of a file."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> "Entry":
        """Return the entry of a file on this machine."""
        return cls(file_digest(path), path.stat().st_size)


class Ledger:
    """What is known of the files of a run.

    Args:
        run_id: the run.

    Attributes:
        entries: by the name of an artifact, or the address ``models:/<id>/<file>`` of a file of a model.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.entries: dict[str, Entry] = {}

    @classmethod
    def read(cls, run_id: str, digest: str) -> "Ledger":
        """Return the ledger that a run keeps.

        Raises:
            UserError: there is none, or it is not the one with that sha256.
        """
        ledger = cls(run_id)
        content = artifact_bytes(run_id, LEDGER)
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise UserError(f"{LEDGER}: altered: sha256 {found[:16]}..., the run's tag says {digest[:16]}...")
        ledger.entries = {name: Entry(**entry) for name, entry in json.loads(content).items()}
        return ledger

    def only(self, folder: str) -> "Ledger":
        """Return the part of it that is about an artifact folder."""
        part = Ledger(self.run_id)
        part.entries = {name: entry for name, entry in self.entries.items() if name.startswith(f"{folder}/")}
        return part

    def forget(self, name: str) -> None:
        """Note that the artifact ``name``, file or folder, is gone, or is no longer what it was."""
        # The deliverer's thread and the training's both write here.
        for known in list(self.entries):
            if known == name or known.startswith(f"{name}/"):
                self.entries.pop(known, None)

    def complete(self) -> bytes:
        """Return the ledger of all that stands in the store, as JSON; what is not known yet is read from there."""
        files = sorted(stored_files(self.run_id), key=lambda file: file.name)
        entries = {file.name: asdict(self.entries.get(file.name) or file.entry()) for file in files}
        return (json.dumps(entries, indent=1) + "\n").encode()


@dataclass(frozen=True)
class StoredFile:
    """A file in the artifact store.

    Attributes:
        name: as a ledger has it.
        root: address of the artifacts that it is among.
        path: below ``root``.
    """

    name: str
    root: str
    path: str

    def entry(self) -> Entry:
        """Read the file and return its digest and size."""
        with tempfile.TemporaryDirectory() as scratch:
            repository = get_artifact_repository(self.root)
            return Entry.of(Path(repository.download_artifacts(self.path, scratch)))  # type: ignore[no-untyped-call]


def stored_files(run_id: str) -> Iterator[StoredFile]:
    """Yield every artifact of a run, the ledger aside, and every file of its models."""
    run = mlflow.MlflowClient().get_run(run_id)
    for path in _paths(run.info.artifact_uri):
        if path != LEDGER:
            yield StoredFile(path, run.info.artifact_uri, path)
    for model in models_of(run_id):
        for path in _paths(model.artifact_location):
            yield StoredFile(f"models:/{model.model_id}/{path}", model.artifact_location, path)


def _paths(root: str) -> Iterator[str]:
    repository = get_artifact_repository(root)
    folders: list[str | None] = [None]
    while folders:
        for item in repository.list_artifacts(folders.pop()):
            if item.is_dir:
                folders.append(item.path)
            else:
                yield item.path
