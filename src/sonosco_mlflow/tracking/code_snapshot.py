"""The code of a run, exactly as it ran.

The snapshot holds every file that git tracks and every untracked one that it does not ignore, as they are in the
working tree: the commit alone would not say what ran. Beside it stand the commit, and what turns it into what ran.
Code that was imported from elsewhere is in it too (:mod:`.imported_code`).

>>> snapshot = snapshot_code(Path())                       # doctest: +SKIP
>>> unpack(snapshot.archive, Path("/tmp/then"))            # doctest: +SKIP
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from sonosco_mlflow.digests import file_digest
from sonosco_mlflow.tracking.code_archive import Packing, archived_files, largest_files
from sonosco_mlflow.tracking.imported_code import (
    CODE,
    ImportedCode,
    compiled_imports,
    ignored_imports,
    imported_code,
    is_the_programs,
)
from sonosco_mlflow.tracking.repository import (
    changed_files,
    listed_files,
    patch_of,
    repository_of,
    submodules,
)
from sonosco_mlflow.tracking.secrecy import without_secrets

# The recipe and the data have digests of their own: a run with other parameters does not run other code.
_RECIPE = frozenset({"params.yaml", "dvc.lock"})
# Where the output of a command is often led, of this one as well.
_LOGS = frozenset({".log", ".out"})
# Code alone seldom takes as much.
_REMARKABLE_BYTES = 32 * 1024 * 1024
# What runs write beside the code, where git is not told to ignore it.
_OUTPUT = frozenset({"mlruns", "mlartifacts", ".sonosco"})
_BESIDE_DATABASES = ("", "-journal", "-wal", "-shm", ".lock")
_RUN_FOLDER = re.compile(r".+-[0-9a-f]{6}")


@dataclass(frozen=True)
class CodeSnapshot:
    """The code of a run.

    Attributes:
        root: folder that the names in the archive start from.
        archive: bytes of a zip of all files; equal files give equal bytes.
        digest: sha256 over names, modes and contents, save the recipe's, ``dvc.lock``'s and those of logs, of the
            repository and this package.
        imported_digest: the same of what else the program has imported; empty where that is nothing.
        patch: the difference to the commit, for ``git apply``; untracked texts are new files in it.
        commit: hexadecimal id, or None outside git or before the first commit.
        branch: its name, or None when detached or outside git.
        remote: address of ``origin`` without credentials, or None.
        dirty: whether code differs from the commit, untracked files included.
        submodules: commit of each, by path; their files are in the archive.
        imported: what the process had imported by then.
        left_out: mode and sha256 of each file of code that is too large for the archive, or looks like a secret.
        withheld: files that look like secrets; nothing of them is kept.
        unpatched: changed files that the patch is silent on: they are left out, or what was committed would be.
    """

    root: Path
    archive: bytes
    digest: str
    imported_digest: str = ""
    patch: bytes = b""
    commit: str | None = None
    branch: str | None = None
    remote: str | None = None
    dirty: bool = True
    submodules: dict[str, str] = field(default_factory=dict)
    imported: ImportedCode = field(default_factory=lambda: ImportedCode({}, {}))
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    withheld: list[str] = field(default_factory=list)
    unpatched: list[str] = field(default_factory=list)

    def git_json(self) -> str:
        """Return the facts beside the archive as JSON."""
        facts = {
            "commit": self.commit,
            "branch": self.branch,
            "remote": self.remote,
            "dirty": self.dirty,
            "submodules": self.submodules,
            "code_digest": self.digest,
            "left_out": self.left_out,
            "withheld": self.withheld,
            "unpatched": self.unpatched,
        }
        return json.dumps(facts, indent=1, sort_keys=True) + "\n"


def snapshot_code(folder: Path) -> CodeSnapshot:
    """Take the snapshot of the repository that ``folder`` is in; outside git, of what this process has imported.

    Files that look like secrets are named by a warning and left out.
    """
    folder = folder.resolve()
    repository = repository_of(folder)
    if repository is None:
        imported = imported_code(folder, in_git=False)
        _warn_of_compiled({*imported.files.values()})
        return _packed(folder, imported, {})
    with repository:
        root = Path(repository.working_dir)
        is_output = _output_of(folder)
        listed = listed_files(repository, is_output)
        imported = imported_code(root, in_git=True)
        packed = _packed(root, imported, listed)
        _warn_of_compiled({*listed.values(), *imported.files.values()})
        ignored = ignored_imports(root, {*listed.values()})
        if ignored:
            warnings.warn(
                f"imported, and not in the run's code, because git ignores it: {', '.join(map(str, ignored))}",
                stacklevel=2,
            )
        patch, unpatched = patch_of(repository, {*packed.withheld, *packed.left_out}, is_output)
        changed = changed_files(repository, is_output)
        return replace(
            packed,
            patch=patch,
            unpatched=unpatched,
            commit=repository.head.commit.hexsha if repository.head.is_valid() else None,
            branch=None if repository.head.is_detached else repository.active_branch.name,
            remote=without_secrets(repository.remotes.origin.url) if "origin" in repository.remotes else None,
            dirty=not repository.head.is_valid() or any(is_code(name, listed) for name in changed),
            submodules=submodules(repository),
        )


def _warn_of_compiled(kept: Container[Path]) -> None:
    compiled = [f"{path} (sha256 {file_digest(path)})" for path in compiled_imports(kept)]
    if compiled:
        warnings.warn(
            "imported, and not in the run's code, because it is compiled and neither installed nor seen by git: "
            + ", ".join(compiled),
            stacklevel=3,
        )


def _output_of(project: Path) -> Callable[[Path], bool]:
    """Return what says of an untracked file whether runs of ``project`` write it."""
    databases = [str(project / "sweeps.db"), str(project / "mlflow.db")]
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    databases += [str(Path(uri.removeprefix("sqlite:///")).resolve())] if uri.startswith("sqlite:///") else []
    stores = {f"{database}{ending}" for database in databases for ending in _BESIDE_DATABASES}
    runs = project / "runs"

    def is_output(path: Path) -> bool:
        if path.is_relative_to(runs) and len(path.parts) > len(runs.parts):
            return bool(_RUN_FOLDER.fullmatch(path.parts[len(runs.parts)]))
        # What the folders are called that the project lies in says nothing.
        return not _OUTPUT.isdisjoint(Path(os.path.relpath(path, project)).parts) or str(path) in stores

    return is_output


def is_code(name: str, names: Container[str]) -> bool:
    """Return whether a file counts as code, among files of those ``names``: no recipe of DVC's does, nor a log."""
    path = PurePosixPath(name)
    is_recipe = path.name in _RECIPE and (path.parent == PurePosixPath() or str(path.with_name("dvc.yaml")) in names)
    return not is_recipe and path.suffix not in _LOGS


def _packed(root: Path, imported: ImportedCode, listed: Mapping[str, Path]) -> CodeSnapshot:
    packed = Packing({**imported.files, **listed})
    if packed.withheld:
        warnings.warn(
            f"left out of the run's code, because they look like secrets: {', '.join(packed.withheld)}", stacklevel=3
        )
    if len(packed.archive) > _REMARKABLE_BYTES:
        most = ", ".join(f"{name} ({_megabytes(size)})" for name, size in largest_files(packed.archive, 3).items())
        warnings.warn(
            f"the run's code takes {_megabytes(len(packed.archive))}, of that most {most}; each run keeps it. Have git "
            "ignore what is no code",
            stacklevel=3,
        )
    return CodeSnapshot(
        root=root,
        archive=packed.archive,
        digest=_digest(packed.entries),
        imported_digest=_digest(packed.entries, imported=True) if any(map(is_the_programs, packed.entries)) else "",
        imported=imported,
        left_out=packed.left_out,
        withheld=packed.withheld,
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def imported_since(snapshot: CodeSnapshot) -> list[Path]:
    """Return what this process has imported since, and the snapshot does not have, or not as it is now."""
    root = snapshot.root.resolve()
    imported = imported_code(root, in_git=True)
    entries = {**archived_files(snapshot.archive), **snapshot.left_out}
    known = {(snapshot.imported.files.get(name) or root / name): digest for name, (_, digest) in entries.items()}
    code = {path for path in imported.files.values() if path.suffix in CODE}
    missing = code - {*snapshot.imported.files.values()} - {*known} - {root / name for name in snapshot.withheld}
    # What was imported before and is edited now, ran as the snapshot has it.
    late = imported.modules - snapshot.imported.modules
    # Of a link the snapshot has where it leads to.
    links = {path for path in known if path.is_symlink()}
    return sorted(missing | {path for path in late - links if known.get(path) != file_digest(path)})


def archive_digest(archive: bytes, left_out: Mapping[str, tuple[int, str]], *, imported: bool = False) -> str:
    """Return the digest of the code in an archive, and of what was too large for it.

    It is :attr:`CodeSnapshot.digest`, or else, of what is ``imported``, :attr:`CodeSnapshot.imported_digest`.
    """
    return _digest({**archived_files(archive), **left_out}, imported=imported)


def imported_digests(archive: bytes, other: bytes) -> tuple[str, str]:
    """Return the digests of those modules of the program's, from outside the repository, that two archives both have.

    A program that continues a run may be another one than began it, and import more or less.
    """
    one, two = archived_files(archive), archived_files(other)
    shared = {_top(name) for name in one} & {_top(name) for name in two}
    first, second = ({name: files[name] for name in files if _top(name) in shared} for files in (one, two))
    return _digest(first, imported=True), _digest(second, imported=True)


def _top(name: str) -> str:
    return "/".join(name.split("/")[:2])


def _digest(entries: Mapping[str, tuple[int, str]], *, imported: bool = False) -> str:
    """Return the sha256 over name, mode and content's sha256 of each file of code, of the one kind or the other."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        # Beside the code of a package lies what it writes, logs and caches.
        is_counted = not imported or PurePosixPath(name).suffix in CODE
        if is_code(name, entries) and is_the_programs(name) == imported and is_counted:
            digest.update(json.dumps((name, *entries[name])).encode())
    return digest.hexdigest()
