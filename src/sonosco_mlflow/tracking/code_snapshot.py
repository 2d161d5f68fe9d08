"""The code of a run, exactly as it ran.

The snapshot holds every file that git tracks and every untracked one that it does not ignore, as they are in the
working tree: the commit alone would not say what ran. Beside it stand the commit, and what turns it into what ran.
Code that was imported from elsewhere is in it too (:mod:`.imported_code`).

>>> snapshot = snapshot_code(Path())                       # doctest: +SKIP
>>> unpack(snapshot.archive, Path("/tmp/then"))            # doctest: +SKIP
"""

import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import git

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.imported_code import CODE, ImportedCode, ignored_imports, imported_code, is_the_programs
from sonosco_mlflow.tracking.secrecy import is_secret, without_credentials

LARGEST_FILE = 10 * 1024 * 1024
# The recipe and the data have digests of their own: a run with other parameters does not run other code.
NOT_CODE = frozenset({"params.yaml", "dvc.lock"})
# A fixed date: the archive's bytes are to depend on the files alone.
_ARCHIVE_DATE = (1980, 1, 1, 0, 0, 0)
_SUBMODULE = "160000"
# As git does it: a file with a zero byte in its beginning is no text.
_BEGINNING = 8000


@dataclass(frozen=True)
class CodeSnapshot:
    """The code of a run.

    Attributes:
        root: folder that the names in the archive start from.
        archive: bytes of a zip of all files; equal files give equal bytes.
        digest: sha256 over names, modes and contents, save the recipe's and ``dvc.lock``'s, of the repository and this
            package.
        imported_digest: the same of what else the program has imported; empty where that is nothing.
        patch: the difference to the commit, for ``git apply``; untracked texts are new files in it.
        commit: hexadecimal id, or None outside git or before the first commit.
        branch: its name, or None when detached or outside git.
        remote: address of ``origin`` without credentials, or None.
        dirty: whether code differs from the commit, untracked files included.
        submodules: commit of each, by path.
        imported: what the process had imported by then.
        left_out: mode and sha256 of each file that is too large for the archive.
        withheld: files that look like secrets; nothing of them is kept.
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
        }
        return json.dumps(facts, indent=1, sort_keys=True) + "\n"


def snapshot_code(folder: Path) -> CodeSnapshot:
    """Take the snapshot of the repository that ``folder`` is in; outside git, of what this process has imported.

    Files that look like secrets are named by a warning and left out.
    """
    try:
        repository = git.Repo(folder, search_parent_directories=True)
    except git.InvalidGitRepositoryError:
        root = folder.resolve()
        return _packed(root, imported_code(root, in_git=False), {})
    with repository:
        root = Path(repository.working_dir)
        listed = {name: root / name for kind in ("--cached", "--others") for name in _listed(repository, kind)}
        packed = _packed(root, imported_code(root, in_git=True), listed)
        ignored = ignored_imports(root, {*listed.values()})
        if ignored:
            warnings.warn(
                f"imported, and not in the run's code, because git ignores it: {', '.join(map(str, ignored))}",
                stacklevel=2,
            )
        return replace(
            packed,
            patch=_patch(repository, packed.withheld),
            commit=repository.head.commit.hexsha if repository.head.is_valid() else None,
            branch=None if repository.head.is_detached else repository.active_branch.name,
            remote=without_credentials(repository.remotes.origin.url) if "origin" in repository.remotes else None,
            dirty=not repository.head.is_valid() or _is_changed(repository),
            submodules=_submodules(repository),
        )


def _packed(root: Path, imported: ImportedCode, listed: Mapping[str, Path]) -> CodeSnapshot:
    packed = _Packing({**imported.files, **listed})
    if packed.withheld:
        warnings.warn(
            f"left out of the run's code, because they look like secrets: {', '.join(packed.withheld)}", stacklevel=3
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


def imported_since(snapshot: CodeSnapshot) -> list[Path]:
    """Return what this process has imported since, and the snapshot does not have."""
    root = snapshot.root.resolve()
    with zipfile.ZipFile(io.BytesIO(snapshot.archive)) as files:
        known = {root / name for name in (*files.namelist(), *snapshot.left_out, *snapshot.withheld)}
    imported = imported_code(root, in_git=True)
    code = {path for path in imported.files.values() if path.suffix in CODE}
    return sorted(code - {*snapshot.imported.files.values()} - known)


def unpack(archive: bytes, folder: Path) -> None:
    """Write the files of a snapshot into ``folder``, which is made; modes and links are what they were.

    Raises:
        UserError: a file of the archive would lie outside of ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = folder.resolve()
    links = {}
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for entry in files.infolist():
            path = root / entry.filename
            if not path.resolve().is_relative_to(root):
                raise UserError(
                    f"the code snapshot names '{entry.filename}', which leaves its folder; it was not made by us"
                )
            mode = entry.external_attr >> 16
            if stat.S_ISLNK(mode):
                links[path] = os.fsdecode(files.read(entry))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files.read(entry))
            path.chmod(stat.S_IMODE(mode))
    # Last: nothing is written through a link.
    for path, target in links.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


class _Packing:
    """Files packed into an archive under their names; ``entries`` has the mode and sha256 of each."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.left_out: dict[str, tuple[int, str]] = {}
        self.withheld: list[str] = []
        self.entries: dict[str, tuple[int, str]] = {}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in sorted(files.items()):
                # Deleted and not committed; or a submodule, whose commit is part of the repository's own.
                if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
                    continue
                if is_secret(path):
                    self.withheld.append(name)
                    continue
                self.entries[name] = self._add(archive, path, name)
        self.archive = buffer.getvalue()

    def _add(self, archive: zipfile.ZipFile, path: Path, name: str) -> tuple[int, str]:
        status = path.lstat()
        # Of the mode only the kind of file and the executable bit count, as in git.
        kind = stat.S_IFMT(status.st_mode) | (0o755 if status.st_mode & stat.S_IXUSR else 0o644)
        if status.st_size > LARGEST_FILE:
            self.left_out[name] = kind, file_digest(path)
            return self.left_out[name]
        content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()
        entry = zipfile.ZipInfo(name, _ARCHIVE_DATE)
        entry.external_attr = kind << 16
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, content)
        return kind, hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, which is read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def archive_digest(archive: bytes, left_out: Mapping[str, tuple[int, str]]) -> str:
    """Return the digest (:attr:`CodeSnapshot.digest`) of the code in an archive, and of what was too large for it."""
    return _digest({**archived_files(archive), **left_out})


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


def archived_files(archive: bytes) -> dict[str, tuple[int, str]]:
    """Return mode and sha256 of each file in an archive."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        return {
            entry.filename: (entry.external_attr >> 16, hashlib.sha256(files.read(entry)).hexdigest())
            for entry in files.infolist()
        }


def _digest(entries: Mapping[str, tuple[int, str]], *, imported: bool = False) -> str:
    """Return the sha256 over name, mode and content's sha256 of each file of code, of the one kind or the other."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        # Beside the code of a package lies what it writes, logs and caches.
        is_counted = not imported or PurePosixPath(name).suffix in CODE
        if name not in NOT_CODE and is_the_programs(name) == imported and is_counted:
            digest.update(json.dumps((name, *entries[name])).encode())
    return digest.hexdigest()


def _listed(repository: git.Repo, kind: str) -> list[str]:
    listed = repository.git.ls_files("-z", kind, "--exclude-standard", strip_newline_in_stdout=False)
    return [name for name in listed.split("\0") if name]


def _is_changed(repository: git.Repo) -> bool:
    status = repository.git.status("-z", "--porcelain", "--no-renames", strip_newline_in_stdout=False)
    changed = {entry[3:] for entry in status.split("\0") if entry}
    return bool(changed - NOT_CODE)


def _submodules(repository: git.Repo) -> dict[str, str]:
    staged = repository.git.ls_files("-z", "--stage", strip_newline_in_stdout=False).split("\0")
    entries = (entry.partition("\t") for entry in staged if entry.startswith(_SUBMODULE))
    return {name: facts.split()[1] for facts, _, name in entries}


def _patch(repository: git.Repo, withheld: list[str]) -> bytes:
    root = Path(repository.working_dir)
    texts = [name for name in _listed(repository, "--others") if name not in withheld and _is_small_text(root / name)]
    base = "HEAD" if repository.head.is_valid() else repository.git.hash_object("-t", "tree", os.devnull)
    # Whatever the user's settings say of diffs, `git apply` must understand this one.
    form = ("--binary", "--full-index", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames")
    prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
    paths = [".", *(f":(exclude,literal){name}" for name in withheld)]
    with tempfile.TemporaryDirectory() as scratch:
        # In a copy of the index the untracked texts are announced; the user's stays as it is.
        index, own = Path(scratch) / "index", Path(repository.git_dir) / "index"
        if own.exists():
            # With its time: by that git knows which files may have changed in the very second in which it was written.
            shutil.copy2(own, index)
        with repository.git.custom_environment(GIT_INDEX_FILE=str(index)):
            if texts:
                names = Path(scratch) / "names"
                names.write_bytes(b"\0".join(map(os.fsencode, texts)))
                with repository.git.custom_environment(GIT_LITERAL_PATHSPECS="1"):
                    repository.git.add("--intent-to-add", f"--pathspec-from-file={names}", "--pathspec-file-nul")
            patch: bytes = repository.git.diff(
                base, *form, *prefixes, "--", *paths, stdout_as_string=False, strip_newline_in_stdout=False
            )
            return patch


def _is_small_text(path: Path) -> bool:
    if path.is_symlink():
        return True
    if not path.is_file() or path.stat().st_size > LARGEST_FILE:
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(_BEGINNING)
