"""A run is made again from what MLflow and DVC kept, in processes of their own."""

import json
import shutil
import sys
from pathlib import Path

import mlflow
import pytest
from ruamel.yaml import YAML

from project import DATA_STAGES, REPOSITORY, Project, make_project, run, with_artifacts
from sonosco_mlflow import reproduction
from sonosco_mlflow.errors import UserError
from toy import tone_corpus, tone_texts

MLFLOW = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local"]
SONOSCO = [sys.executable, "-m", "sonosco_mlflow"]
DVC = [sys.executable, "-m", "dvc"]
GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
MODEL = """
from sonosco_mlflow.models.deepspeech2 import DeepSpeech2
from sonosco_mlflow.serialization.parameters import serializable


@serializable
class Mine(DeepSpeech2):
    def forward(self, batch):
        output = super().forward(batch)
        return type(output)(**{**vars(output), "loss": 0.5 * output.loss})
"""


def reproduce(project: Project, run_id: str, *options: str, status: int = 0) -> str:
    return project.run([*SONOSCO, "reproduce", run_id, "--env-manager", "local", *options], status)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Project:
    """A project with a model that git has never seen, whose run was killed twice and then came to its end.

    The project is gone. What is left is the store, DVC's remote, and a clone in which the code has gone on since.
    """
    folder = tmp_path_factory.mktemp("reproduction")
    project = make_project(folder / "project")
    run([*DVC, "remote", "add", "--default", "kept", str(folder / "remote")], project)
    run([*GIT, "commit", "--quiet", "--all", "-m", "remote"], project)
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with_artifacts(folder)
    (project / "src" / "sonosco_mlflow" / "models" / "mine.py").write_text(MODEL)
    models = project / "src" / "sonosco_mlflow" / "models" / "__init__.py"
    entry = '    "mine": "sonosco_mlflow.models.mine:Mine",\n'
    models.write_text(models.read_text().replace('    "tds"', f'{entry}    "tds"'))
    recipe = YAML().load((project / "params.yaml").read_text())
    recipe["model"]["name"] = "mine"
    # Long enough to be killed in the middle on any machine.
    recipe["training"]["epochs"] = 12
    recipe["checkpoint"]["every_steps"] = 1
    with (project / "params.yaml").open("w") as file:
        YAML().dump(recipe, file)

    trained = Project(project, folder / "mlflow.db")
    killed = trained.begin_and_kill([*SONOSCO, "train"]).info.run_id
    process = trained.begin([*SONOSCO, "resume", killed], segment=2)
    process.kill()
    process.wait()
    trained.run([*SONOSCO, "resume", killed])
    assert trained.client.get_run(killed).data.tags["sonosco.segments"] == "3"
    trained.run([*DVC, "push", *DATA_STAGES])

    clone = folder / "clone"
    run(["git", "clone", "--quiet", str(project), str(clone)], folder)
    for number in range(10):
        processor = clone / "src" / "sonosco_mlflow" / "data" / "processor.py"
        processor.write_text(processor.read_text() + f"# {number}\n")
        run([*GIT, "commit", "--quiet", "--all", "-m", f"{number}"], clone)
    shutil.rmtree(project)
    return Project(clone, folder / "mlflow.db")


@pytest.fixture(scope="module")
def original(world: Project) -> str:
    return str(world.trainings()[0].info.run_id)


def certificate(project: Project, run_id: str) -> dict[str, object]:
    path = project.client.download_artifacts(run_id, "reproduction/certificate.json")
    content = json.loads(Path(path).read_text())
    assert isinstance(content, dict)
    return content


def test_a_run_is_made_again_when_its_project_is_gone(world: Project, original: str) -> None:
    said = reproduce(world, original)
    assert "**bit-identical**" in said
    made = world.trainings()[-1]
    tags, expected = made.data.tags, world.client.get_run(original).data.tags
    for name in ("code", "config", "data", "environment", "weights"):
        assert tags[f"sonosco.{name}_digest"] == expected[f"sonosco.{name}_digest"], name
    assert (tags["sonosco.reproduces"], tags["sonosco.reproduced"]) == (original, "true")
    assert tags["mlflow.parentRunId"] == original
    assert expected["sonosco.reproduced_by"] == made.info.run_id
    found = certificate(world, made.info.run_id)
    assert (found["bit_identical"], found["differences"], found["differing_inputs"]) == (True, [], {})
    compared = found["compared"]
    assert isinstance(compared, dict)
    assert compared["metric_rows"] > 30
    assert len(compared["checkpoints"]) >= 2
    assert compared["hypotheses"] == ["test_hypotheses.json", "validation_hypotheses.json"]
    # Nothing is left in the project but what DVC has fetched.
    assert run(["git", "status", "--porcelain", "--ignored"], world.folder).stdout == "!! .dvc/cache/\n"


@pytest.mark.slow
def test_a_part_is_proven_for_less_also_by_the_launcher(world: Project, original: str) -> None:
    count = len(world.runs())
    options = ("-P", f"run_id={original}", "-P", "env-manager=local", "-P", "until-step=2")
    said = world.run([*MLFLOW, "-e", "reproduce", *options])
    assert len(world.runs()) == count + 1
    assert "up to step 2" in said
    assert "**bit-identical**" in said
    made = world.trainings()[-1]
    assert max(step for step, _ in world.history(made.info.run_id, "train_loss")) == 2
    assert made.data.tags["sonosco.state"] == "interrupted"


def test_where_they_part_is_named_with_the_input_that_differs(world: Project, original: str) -> None:
    """What the run kept of its recipe was changed since."""
    kept = Path(world.client.get_run(original).info.artifact_uri) / "config" / "params.yaml"
    text = kept.read_text()
    recipe = YAML().load(text)
    recipe["optimizer"]["lr"] *= 2
    try:
        with kept.open("w") as file:
            YAML().dump(recipe, file)
        said = reproduce(world, original, status=1)
    finally:
        kept.write_text(text)
    assert "**not the same**" in said
    assert "They part at step 1: learning_rate was " in said
    assert "- config: the recipe that the run kept is not the one whose digest it recorded" in said
    found = certificate(world, world.trainings()[-1].info.run_id)
    differences = found["differences"]
    assert isinstance(differences, list)
    assert any("model.safetensors: " in item["what"] for item in differences)


def test_what_cannot_be_made_again_is_refused_before_anything_runs(
    world: Project, original: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.variables["MLFLOW_TRACKING_URI"])
    mlflow.set_tracking_uri(None)
    count = len(world.runs())
    for run_id, options, message in (
        ("nonsense", {}, "run 'nonsense' is not in the tracking store"),
        (original, {"environment_manager": "conda"}, "env-manager is 'conda', expected uv or local"),
        (original, {"until_step": 99999}, "--until-step 99999 has nothing to be compared with"),
    ):
        with pytest.raises(UserError, match=message):
            reproduction.reproduce(run_id, Path(), **options)  # type: ignore[arg-type]
    system = Path(world.client.get_run(original).info.artifact_uri) / "environment" / "system.json"
    text = system.read_text()
    try:
        system.write_text(json.dumps({**json.loads(text), "canary": "0" * 64, "processor": "Another One"}))
        said = reproduce(world, original, status=1)
    finally:
        system.write_text(text)
    assert "the same operations give other bits here" in said
    assert "it ran on Another One" in said
    assert "--allow-numerics-change" in said
    assert len(world.runs()) == count


@pytest.mark.slow
def test_a_finished_run_that_was_given_more_epochs_is_made_again(tmp_path: Path, empty_database: Path) -> None:
    project = Project(make_project(tmp_path / "project"), tmp_path / "mlflow.db")
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    with_artifacts(tmp_path)
    project.run([*SONOSCO, "train", "--set", "training.epochs=1"])
    original = project.trainings()[0].info.run_id
    project.run([*SONOSCO, "resume", original, "--set", "training.epochs=2"])
    assert "all is as recorded" in project.run([*SONOSCO, "verify", original])
    assert len(project.history(original, "test_loss")) == 2
    assert "**bit-identical**" in reproduce(project, original)


PROGRAM = """
import sys
from pathlib import Path

import torch

from own.model import Mine
from sonosco_mlflow import (
    AudioDataLoader, AudioDataProcessor, AudioDataset, CharacterTokenizer, Experiment, Manifest, ModelTrainer, metrics
)

manifest = Manifest.read(Path(sys.argv[2], "manifest.jsonl"))
tokenizer = CharacterTokenizer.of(utterance.text for utterance in manifest)
dataset = AudioDataset(manifest, AudioDataProcessor(n_mels=8), tokenizer)
loader = AudioDataLoader(dataset, frames_per_batch=200, seed=0)
torch.manual_seed(int(sys.argv[1]))
settings = {**Mine.presets["small"], "channels": [2, 2], "hidden_size": 4}
model = Mine(n_mels=8, vocabulary_size=tokenizer.vocabulary_size, **settings)
trainer = ModelTrainer(
    model, train_loader=loader, val_loader=loader, metrics=[metrics.word_error_rate], epochs=2
)
with Experiment.create({"seed": sys.argv[1]}) as experiment:
    experiment.setup_model_trainer(trainer)
    experiment.start()
"""


def with_program(folder: Path, empty_database: Path, program: Path, library: Path) -> Project:
    """Return ``folder / "project"``, an empty store, and a program and its model in the two places, with a corpus."""
    tone_corpus(folder / "tones", tone_texts(6)).write(folder / "tones" / "manifest.jsonl")
    for place in (folder / "project", program, library / "own"):
        place.mkdir(parents=True, exist_ok=True)
    (library / "own" / "model.py").write_text(MODEL)
    (program / "program.py").write_text(PROGRAM)
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with_artifacts(folder)
    return Project(folder / "project", folder / "mlflow.db")


@pytest.mark.slow
def test_another_number_of_threads_is_named(tmp_path: Path, empty_database: Path) -> None:
    """A program takes the number that it finds: what the machine has, where nothing says another."""
    tones = tmp_path / "tones"
    project = with_program(tmp_path, empty_database, tmp_path / "project", tmp_path / "project")
    project.variables["PYTHONPATH"] = str(REPOSITORY / "src")
    bare = ["env", "-u", "OMP_NUM_THREADS"]
    project.run([*bare, "taskset", "-c", "0", sys.executable, "program.py", "3", str(tones)])
    original = project.trainings()[0].info.run_id
    said = project.run([*bare, *SONOSCO, "reproduce", original, "--env-manager", "local"], 1)
    assert "- numerics: threads was 1, is 2" in said
    said = project.run([*SONOSCO, "diff", original, project.trainings()[-1].info.run_id])
    assert "likely cause  numerics: threads was 1, is 2" in said


@pytest.mark.slow
@pytest.mark.parametrize("place", ["repository", "elsewhere"])
def test_a_run_of_a_program_of_the_users_is_made_again(tmp_path: Path, empty_database: Path, place: str) -> None:
    """It lies in the project, which is a repository; or outside of it, as its model does, and git knows of nothing."""
    folder, tones = tmp_path / "project", tmp_path / "tones"
    program, library = folder, folder
    if place == "elsewhere":
        program, library = tmp_path / "programs", tmp_path / "library"
    project = with_program(tmp_path, empty_database, program, library)
    if place == "repository":
        run(["git", "init", "--quiet"], folder)
    project.variables["PYTHONPATH"] = f"{REPOSITORY / 'src'}:{library}"
    project.run([sys.executable, str(program / "program.py"), "3", str(tones)])
    original = project.trainings()[0].info.run_id
    project.variables["PYTHONPATH"] = str(REPOSITORY / "src")
    for gone in {folder, program, library}:
        shutil.rmtree(gone)
    folder.mkdir()
    said = reproduce(project, original)
    assert f"program.py 3 {tones}" in said
    assert "**bit-identical**" in said
    said = reproduce(project, original, "--until-step", "1", status=1)
    assert "a program of its own, which knows no --until-step" in said
