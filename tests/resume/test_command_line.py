"""A training that `sonosco train` began, killed from outside; what `sonosco resume` then says and does."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest

from project import environment, make_project, run

SONOSCO = [sys.executable, "-m", "sonosco_mlflow"]
SETTINGS = ["--set", "training.epochs=2", "--set", "checkpoint.every_steps=1"]
PATIENCE = 180.0


@dataclass(frozen=True)
class Project:
    folder: Path
    run_id: str
    expected: mlflow.entities.Run

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")

    def command(self, *arguments: str, status: int = 0) -> str:
        result = run([*SONOSCO, *arguments], self.folder, status=status, variables={"PYTHONPATH": "src"})
        return result.stdout + result.stderr

    def resume(self, *arguments: str, status: int = 0) -> str:
        return self.command("resume", self.run_id, *arguments, status=status)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Project:
    """A project with two equal runs: one that ended, and one that was killed once it had a checkpoint."""
    folder = make_project(tmp_path_factory.mktemp("killed") / "project")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    command = [*SONOSCO, "train", *SETTINGS]
    run(command, folder, variables={"PYTHONPATH": "src"})
    (expected,) = client.search_runs(["0"], "tags.`sonosco.kind` = 'train'")

    process = subprocess.Popen(command, cwd=folder, env=environment({"PYTHONPATH": "src"}), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.parent.parent.name not in _folder(expected) for path in folder.glob("runs/*/checkpoints/step-*1")):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL
    (other,) = (
        item
        for item in client.search_runs(["0"], "tags.`sonosco.kind` = 'train'")
        if item.info.run_id != expected.info.run_id
    )
    return Project(folder, other.info.run_id, expected)


def _folder(item: mlflow.entities.Run) -> str:
    folder: str = item.data.tags["sonosco.folder"]
    return folder


@pytest.mark.slow
def test_edited_code_is_refused(killed: Project) -> None:
    source = killed.folder / "src" / "sonosco_mlflow" / "text.py"
    before = source.read_bytes()
    source.write_bytes(before + b"\n# edited\n")
    try:
        output = killed.resume(status=1)
    finally:
        source.write_bytes(before)
    assert "sonosco_mlflow/text.py" in output
    assert "--allow-code-change" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_another_number_of_threads_is_refused(killed: Project) -> None:
    output = killed.resume("--set", "training.threads=2", status=1)
    assert "threads" in output
    assert "--allow-numerics-change" in output


@pytest.mark.slow
def test_a_changed_key_is_refused(killed: Project) -> None:
    output = killed.resume("--set", "optimizer.lr=0.5", status=1)
    assert "optimizer.lr was" in output
    assert "--allow-config-change" in output


@pytest.mark.slow
def test_it_goes_on_as_if_nothing_had_been(killed: Project) -> None:
    """Comes last: the run is finished by it."""
    assert f"run {killed.run_id} was found vanished; it goes on after step " in killed.resume()
    tags = killed.client.get_run(killed.run_id).data.tags
    assert tags["sonosco.state"] == "finished"
    assert tags["sonosco.weights_digest"] == killed.expected.data.tags["sonosco.weights_digest"]
    for name in ("train_loss", "val_loss", "test_loss"):
        histories = [
            [(item.step, item.value.hex()) for item in killed.client.get_metric_history(run_id, name)]
            for run_id in (killed.run_id, killed.expected.info.run_id)
        ]
        assert histories[0] == histories[1], name
