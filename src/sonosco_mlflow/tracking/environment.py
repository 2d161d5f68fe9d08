"""What a run ran in: the software, by a digest, and the machine, by what its arithmetic gives."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

NUMERICS = (
    "OMP_NUM_THREADS",
    "OMP_DYNAMIC",
    "MKL_NUM_THREADS",
    "MKL_DYNAMIC",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "OPENBLAS_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "NPY_DISABLE_CPU_FEATURES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "PYTORCH_TUNABLEOP_ENABLED",
    "PYTHONHASHSEED",
)
"""Variables that change results without any change of code."""

BESIDE = "distribution:"
"""Among the digests that are compared: before the name of a distribution that no requirements name."""
_NAME = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)", re.MULTILINE)


@dataclass(frozen=True)
class Environment:
    """What a run ran in.

    Attributes:
        requirements: distributions, pinned, one a line: those that the project names, else all that are installed, and
            those beside them that were imported.
        system: Python, platform, processor and numerics settings, and which of the distributions stand beside.
    """

    requirements: str
    system: dict[str, object]

    @classmethod
    def read(cls, requirements: str, system: dict[str, object]) -> "Environment":
        """Return what ``requirements`` and :func:`read_system` say together.

        Raises:
            ValueError: a line pins no distribution, or one that stands beside has no line.
        """
        environment = cls(requirements, system)
        lost = {*environment.beside} - {*environment.pins}
        if lost:
            raise ValueError(f"no line pins {min(lost)}")
        return environment

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of the software: what the machine adds to it, the canary tells."""
        return self._digest(self.requirements)

    @property
    def named_digest(self) -> str:
        """The same without the distributions that stand beside: another program may import more or less."""
        named = {name: version for name, version in self.pins.items() if name not in self.beside}
        return self._digest("".join(f"{name}=={version}\n" for name, version in named.items()))

    @property
    def beside_digests(self) -> dict[str, str]:
        """The version of each distribution that stands beside, as a digest of a state (:data:`BESIDE`)."""
        return {f"{BESIDE}{name}": self.pins[name] for name in self.beside}

    @property
    def beside(self) -> list[str]:
        """Distributions that the project does not name, and the process had imported."""
        found = self.system.get("beside", [])
        assert isinstance(found, list)
        return found

    def _digest(self, requirements: str) -> str:
        decisive = {name: self.system[name] for name in self.decisive_system}
        return hashlib.sha256(json.dumps([requirements, decisive], sort_keys=True).encode()).hexdigest()

    @property
    def pins(self) -> dict[str, str]:
        """The version of each distribution."""
        return dict(line.split("==") for line in self.requirements.splitlines())

    @property
    def decisive_system(self) -> tuple[str, ...]:
        """The entries of ``system`` that belong to the software."""
        return ("python", "machine", "variables")


def read_system(text: str) -> dict[str, object]:
    """Read :attr:`Environment.system`, which was kept as JSON.

    Raises:
        ValueError: it is none.
    """
    system = json.loads(text)
    if not isinstance(system, dict):
        raise ValueError(f"a {type(system).__name__}")
    lacking = [name for name in ("python", "machine", "variables", "threads", "canary") if name not in system]
    if lacking:
        raise ValueError(f"it lacks '{lacking[0]}'")
    beside = system.get("beside", [])
    if not (isinstance(beside, list) and all(isinstance(name, str) for name in beside)):
        raise ValueError(f"its 'beside' is {beside!r}, no list of distributions")
    return system


def describe_environment(threads: int, canary: str, project: Path) -> Environment:
    """Describe this process's environment, the number of threads and the canary under it included.

    Where ``project`` names its distributions, those are listed, in the versions that are installed: tools that are
    installed beside them, such as a linter, change no result. What was imported all the same is listed with them.
    """
    installed = _installed(_state_of_path())
    listing = project / "requirements.txt"
    beside: list[str] = []
    if listing.exists():
        named = {_normal(name) for name in _NAME.findall(listing.read_text(encoding="utf-8"))}
        imported = {name.partition(".")[0] for name in sys.modules}
        beside = sorted(
            name for name, (_, modules) in installed.items() if name not in named and not modules.isdisjoint(imported)
        )
        installed = {name: facts for name, facts in installed.items() if name in named or name in beside}
    pins = {name: version for name, (version, _) in installed.items()}
    system: dict[str, object] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _cpu_info("model name") or platform.processor(),
        "flags": _cpu_info("flags").split(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": _driver(),
        "canary": canary,
        "variables": {name: os.environ[name] for name in NUMERICS if name in os.environ},
        "beside": beside,
    }
    return Environment("".join(f"{name}=={version}\n" for name, version in sorted(pins.items())), system)


def _state_of_path() -> tuple[tuple[str, int], ...]:
    """Return what changes where a distribution is installed or removed."""
    folders = [Path(entry) for entry in sys.path if entry]
    return tuple((str(folder), folder.stat().st_mtime_ns) for folder in folders if folder.is_dir())


@lru_cache(maxsize=1)
def _installed(state: tuple[tuple[str, int], ...]) -> dict[str, tuple[str, frozenset[str]]]:
    """Return version and top-level modules of each distribution; reading hundreds of them takes half a second."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for item in importlib.metadata.distributions():
        # A removal that was cut off leaves a folder that says nothing.
        if not any(item.read_text(name) for name in ("METADATA", "PKG-INFO", "")):
            continue
        name = item.metadata["Name"]
        # Of a folder of the user's, as of this package, the run keeps the code itself.
        origin = json.loads(item.read_text("direct_url.json") or "{}")
        if "dir_info" in origin or _normal(name) == "sonosco-mlflow":
            continue
        # The first that is found is the one that is imported.
        found.setdefault(_normal(name), (_version(item.version, origin), _modules(item)))
    return found


def _version(stated: str, origin: Mapping[str, Any]) -> str:
    """Return a version that says which code it is, of a distribution from a repository or an archive too.

    There, other code may have the same version. What is added is a local label, which no index has: nobody takes
    another distribution of that name for it.

    >>> _version("1.0", {"vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}})
    '1.0+git.0123456789ab'
    """
    if repository := origin.get("vcs_info"):
        label = f"{repository['vcs']}.{repository['commit_id'][:12]}"
    elif archive := origin.get("archive_info"):
        # pip and uv state one or the other, or neither.
        digest = archive.get("hashes", {}).get("sha256") or str(archive.get("hash", "")).rpartition("=")[2]
        label = f"archive.{digest[:12]}" if digest else "archive"
    else:
        return stated
    return f"{stated}{'.' if '+' in stated else '+'}{label}"


def _modules(item: importlib.metadata.Distribution) -> frozenset[str]:
    declared = item.read_text("top_level.txt")
    if declared:
        return frozenset(declared.split())
    tops = ((file.parts[0], len(file.parts)) for file in item.files or () if file.suffix == ".py" or ".so" in file.name)
    return frozenset(
        top if depth > 1 else top.partition(".")[0] for top, depth in tops if not top.endswith(".dist-info")
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _cpu_info(name: str) -> str:
    """Return what Linux says of the first processor, or an empty text."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else None
