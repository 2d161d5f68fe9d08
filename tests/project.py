"""A whole project in a folder of its own: the repository's files, a corpus of tones, a model that learns it fast."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML

from toy import tone_corpus, tone_texts

REPOSITORY = Path(__file__).parents[1]
FILES = ("MLproject", "python_env.yaml", "dvc.yaml", ".dvcignore", ".gitignore", "requirements.txt")
RECIPE = {
    "data": {"corpus": "folder", "source": "tones", "frames_per_batch": 400},
    "features": {"n_mels": 8},
    "model": {
        "name": "deepspeech2",
        "preset": "small",
        "settings": {"channels": [2, 2], "hidden_size": 8, "recurrent_layers": 1},
    },
    "training": {"epochs": 1, "threads": 1},
}


def make_project(folder: Path, utterances: int = 30) -> Path:
    """Write the project into ``folder`` and commit it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "src", ".dvc", *FILES]
    listed = run(command, REPOSITORY).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    for utterance in tone_corpus(folder / "tones", tone_texts(utterances)):
        (folder / "tones" / f"{utterance.id}.txt").write_text(utterance.text)
    recipe = YAML(typ="safe").load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    for section, keys in RECIPE.items():
        recipe[section].update(keys)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(recipe, file)
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "first"]):
        run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], folder)
    return folder


def run(
    command: list[str], folder: Path, *, status: int = 0, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``folder`` with this interpreter first on PATH, and require its exit status."""
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment(variables),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == status, f"{command} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of a process of this interpreter's, without those that would lead it elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "PYTHONPATH"))}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, **(variables or {})}
