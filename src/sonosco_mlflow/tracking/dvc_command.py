"""The command ``dvc``, which begins although a DVC that was killed has left one of its own files cut short.

DVC writes ``dvc.lock`` and ``.dvc/tmp/rwlock``, its list of what is in use, in place: it empties the file first. Killed
before all is written, it leaves what every later DVC refuses to read.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from sonosco_mlflow.tracking.file_lock import locked


def main() -> int:
    """Remove what is cut short in the project around the current folder, then do what DVC does."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".dvc").is_dir():
            remove_torn(folder)
            break
    from dvc.cli import main as dvc

    return int(dvc(sys.argv[1:]))


def remove_torn(workspace: Path) -> None:
    """Remove DVC's lock file of the stages, and its list of what is in use, if a kill has cut them short.

    What the stages have made is in DVC's cache all the same, and they are taken from there. A lock file that is broken
    in another way, by a conflict of a merge for example, stays for DVC to name.

    Args:
        workspace: the folder with ``dvc.yaml``.
    """
    guards = workspace / ".dvc" / "tmp"
    _remove_if(_is_torn_lock, workspace / "dvc.lock", guards / "lock")
    _remove_if(_is_torn_json, guards / "rwlock", guards / "rwlock.lock")


def _remove_if(torn: Callable[[Path], bool], path: Path, guard: Path) -> None:
    if path.is_file() and torn(path):
        # DVC's own guard of that file: one that is alive may be writing it now.
        with locked(guard):
            if path.is_file() and torn(path):
                path.unlink()


def _is_torn_lock(path: Path) -> bool:
    content = path.read_bytes()
    # Whole, it ends with a line end, and hardly ever with a key that has nothing.
    if content.endswith(b"\n") and not content.endswith(b":\n"):
        return False
    # It takes a third of a second to import.
    from dvc.dvcfile import Lockfile
    from dvc.exceptions import DvcException
    from dvc.utils.serialize import parse_yaml

    try:
        Lockfile.validate(parse_yaml(content.decode("utf-8", "replace"), str(path)), str(path))
    except DvcException:
        return True
    return False


def _is_torn_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
