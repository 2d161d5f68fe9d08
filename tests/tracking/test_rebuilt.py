import json
import subprocess
from pathlib import Path

import pytest

from sonosco_mlflow.tracking import rebuilt, repository
from sonosco_mlflow.tracking.code_snapshot import snapshot_code
from sonosco_mlflow.tracking.environment import Environment
from sonosco_mlflow.tracking.origin import Command
from sonosco_mlflow.tracking.segments import Segment


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project below the root of its repository, with a file that is too large for a snapshot."""
    for module in ("code_archive", "repository"):
        monkeypatch.setattr(f"sonosco_mlflow.tracking.{module}.LARGEST_FILE", 1_000_000)
    root = tmp_path / "repository"
    (root / "sub").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    (root / "large.bin").write_bytes(bytes(repository.LARGEST_FILE + 1))
    (root / "sub" / "train.py").write_text("x = 1\n")
    return root / "sub"


@pytest.fixture
def segment(project: Path, monkeypatch: pytest.MonkeyPatch) -> Segment:
    snapshot = snapshot_code(project)
    assert list(json.loads(snapshot.git_json())["left_out"]) == ["large.bin"]
    monkeypatch.setattr(Segment, "archive", lambda self: snapshot.archive)
    monkeypatch.setattr(Segment, "git", lambda self: snapshot.git_json())
    return Segment("run")


def test_a_file_too_large_is_taken_from_the_repository(project: Path, segment: Segment, tmp_path: Path) -> None:
    rebuilt._restore_code(segment, project, tmp_path / "tree")
    assert (tmp_path / "tree" / "large.bin").read_bytes() == (project.parent / "large.bin").read_bytes()
    assert snapshot_code(tmp_path / "tree").left_out == snapshot_code(project).left_out


@pytest.mark.parametrize("content", [None, b"another"])
def test_without_it_the_run_is_made_again_and_that_is_said(
    project: Path, segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    large = project.parent / "large.bin"
    large.unlink()
    if content is not None:
        large.write_bytes(content)
    rebuilt._restore_code(segment, project, tmp_path / "tree")
    assert not (tmp_path / "tree" / "large.bin").exists()
    assert (tmp_path / "tree" / "sub" / "train.py").exists()
    assert f"large.bin was left out of the run's code snapshot, and {large} is not that file" in capsys.readouterr().err


@pytest.mark.parametrize(("trains_recipe", "expected"), [(True, "size: 1\n"), (False, "own: 3\n")])
def test_only_a_command_that_trains_a_recipe_reads_it_from_params(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trains_recipe: bool, expected: str
) -> None:
    (project / "params.yaml").write_text("own: 3\n")
    snapshot = snapshot_code(project)
    command = Command(("train.py",), "sub", (), trains_recipe)
    kept = {
        **{"archive": snapshot.archive, "git": snapshot.git_json(), "command": command},
        **{"settings": {"size": 1}, "environment": Environment("", {}), "data_lock": None},
    }
    for name, value in kept.items():
        monkeypatch.setattr(Segment, name, lambda self, value=value: value)
    rebuilt.rebuild(Segment("run"), project, tmp_path / "again", "local", None)
    assert (tmp_path / "again" / "project" / "sub" / "params.yaml").read_text() == expected
