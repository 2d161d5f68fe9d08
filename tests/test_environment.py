"""The pins stand in four files and follow from a fifth: they must never drift apart."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9][0-9a-z.]*)")


def requirements(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]


def pip_list(conda: dict[str, object]) -> list[str]:
    dependencies = conda["dependencies"]
    assert isinstance(dependencies, list)
    return next(entry["pip"] for entry in dependencies if isinstance(entry, dict))


RUN = requirements("requirements.txt")
DEVELOPMENT = requirements("requirements-dev.txt")
PYTHON_ENV = yaml.safe_load((ROOT / "python_env.yaml").read_text())
CONDA = yaml.safe_load((ROOT / "conda.yaml").read_text())
MLPROJECT = yaml.safe_load((ROOT / "MLproject").read_text())


def versions(pins: list[str]) -> dict[str, str]:
    return dict(pin.split("==") for pin in pins)


def test_the_three_specifications_of_the_run_environment_are_one_list():
    assert PYTHON_ENV["dependencies"] == RUN
    assert pip_list(CONDA) == RUN


@pytest.mark.parametrize(
    "pins",
    [RUN, DEVELOPMENT, PYTHON_ENV["build_dependencies"]],
    ids=["requirements.txt", "requirements-dev.txt", "build_dependencies"],
)
def test_every_line_is_an_exact_pin_and_nothing_else(pins):
    # Neither `.` nor `-e .` (a stale copy of the code), nor an address, an option, a marker or a hash.
    assert [pin for pin in pins if not PIN.fullmatch(pin)] == []
    assert [pin.partition("==")[0] for pin in pins] == sorted({pin.partition("==")[0] for pin in pins})


@pytest.mark.parametrize(
    "wanted",
    PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["corpus"],
)
def test_a_pin_satisfies_each_range_of_the_run_environment(wanted):
    requirement = Requirement(wanted)
    assert requirement.specifier.contains(versions(RUN)[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("wanted", PROJECT["dependency-groups"]["dev"])
def test_a_pin_satisfies_each_range_of_the_development_tools(wanted):
    requirement = Requirement(wanted)
    assert requirement.specifier.contains(versions(RUN + DEVELOPMENT)[canonicalize_name(requirement.name)])


def test_development_tools_only_add_to_the_run_environment():
    assert versions(DEVELOPMENT).keys().isdisjoint(versions(RUN))


def test_torch_and_torchaudio_are_a_pair():
    assert versions(RUN)["torch"] == versions(RUN)["torchaudio"]


def test_a_build_pin_agrees_with_the_run_environment():
    run, build = versions(RUN), versions(PYTHON_ENV["build_dependencies"])
    assert build.keys() == {"pip", "setuptools", "wheel"}
    assert [name for name in build if build[name] != run.get(name, build[name])] == []


def test_mlflow_takes_the_python_that_launches_it():
    # A named version would be compiled by pyenv wherever that very patch release is missing.
    assert PYTHON_ENV.keys() == {"build_dependencies", "dependencies"}
    assert MLPROJECT["python_env"] == "python_env.yaml"
    assert "conda_env" not in MLPROJECT


def test_the_recipe_alone_holds_defaults():
    # A default in MLproject reaches the command line, where it would beat params.yaml.
    assert MLPROJECT["entry_points"]["main"].keys() == {"command"}
    assert MLPROJECT["entry_points"]["data"].keys() == {"command"}


def test_no_uv_lock_stands_beside_the_pins():
    # `mlflow run --env-manager uv` would install from it, the project included, not from python_env.yaml.
    assert not (ROOT / "uv.lock").exists()
