"""The language model that a run decodes its test set with: kept as an artifact, and brought back from there."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from sonosco_mlflow.decoding.arpa import unpacked
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.segments import Segment
from sonosco_mlflow.tracking.store import artifact_bytes, artifact_names
from sonosco_mlflow.tracking.tags import LANGUAGE_MODEL_DIGEST

_FOLDER = "decoding"
_NAME = "language_model.arpa"


@dataclass(frozen=True)
class KeptModel:
    """The content of an ARPA file, as it is without packing."""

    content: bytes

    def log(self, run: TrackedRun, folder: str = "") -> None:
        """Log it as an artifact of ``run`` in ``folder`` (empty, or ending in a slash), and its sha256 as a tag."""
        run.log_bytes(self.content, f"{folder}{_FOLDER}/{_NAME}")
        run.set_tags({LANGUAGE_MODEL_DIGEST: hashlib.sha256(self.content).hexdigest()})


def kept_model_of(search: Search) -> KeptModel | None:
    """Return what a run keeps of a search's language model; None without one, or where it was read from no file."""
    path = getattr(search.language_model, "path", None)
    return None if path is None else KeptModel(unpacked(path))


def require_language_model(segment: Segment, path: Path) -> Path:
    """Write the language model that a segment of a run has kept to ``path``, and return that.

    Raises:
        UserError: it has kept none.
    """
    folder = f"{segment.folder}{_FOLDER}"
    if _NAME not in artifact_names(segment.run_id, folder):
        raise UserError(
            f"run {segment.run_id} has not kept its language model ({folder}/{_NAME}); name a file by "
            "--set decoding.language_model=PATH"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(artifact_bytes(segment.run_id, f"{folder}/{_NAME}"))
    return path
