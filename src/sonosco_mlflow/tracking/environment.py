"""What a run ran in: the software, by a digest, and the machine, by what its arithmetic gives."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

NUMERICS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "NPY_DISABLE_CPU_FEATURES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)
"""Variables that change results without any change of code."""


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
    def pins(self) -> dict[str, str]:
        """The version of each distribution."""
        return dict(line.split("==") for line in self.requirements.splitlines())

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
    # Of this package the run keeps the code itself.
    pins.pop("sonosco-mlflow", None)
    pinned = project / "requirements.txt"
    if pinned.exists():
        names = {_normal(line.partition("==")[0]) for line in pinned.read_text(encoding="utf-8").splitlines()}
        pins = {name: version for name, version in pins.items() if name in names}
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
    }
    return Environment("".join(f"{name}=={version}\n" for name, version in sorted(pins.items())), system)


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
