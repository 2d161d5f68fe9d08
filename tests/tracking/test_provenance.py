import io
import subprocess
import zipfile
from pathlib import Path

import pytest

from sonosco_mlflow.tracking.provenance import describe_environment, snapshot_code


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    (tmp_path / ".gitignore").write_text("ignored.txt\n")
    (tmp_path / "tracked.py").write_text("x = 1\n")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def names(archive: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(archive)).namelist()


def test_a_clean_tree_is_its_commit(repository: Path) -> None:
    snapshot = snapshot_code(repository)
    assert snapshot.commit == git(repository, "rev-parse", "HEAD").strip()
    assert snapshot.branch == "main"
    assert not snapshot.dirty
    assert snapshot.patch == ""
    assert names(snapshot.archive) == [".gitignore", "tracked.py"]


def test_untracked_files_are_in_it_and_ignored_ones_are_not(repository: Path) -> None:
    (repository / "untracked.py").write_text("y = 2\n")
    (repository / "ignored.txt").write_text("secret\n")
    snapshot = snapshot_code(repository)
    assert snapshot.dirty
    assert names(snapshot.archive) == [".gitignore", "tracked.py", "untracked.py"]


def test_the_patch_makes_the_commit_what_ran(repository: Path) -> None:
    (repository / "tracked.py").write_text("x = 2\n")
    (repository / "patch").write_text(snapshot_code(repository).patch)
    git(repository, "checkout", "--quiet", "tracked.py")
    git(repository, "apply", "patch")
    assert (repository / "tracked.py").read_text() == "x = 2\n"


def test_the_digest_depends_on_contents_names_and_modes_and_on_nothing_else(repository: Path) -> None:
    first = snapshot_code(repository)
    (repository / "tracked.py").write_text("x = 2\n")
    changed = snapshot_code(repository)
    (repository / "tracked.py").write_text("x = 1\n")
    assert snapshot_code(repository).archive == first.archive
    assert snapshot_code(repository).digest == first.digest != changed.digest
    (repository / "tracked.py").chmod(0o755)
    assert snapshot_code(repository).digest not in {first.digest, changed.digest}


def test_other_parameters_and_other_data_are_no_other_code(repository: Path) -> None:
    before = snapshot_code(repository)
    (repository / "params.yaml").write_text("training: {epochs: 2}\n")
    (repository / "dvc.lock").write_text("stages: {}\n")
    after = snapshot_code(repository)
    assert after.digest == before.digest
    assert not after.dirty
    assert {"params.yaml", "dvc.lock"} <= set(names(after.archive))


def test_a_file_deleted_but_not_committed_is_left_out(repository: Path) -> None:
    (repository / "tracked.py").unlink()
    snapshot = snapshot_code(repository)
    assert names(snapshot.archive) == [".gitignore"]
    assert snapshot.dirty


def test_before_the_first_commit_and_detached(tmp_path: Path, repository: Path) -> None:
    git(repository, "checkout", "--quiet", "--detach")
    assert snapshot_code(repository).branch is None
    unborn = tmp_path / "unborn"
    unborn.mkdir()
    git(unborn, "init", "--quiet")
    (unborn / "a.py").write_text("")
    snapshot = snapshot_code(unborn)
    assert snapshot.commit is None
    assert names(snapshot.archive) == ["a.py"]


def test_outside_git_the_package_itself_is_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    snapshot = snapshot_code(tmp_path_factory.mktemp("bare"))
    assert snapshot.commit is None
    assert "tracking/provenance.py" in names(snapshot.archive)


def test_credentials_do_not_leave(repository: Path) -> None:
    git(repository, "remote", "add", "origin", "https://user:secret@example.org/repository.git")
    snapshot = snapshot_code(repository)
    assert snapshot.remote == "https://example.org/repository.git"
    assert "secret" not in snapshot.git_json()


def test_a_large_file_is_listed_with_its_digest(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sonosco_mlflow.tracking.provenance.LARGEST_FILE", 100)
    (repository / "large.bin").write_bytes(bytes(101))
    snapshot = snapshot_code(repository)
    assert "large.bin" not in names(snapshot.archive)
    assert list(snapshot.left_out) == ["large.bin"]


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
