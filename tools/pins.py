"""The environment's pins: one resolution, written in the forms that its readers want.

`requirements.txt` (uv, pip), `python_env.yaml` (MLflow Projects) and `conda.yaml` (conda) name the same
distributions; `requirements-dev.txt` holds what the tests and linters add. MLflow names a project's
environment after a hash of the specification's text, so `python_env.yaml` carries the pins themselves.

    python tools/pins.py             # resolve pyproject.toml again; pins move only where it forces them to
    python tools/pins.py --upgrade   # take the newest versions that it allows

Only the standard library and the program `uv` are needed. The pins are for Python 3.11 on x86-64 Linux.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_VERSION = "3.11"
PYTHON_PLATFORM = "x86_64-manylinux_2_28"

# `mlflow run --env-manager uv` looks for uv on PATH; the Makefile's bootstrap reads the same pin.
LAUNCHER_REQUIREMENTS = ["uv"]

# MLflow installs these before the rest. torch depends on setuptools too: one pin serves both.
BUILD_REQUIREMENTS = ["pip", "setuptools", "wheel"]

HEADER = "# Written by `make pins` from pyproject.toml: not edited by hand.\n"


def resolve(requirements: Iterable[str], *, preferred: Iterable[str], constraints: Iterable[str] = ()) -> list[str]:
    """Pin everything that the requirements need, directly or not.

    Args:
        requirements: what is wanted, as PEP 508 lines.
        preferred: pins that stay as they are wherever the requirements allow it.
        constraints: requirements that hold for whatever is chosen, without asking for it.

    Returns:
        `name==version` lines, sorted by name.

    Raises:
        subprocess.CalledProcessError: there is no solution; uv has said why on standard error.
    """
    with tempfile.TemporaryDirectory() as directory:
        # uv reads preferences from the file that it is about to write.
        pins, limits = Path(directory, "pins.txt"), Path(directory, "limits.txt")
        pins.write_text(lines(preferred))
        limits.write_text(lines(constraints))
        command = ["uv", "pip", "compile", "-", "--output-file", str(pins), "--constraints", str(limits)]
        command += ["--python-version", PYTHON_VERSION, "--python-platform", PYTHON_PLATFORM]
        command += ["--python", sys.executable, "--no-header", "--no-annotate", "--quiet"]
        subprocess.run(command, input=lines(requirements), text=True, check=True, cwd=directory)
        return pins.read_text().split()


def lines(items: Iterable[str]) -> str:
    """One item a line."""
    return "".join(f"{item}\n" for item in items)


def without(pins: Iterable[str], others: Iterable[str]) -> list[str]:
    """The pins that are not among the others."""
    known = set(others)
    return [pin for pin in pins if pin not in known]


def name(pin: str) -> str:
    """The distribution that a `name==version` line pins."""
    return pin.partition("==")[0]


def python_env(build: Iterable[str], run: Iterable[str]) -> str:
    """The text of `python_env.yaml`.

    It has no `python:` key: MLflow then takes the version of the Python that launches it. One named here
    would be compiled by pyenv wherever that very patch release is missing.
    """
    return f"{HEADER}build_dependencies:\n{items(build, 2)}dependencies:\n{items(run, 2)}"


def conda(run: Iterable[str]) -> str:
    """The text of `conda.yaml`: conda brings Python and pip, and pip the rest."""
    top = items([f"python={PYTHON_VERSION}", "pip", "pip:"], 2)
    return f"{HEADER}name: sonosco-mlflow\nchannels:\n  - conda-forge\ndependencies:\n{top}{items(run, 6)}"


def items(values: Iterable[str], indent: int) -> str:
    """A YAML block sequence of plain scalars."""
    return "".join(f"{' ' * indent}- {value}\n" for value in values)


def pinned_in(path: Path) -> list[str]:
    """Every `name==version` line or item of a requirements or YAML file; nothing if there is no such file."""
    return re.findall(r"^[ -]*(\S+==\S+)$", path.read_text(), re.MULTILINE) if path.exists() else []


def main() -> None:
    """Resolve, then write the four files."""
    parser = argparse.ArgumentParser(description="Write the pins of the environment from pyproject.toml.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that it allows")
    upgrade = parser.parse_args().upgrade

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["corpus"]
    known = [] if upgrade else pinned_in(ROOT / "python_env.yaml") + pinned_in(ROOT / "requirements-dev.txt")

    run = resolve(wanted + LAUNCHER_REQUIREMENTS, preferred=known)
    development = resolve(project["dependency-groups"]["dev"], preferred=known, constraints=run)
    # What the build tools depend on in turn is left to pip: MLflow asks for these three.
    build = [
        pin for pin in resolve(BUILD_REQUIREMENTS, preferred=known, constraints=run) if name(pin) in BUILD_REQUIREMENTS
    ]

    (ROOT / "requirements.txt").write_text(HEADER + lines(run))
    (ROOT / "requirements-dev.txt").write_text(HEADER + lines(without(development, run)))
    (ROOT / "python_env.yaml").write_text(python_env(build, run))
    (ROOT / "conda.yaml").write_text(conda(run))


if __name__ == "__main__":
    main()
