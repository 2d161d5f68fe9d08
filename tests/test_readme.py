"""The README's Python is run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from toy import tone_corpus, tone_texts

README = Path(__file__).parents[1] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def said_by(script: Path, *arguments: str) -> list[str]:
    """Run a program with this package, beside which its data lies, and return the words that it prints."""
    command = [sys.executable, "-W", "error::FutureWarning", str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(README.parent / "src"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_store: str) -> Path:
    """A folder with the manifests that the README's example reads."""
    manifests = tmp_path / "data" / "dataset"
    for split, count in {"train": 12, "dev": 4}.items():
        tone_corpus(tmp_path / "data" / "corpora" / split, tone_texts(count)).write(manifests / f"{split}.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_trains_is_tracked_and_continues(project: Path) -> None:
    script = project / "example.py"
    script.write_text(python_blocks()[0] + "\nprint(experiment.run.id, trainer.progress.epoch)\n", encoding="utf-8")
    run_id, epoch = said_by(script)[-2:]
    assert epoch == "3"
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert len(mlflow.MlflowClient().get_metric_history(run_id, "val_sentence_error_rate")) == 2
    assert {"val_loss", "val_word_error_rate", "val_character_error_rate", "train_loss"} <= run.data.metrics.keys()
    assert run.data.params["config.size"] == "64"


def test_the_example_goes_on_with_its_run(project: Path) -> None:
    example = python_blocks()[0]
    created = 'Experiment.create({"size": 64}, serializer=Serializer())'
    assert example.count(created) == 1
    assert example.count("epochs=2") == 1
    program = example.split("trainer = Deserializer()")[0]
    program = program.replace(created, f"Experiment.resume(sys.argv[1]) if sys.argv[1:] else {created}")
    program = program.replace("epochs=2", "epochs=2 + len(sys.argv[1:])")
    script = project / "example.py"
    script.write_text(f"import sys\n{program}\nprint(experiment.run.id)\n", encoding="utf-8")
    arguments: list[str] = []
    for rows in (2, 3):
        arguments = said_by(script, *arguments)[-1:]
        assert len(mlflow.MlflowClient().get_metric_history(arguments[0], "val_sentence_error_rate")) == rows


@pytest.mark.skipif(Path(sys.prefix) != README.parent / ".venv", reason="the environment is another than make's")
def test_python_in_makes_environment_finds_the_package_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", "import sonosco_mlflow; print(sonosco_mlflow.__file__)"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()) == README.parent / "src" / "sonosco_mlflow" / "__init__.py"
