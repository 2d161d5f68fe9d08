"""Where a run comes from: the code as it ran, its commit, and the environment.

The snapshot holds every file that git tracks and every untracked one that it does not ignore, as they are in the
working tree: the commit alone would not say what ran.
"""

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import git
import torch

LARGEST_FILE = 10 * 1024 * 1024
# The recipe and the data have digests of their own: a run with other parameters does not run other code.
NOT_CODE = frozenset({"params.yaml", "dvc.lock"})
# A fixed date: the archive's bytes are to depend on the files alone.
_ARCHIVE_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class CodeSnapshot:
    """The code of a run.

    Attributes:
        archive: bytes of a zip of all files; equal files give equal bytes.
        digest: sha256 over names, modes and contents, save the recipe's and ``dvc.lock``'s.
        patch: the difference of tracked files to the commit, for ``git apply``.
        commit: hexadecimal id, or None outside git or before the first commit.
        branch: its name, or None when detached or outside git.
        remote: address of ``origin`` without credentials, or None.
        dirty: whether code differs from the commit, untracked files included.
        left_out: files that are too large for the archive, with their sha256.
    """

    archive: bytes
    digest: str
    patch: str
    commit: str | None
    branch: str | None
    remote: str | None
    dirty: bool
    left_out: dict[str, str]

    def git_json(self) -> str:
        """Return the facts beside the archive as JSON."""
        facts = {
            "commit": self.commit,
            "branch": self.branch,
            "remote": self.remote,
            "dirty": self.dirty,
            "code_digest": self.digest,
            "left_out": self.left_out,
        }
        return json.dumps(facts, indent=1, sort_keys=True) + "\n"


def snapshot_code(folder: Path) -> CodeSnapshot:
    """Take the snapshot of the repository that ``folder`` is in; outside git, of the package itself."""
    try:
        repository = git.Repo(folder, search_parent_directories=True)
    except git.InvalidGitRepositoryError:
        root = Path(__file__).resolve().parents[1]
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        return CodeSnapshot(*_archive(root, names)[:2], "", None, None, None, True, {})
    with repository:
        root = Path(repository.working_dir)
        options = ("-z", "--cached", "--others", "--exclude-standard")
        listed = repository.git.ls_files(*options, strip_newline_in_stdout=False)
        names = sorted({name for name in listed.split("\0") if name and os.path.lexists(root / name)})
        archive, digest, left_out = _archive(root, names)
        born = repository.head.is_valid()
        return CodeSnapshot(
            archive=archive,
            digest=digest,
            patch=repository.git.diff("HEAD", "--binary", strip_newline_in_stdout=False) if born else "",
            commit=repository.head.commit.hexsha if born else None,
            branch=None if repository.head.is_detached else repository.active_branch.name,
            remote=_without_credentials(repository.remotes.origin.url) if "origin" in repository.remotes else None,
            dirty=not born or _is_changed(repository),
            left_out=left_out,
        )


def _is_changed(repository: git.Repo) -> bool:
    status = repository.git.status("-z", "--porcelain", "--no-renames", strip_newline_in_stdout=False)
    changed = {entry[3:] for entry in status.split("\0") if entry}
    return bool(changed - NOT_CODE)


def _archive(root: Path, names: list[str]) -> tuple[bytes, str, dict[str, str]]:
    buffer = io.BytesIO()
    digest = hashlib.sha256()
    left_out = {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            path = root / name
            if path.is_dir() and not path.is_symlink():
                continue  # a submodule: its commit is part of the repository's own
            mode = path.lstat().st_mode
            content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
            content_digest = hashlib.sha256(content).hexdigest()
            # Of the mode only the kind of file and the executable bit count, as in git.
            kind = mode & 0o170000 | (0o755 if mode & 0o100 else 0o644)
            if name not in NOT_CODE:
                digest.update(json.dumps([name, kind, content_digest]).encode())
            if len(content) > LARGEST_FILE:
                left_out[name] = content_digest
                continue
            entry = zipfile.ZipInfo(name, _ARCHIVE_DATE)
            entry.external_attr = kind << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return buffer.getvalue(), digest.hexdigest(), left_out


def _without_credentials(address: str) -> str:
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host)) if parts.scheme else address


@dataclass(frozen=True)
class Environment:
    """What a run ran in.

    Attributes:
        requirements: installed distributions, pinned, one a line.
        system: Python, platform, processor and numerics settings.
    """

    requirements: str
    system: dict[str, object]

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of the software: what the machine adds to it, the canary tells."""
        decisive = {name: self.system[name] for name in self.decisive_system}
        return hashlib.sha256(json.dumps([self.requirements, decisive], sort_keys=True).encode()).hexdigest()

    @property
    def decisive_system(self) -> tuple[str, ...]:
        """The entries of ``system`` that belong to the software."""
        return ("python", "machine", "variables")


def describe_environment(threads: int, canary: str, project: Path) -> Environment:
    """Describe this process's environment, the number of threads and the canary under it included.

    Where ``project`` pins its distributions, those are listed, in the versions that are installed: tools that are
    installed beside them, such as a linter, change no result.
    """
    pins = {_normal(item.metadata["Name"]): item.version for item in importlib.metadata.distributions()}
    pinned = project / "requirements.txt"
    if pinned.exists():
        names = {_normal(line.partition("==")[0]) for line in pinned.read_text(encoding="utf-8").splitlines()}
        pins = {name: version for name, version in pins.items() if name in names}
    # These change results without any change of code.
    numerics = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "MKL_CBWR",
        "ATEN_CPU_CAPABILITY",
        "ONEDNN_MAX_CPU_ISA",
        "CUBLAS_WORKSPACE_CONFIG",
    )
    system: dict[str, object] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "canary": canary,
        "variables": {name: os.environ[name] for name in numerics if name in os.environ},
    }
    return Environment("".join(f"{name}=={version}\n" for name, version in sorted(pins.items())), system)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _processor() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
