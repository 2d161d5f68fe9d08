from pathlib import Path

import pytest

from sonosco_mlflow.tracking.environment import describe_environment


def test_the_environment_names_what_is_installed(tmp_path: Path) -> None:
    environment = describe_environment(3, "ab12", tmp_path)
    assert "torch==2.11.0\n" in environment.requirements
    assert "pytest==" in environment.requirements
    assert (environment.system["threads"], environment.system["canary"]) == (3, "ab12")


def test_only_what_the_project_pins_counts(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("torch==2.11.0\nruamel_yaml==0.1\n")
    lines = describe_environment(1, "ab12", tmp_path).requirements.splitlines()
    assert [line.partition("==")[0] for line in lines] == ["ruamel-yaml", "torch"]


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
