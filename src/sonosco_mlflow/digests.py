"""By what a file's content is known."""

import hashlib
from pathlib import Path


def file_digest(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content, which is read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
