import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from sonosco_mlflow.tracking.changes import environment_changes, machine_changes
from sonosco_mlflow.tracking.environment import Environment, describe_environment


def test_the_environment_names_what_is_installed(tmp_path: Path) -> None:
    environment = describe_environment(3, "ab12", tmp_path)
    assert "torch==2.11.0\n" in environment.requirements
    assert "pytest==" in environment.requirements
    assert (environment.system["threads"], environment.system["canary"]) == (3, "ab12")


def test_only_what_the_project_pins_counts(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("torch==2.11.0\nruamel_yaml==0.1\n")
    found = describe_environment(1, "ab12", tmp_path)
    named = [name for name in found.pins if name not in found.beside]
    assert named == ["ruamel-yaml", "torch"]


def install(folder: Path, name: str, version: str, module: str) -> None:
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (information / "RECORD").write_text(f"{module}/__init__.py,,\n{information.name}/METADATA,,\n")
    (folder / module).mkdir(exist_ok=True)
    (folder / module / "__init__.py").write_text("")


def test_what_is_imported_counts_though_nothing_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("# ours\ntorch>=2.0\nuvicorn[standard]==0.3 ; python_version > '3'\n")
    site = tmp_path / "site"
    install(site, "odd-rearranging", "1.0", "oddly")
    install(site, "never-imported", "1.0", "never_ever")
    monkeypatch.syspath_prepend(site)
    before = describe_environment(1, "ab12", tmp_path)
    assert "torch" in before.pins
    assert "torch" not in before.beside
    assert "uvicorn" not in before.beside
    importlib.import_module("oddly")
    found = describe_environment(1, "ab12", tmp_path)
    assert found.pins["odd-rearranging"] == "1.0"
    assert "odd-rearranging" in found.beside
    assert "never-imported" not in found.pins
    assert found.digest != before.digest, "the run shows it"
    assert found.beside_digests["distribution:odd-rearranging"] == "1.0"
    assert found.named_digest == before.named_digest, "a program that does not import it may go on"


def test_the_version_is_of_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "overlay", "mlflow", "9.9", "mlflow")
    monkeypatch.syspath_prepend(tmp_path / "overlay")
    assert describe_environment(1, "ab12", tmp_path).pins["mlflow"] == "9.9"


def test_remains_and_folders_of_ones_own_are_no_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "half_gone-1.0.dist-info").mkdir(parents=True)
    install(tmp_path / "site", "own-package", "1.0", "own_package")
    address = tmp_path / "site" / "own_package-1.0.dist-info" / "direct_url.json"
    address.write_text('{"url": "file:///home/me/own", "dir_info": {"editable": true}}')
    monkeypatch.syspath_prepend(tmp_path / "site")
    pins = describe_environment(1, "ab12", tmp_path).pins
    assert "torch" in pins
    assert not {"half-gone", "own-package"} & pins.keys()


@pytest.mark.parametrize(
    ("origins", "label"),
    [
        (
            ["vcs_info", {"vcs": "git", "commit_id": "a" * 40}, {"vcs": "git", "commit_id": "b" * 40}],
            "git.aaaaaaaaaaaa",
        ),
        (["archive_info", {"hashes": {"sha256": "c" * 64}}, {"hash": "sha256=" + "d" * 64}], "archive.cccccccccccc"),
    ],
)
def test_code_from_a_repository_or_an_archive_is_told_by_more_than_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origins: list[Any], label: str
) -> None:
    kind, *given = origins
    found = []
    for number, origin in enumerate(given):
        site = tmp_path / str(number)
        install(site, "my-models", "1.0", "my_models")
        address = {"url": "https://example.org/models", kind: origin}
        (site / "my_models-1.0.dist-info" / "direct_url.json").write_text(json.dumps(address))
        with monkeypatch.context() as context:
            context.syspath_prepend(site)
            found.append(describe_environment(1, "ab12", tmp_path))
    assert found[0].pins["my-models"] == f"1.0+{label}"
    assert found[0].digest != found[1].digest


def test_another_gpu_is_named() -> None:
    def environment(device: str) -> Environment:
        system = {
            "processor": "x",
            "devices": [device],
            "cuda": "13.0",
            "driver": "590",
            "python": "3.11",
            "machine": "a",
        }
        return Environment("torch==2.11.0\n", {**system, "variables": {}})

    found = machine_changes(environment("H100"), environment("A100"))
    assert found == ["devices was ['H100'], is ['A100']"]


def test_what_stands_beside_on_one_side_only_is_no_change() -> None:
    def environment(pins: str, *beside: str) -> Environment:
        return Environment(pins, {"python": "3.11", "machine": "a", "variables": {}, "beside": list(beside)})

    first = environment("einops==0.7\ntorch==2.11.0\n", "einops")
    assert environment_changes(first, environment("torch==2.11.0\n")) == []
    other = environment("einops==0.8\ntorch==2.11.0\n", "einops")
    assert environment_changes(first, other) == ["einops 0.7 -> 0.8"]
    assert environment_changes(environment("a==1\n"), environment("b==1\n")) == ["a 1 -> none", "b none -> 1"]


def test_the_environments_digest_follows_the_software_and_not_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = describe_environment(1, "ab12", tmp_path).digest
    # These have digests of their own.
    assert describe_environment(2, "cd34", tmp_path).digest == digest
    monkeypatch.setattr("os.cpu_count", lambda: 999)
    assert describe_environment(1, "ab12", tmp_path).digest == digest
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert describe_environment(1, "ab12", tmp_path).digest != digest
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    (tmp_path / "requirements.txt").write_text("torch==2.11.0\n")
    assert describe_environment(1, "ab12", tmp_path).digest != digest
