import json
import sys
from pathlib import Path

import pytest
from dvc.dvcfile import Lockfile
from dvc.exceptions import DvcException
from dvc.utils.serialize import parse_yaml

from project import REPOSITORY, run
from sonosco_mlflow.tracking.dvc_command import remove_torn

LOCK = """schema: '2.0'
stages:
  features:
    cmd: make features
    deps:
    - path: waves
      hash: md5
      md5: 0cc175b9c0f1b6a831c399e269772661.dir
      size: 12
      nfiles: 3
    params:
      params.yaml:
        source:
    outs:
    - path: features
      hash: md5
      md5: 92eb5ffee6ae2fec3ad71c777531578f.dir
      size: 14
      nfiles: 2
"""
WITHOUT_OUTPUTS = LOCK[: LOCK.index("    outs:")]
CONFLICT = LOCK.replace("      size: 14\n", "<<<<<<< HEAD\n      size: 14\n=======\n      size: 15\n>>>>>>> other\n")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    return tmp_path


def dvc_reads(path: Path) -> bool:
    try:
        Lockfile.validate(parse_yaml(path.read_text(), str(path)), str(path))
    except DvcException:
        return False
    return True


def test_wherever_the_lock_file_was_cut_dvc_can_begin(workspace: Path) -> None:
    path = workspace / "dvc.lock"
    removed = 0
    for length in range(len(LOCK)):
        path.write_text(LOCK[:length])
        remove_torn(workspace)
        removed += not path.exists()
        assert not path.exists() or dvc_reads(path), LOCK[:length]
    assert 0 < removed < len(LOCK) / 2


@pytest.mark.parametrize("content", [LOCK, WITHOUT_OUTPUTS, CONFLICT], ids=["whole", "ends with a null", "conflict"])
def test_a_lock_file_that_no_kill_has_cut_stays(workspace: Path, content: str) -> None:
    path = workspace / "dvc.lock"
    path.write_text(content)
    remove_torn(workspace)
    assert path.read_text() == content


def test_a_list_of_what_is_in_use_that_was_cut_is_removed(workspace: Path) -> None:
    path = workspace / ".dvc" / "tmp" / "rwlock"
    whole = json.dumps({"write": {"/x": {"pid": 3, "cmd": "dvc repro"}}, "read": {}})
    for length in range(len(whole)):
        path.write_text(whole[:length])
        remove_torn(workspace)
        assert not path.exists(), whole[:length]
    path.write_text(whole)
    remove_torn(workspace)
    assert path.read_text() == whole


def test_where_nothing_was_killed_nothing_is_written(workspace: Path) -> None:
    remove_torn(workspace)
    assert list(workspace.rglob("*")) == [workspace / ".dvc", workspace / ".dvc" / "tmp"]


def test_it_mends_the_project_around_the_folder_and_is_dvc(workspace: Path) -> None:
    (workspace / "dvc.lock").touch()
    run(["git", "init", "--quiet"], workspace)
    inner = workspace / "a" / "b"
    inner.mkdir(parents=True)
    command = [sys.executable, "-P", "-m", "sonosco_mlflow.tracking.dvc_command"]
    variables = {"PYTHONPATH": str(REPOSITORY / "src")}
    assert run([*command, "root"], inner, variables=variables).stdout == "../..\n"
    assert not (workspace / "dvc.lock").exists()
    assert "--nonsense" in run([*command, "root", "--nonsense"], inner, variables=variables, status=254).stderr


def test_it_is_what_the_environment_calls_dvc(workspace: Path) -> None:
    """Begun as a researcher does; outside make's environment DVC's own command stands there."""
    if not (Path(sys.executable).parent / "sonosco").exists():
        pytest.skip("this environment was not made by make")
    (workspace / "dvc.lock").touch()
    run(["dvc", "--version"], workspace)
    assert not (workspace / "dvc.lock").exists()
