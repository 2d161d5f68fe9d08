"""What git says of the folder that a run's code lies in: its files, its commit, and what turns that into what ran.

Submodules, and repositories that lie in another one without being tracked, belong to it: their files are listed with
the rest.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import git

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.secrecy import LARGEST_SECRET, holds_secret, is_secrets_name

# What is too large to be searched for secrets is not kept.
LARGEST_FILE = LARGEST_SECRET
_SUBMODULE = "160000"
# As git does it: a file with a zero byte in its beginning is no text.
_BEGINNING = 8000

IsOutput = Callable[[Path], bool]
"""Whether an untracked file is something that runs write, rather than code."""


def repository_of(folder: Path) -> git.Repo | None:
    """Return the repository that ``folder`` is in; None outside git, or where there is no git to ask.

    Raises:
        UserError: it belongs to another user, and git is not told to trust it.
    """
    if shutil.which("git") is None:
        return None
    try:
        return _opened(folder, search_parent_directories=True)
    except git.InvalidGitRepositoryError:
        return None


def _opened(folder: Path, *, search_parent_directories: bool = False) -> git.Repo:
    repository = git.Repo(folder, search_parent_directories=search_parent_directories)
    try:
        repository.git.rev_parse("--git-dir")
    except git.GitCommandError as error:
        if "dubious ownership" not in str(error):
            raise
        root = repository.working_dir
        raise UserError(
            f"{root}: git refuses this repository, which belongs to another user than this process's; if you trust "
            f"what is in it, run `git config --global --add safe.directory {root}`, else make it your own (`chown`)"
        ) from error
    return repository


def listed_files(repository: git.Repo, is_output: IsOutput) -> dict[str, Path]:
    """Return each tracked file and each untracked one that git does not ignore, by its name below the root."""
    found = {}
    for kind in ("--cached", "--others"):
        for name, path in _listed(repository, kind):
            if kind == "--others" and is_output(path):
                continue
            if not (path / ".git").exists():
                found[name] = path
                continue
            with _opened(path) as inner:
                files = listed_files(inner, is_output)
            found |= {f"{name.rstrip('/')}/{below}": file for below, file in files.items()}
    return found


def changed_files(repository: git.Repo, is_output: IsOutput) -> set[str]:
    """Return the names of what differs from the commit, untracked files included."""
    # Whatever the user's settings say is shown of untracked files and of submodules.
    form = ("-z", "--porcelain", "--no-renames", "--untracked-files=all", "--ignore-submodules=none")
    with _copied_index(repository):
        status = repository.git.status(*form, strip_newline_in_stdout=False)
    entries = [(entry[:2], entry[3:]) for entry in status.split("\0") if entry]
    root = Path(repository.working_dir)
    return {name for kind, name in entries if kind != "??" or not is_output(root / name)}


def submodules(repository: git.Repo) -> dict[str, str]:
    """Return the commit of each submodule, by its path: the one that is checked out, where one is."""
    staged = repository.git.ls_files("-z", "--stage", strip_newline_in_stdout=False).split("\0")
    found = {}
    for facts, _, name in (entry.partition("\t") for entry in staged if entry.startswith(_SUBMODULE)):
        found[name] = facts.split()[1]
        path = Path(repository.working_dir, name)
        if (path / ".git").exists():
            with _opened(path) as inner:
                found[name] = inner.head.commit.hexsha
    return found


def patch_of(repository: git.Repo, left_out: Collection[str], is_output: IsOutput) -> tuple[bytes, list[str]]:
    """Return the difference to the commit, for ``git apply``, and the changed files that it is silent on.

    Untracked texts are new files in it.

    Args:
        repository: the repository.
        left_out: names of files that are secrets or too large; what was committed may be as well.
        is_output: see :func:`listed_files`.
    """
    others = [name for name, path in _listed(repository, "--others") if not is_output(path) and _is_small_text(path)]
    texts = [name for name in others if name not in left_out]
    base = "HEAD" if repository.head.is_valid() else repository.git.hash_object("-t", "tree", os.devnull)
    # Whatever the user's settings say of diffs, `git apply` must understand this one.
    which = ("--no-renames", "--no-relative", "--ignore-submodules=dirty")
    form = ("--binary", "--full-index", "--no-ext-diff", "--no-textconv", "--no-color", "--unified=3")
    prefixes = ("--submodule=short", "--src-prefix=a/", "--dst-prefix=b/")
    with _copied_index(repository) as index:
        changed = repository.git.diff(base, "--name-only", "-z", *which, strip_newline_in_stdout=False)
        names = [name for name in changed.split("\0") if name]
        silent = [name for name in names if name in left_out or _was_withheld(repository, name)]
        if texts:
            # The untracked texts are announced.
            listing = index.with_name("names")
            listing.write_bytes(b"\0".join(map(os.fsencode, texts)))
            with repository.git.custom_environment(GIT_LITERAL_PATHSPECS="1"):
                repository.git.add("--intent-to-add", f"--pathspec-from-file={listing}", "--pathspec-file-nul")
        paths = [".", *(f":(exclude,literal){name}" for name in silent)]
        patch: bytes = repository.git.diff(
            base, *which, *form, *prefixes, "--", *paths, stdout_as_string=False, strip_newline_in_stdout=False
        )
        return patch, silent


@contextmanager
def _copied_index(repository: git.Repo) -> Iterator[Path]:
    """Let git use a copy of the index that hides no file which is there; the user's stays as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        index, own = Path(scratch) / "index", Path(repository.git_dir) / "index"
        if own.exists():
            # With its time: by that git knows which files may have changed in the very second in which it was written.
            shutil.copy2(own, index)
        with repository.git.custom_environment(GIT_INDEX_FILE=str(index)):
            listed = repository.git.ls_files("-v", "-z", strip_newline_in_stdout=False)
            marked = [(entry[0], entry[2:]) for entry in listed.split("\0") if entry]
            # What a sparse checkout leaves out has the second mark as well, and is not there.
            hidden = {
                "--no-assume-unchanged": [name for mark, name in marked if mark.islower()],
                "--no-skip-worktree": [
                    name
                    for mark, name in marked
                    if mark.upper() == "S" and os.path.lexists(Path(repository.working_dir, name))
                ],
            }
            for option, names in hidden.items():
                if names:
                    listing = Path(scratch) / "hidden"
                    listing.write_bytes(b"".join(os.fsencode(name) + b"\0" for name in names))
                    with listing.open("rb") as stream:
                        repository.git.update_index(option, "-z", "--stdin", istream=stream)
            yield index


def _listed(repository: git.Repo, kind: str) -> Iterator[tuple[str, Path]]:
    listed = repository.git.ls_files("-z", kind, "--exclude-standard", strip_newline_in_stdout=False)
    for name in listed.split("\0"):
        if name:
            yield name, Path(repository.working_dir, name)


def _was_withheld(repository: git.Repo, name: str) -> bool:
    """Return whether the commit has a secret under that name, or a file that is too large: a patch shows it again."""
    if not repository.head.is_valid():
        return False
    try:
        blob = repository.head.commit.tree / name
    except KeyError:
        return False
    if blob.type != "blob":
        return False
    path = Path(name)
    if blob.size > LARGEST_FILE or is_secrets_name(path):
        return True
    return holds_secret(path, blob.data_stream.read())


def _is_small_text(path: Path) -> bool:
    if path.is_symlink():
        return True
    if not path.is_file() or path.stat().st_size > LARGEST_FILE:
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(_BEGINNING)
