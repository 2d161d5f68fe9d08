"""Several corpora in one recipe: each has stages of its own, and training sees all of them as one."""

import json
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from project import make_project, run
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.features import FeatureStore
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.recipe import build_loaders
from sonosco_mlflow.tracking.data_lock import lock_text, stage_outputs
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.pipeline import prepare_data
from sonosco_mlflow.tracking.readiness import require_current
from sonosco_mlflow.tracking.restoration import restore_data

DVC = ["python", "-m", "dvc"]
OUTPUTS = ("data/corpora", "data/manifests", "data/features")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("corpora") / "project")


def make(project: Path, *names: str, **others: dict[str, object]) -> DataFolder:
    """Bring the project's data, of corpora with these names that are all the same recordings, and of ``others``."""
    recipe = YAML(typ="safe").load((project / "params.yaml").read_text())
    recipe["data"]["corpora"] = {name: {"kind": "folder", "source": "tones", "parts": {}} for name in names} | others
    with (project / "params.yaml").open("w") as file:
        YAML().dump(recipe, file)
    return prepare_data(Config.load(project / "params.yaml"), project)


def written(folder: DataFolder, name: str) -> dict[Path, int]:
    """Return when each file of a corpus was written."""
    places = (folder.corpus(name), folder.manifests(name), folder.features(name))
    return {path: path.stat().st_mtime_ns for place in places for path in place.rglob("*.*")}


def test_a_corpus_that_is_added_runs_its_own_stages_only(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make(project, "tones")
    alone, before = DataLineage.of_folder(folder), written(folder, "tones")
    capfd.readouterr()

    assert make(project, "tones", "more") == folder
    said = capfd.readouterr().err
    assert "features of more, train" in said
    assert "tones" not in said.replace("/tones", "")
    assert written(folder, "tones") == before
    assert set(stage_outputs(folder)) == {f"{place}/{name}" for name in ("tones", "more") for place in OUTPUTS} | {
        "data/dataset"
    }
    both = DataLineage.of_folder(folder)
    assert both.counts["train"]["utterances"] == 2 * alone.counts["train"]["utterances"]
    require_current(folder)
    commit = ["commit", "--quiet", "--message", "data", "dvc.lock", "params.yaml"]
    for command in (["add", "dvc.lock"], commit):
        run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], project)
    assert json.loads(run([*DVC, "data", "status", "--json"], project).stdout) == {}
    assert json.loads(run([*DVC, "status", "--json", "dataset"], project).stdout) == {}

    # One that is taken away leaves nothing that a project without it would not have.
    make(project, "tones")
    assert DataLineage.of_folder(folder).digest == alone.digest
    assert [path.name for path in (project / "data").glob("*/more")] == []
    assert json.loads(run([*DVC, "status", "--json", "dataset"], project).stdout) == {}
    # And comes back from DVC's cache.
    capfd.readouterr()
    make(project, "tones", "more")
    assert "of more" not in capfd.readouterr().err
    assert DataLineage.of_folder(folder).digest == both.digest


def test_a_corpus_beside_one_that_needs_no_source_runs_its_own_stages_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    project = make_project(tmp_path / "project")
    stages = YAML().load((project / "dvc.yaml").read_text())
    stages["stages"]["corpus"]["do"]["deps"][-1] = "sources/${key}"
    with (project / "dvc.yaml").open("w") as file:
        YAML().dump(stages, file)
    (project / "sources" / "default").mkdir(parents=True)
    (project / "sources" / "default" / ".gitkeep").touch()
    (project / "sources" / "tones").symlink_to(tmp_path / "recordings")
    shutil.copytree(project / "tones", tmp_path / "recordings")
    default = {"kind": "default", "parts": {}}
    folder = make(project, default=default)
    before = written(folder, "default")
    capfd.readouterr()

    own = {"kind": "folder", "source": "sources/tones", "parts": {}}
    assert make(project, default=default, tones=own) == folder
    assert "default" not in capfd.readouterr().err
    assert written(folder, "default") == before
    more = next((tmp_path / "recordings").glob("*.wav"))
    shutil.copy(more, more.with_name("more.wav"))
    shutil.copy(more.with_suffix(".txt"), more.with_name("more.txt"))
    make(project, default=default, tones=own)
    said = capfd.readouterr().err
    assert "features of tones, train" in said
    assert "default" not in said
    assert written(folder, "default") == before


def test_training_sees_all_of_them(project: Path) -> None:
    folder = make(project, "tones", "more")
    train = Manifest.read(folder.manifest("train"))
    single = Manifest.read(folder.manifests("tones") / "train.jsonl")
    assert [utterance.id for utterance in train] == sorted(
        f"{name}-{utterance.id}" for name in ("tones", "more") for utterance in single
    )
    assert all(train.audio_path(utterance).is_file() for utterance in train)
    store = FeatureStore(folder.features("more") / "train")
    joined = folder.store("train")
    assert len(joined) == 2 * len(store) == len(train)
    for utterance in single:
        assert joined.read(f"more-{utterance.id}").tobytes() == store.read(utterance.id).tobytes()
        assert joined.frames(f"more-{utterance.id}") == store.frames(utterance.id)
        assert utterance.id not in joined
    loaders = build_loaders(Config.load(project / "params.yaml"), folder)
    assert sorted(name for batch in loaders.train.epoch(0) for name in batch.ids) == [row.id for row in train]


def test_a_run_on_them_finds_its_data_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(workspace: Path) -> None:
        raise AssertionError("a stage was run")

    folder = make(project, "tones", "more")
    config, lock, digest = Config.load(project / "params.yaml"), lock_text(folder), DataLineage.of_folder(folder).digest
    other = prepare_data(Config.load(project / "params.yaml", {"features.n_mels": "5"}), project)
    assert DataLineage.of_folder(other).counts == DataLineage.of_folder(folder).counts
    make(project, "tones")
    monkeypatch.setattr("sonosco_mlflow.tracking.restoration.reproduce", refuse)
    shutil.rmtree(folder.root)
    restored = restore_data(config, project, lock, digest)
    assert DataLineage.of_folder(restored).digest == digest
    assert project / ".sonosco" in restored.root.parents


def test_a_corpus_that_the_recipe_does_not_have_gets_the_nearest(project: Path) -> None:
    make(project, "tones", "more")
    said = run(
        ["env", f"PYTHONPATH={project / 'src'}", "python", "-m", "sonosco_mlflow", "features", "mre"], project, status=1
    ).stderr
    assert "'mre' is no corpus of the recipe; did you mean 'more'" in said
