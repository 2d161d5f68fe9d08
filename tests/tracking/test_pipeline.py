import shutil
from pathlib import Path

import pytest
from dvc.config import Config as Settings
from ruamel.yaml import YAML

from project import make_project
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import CharacterTokenizer
from sonosco_mlflow.tracking.data_lock import lock_text, stage_outputs
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.pipeline import make_private, prepare_data, ready_data, remotes, require_watched
from sonosco_mlflow.tracking.restoration import restore_data
from sonosco_mlflow.vocabulary import read_tokenizer
from sonosco_mlflow.word_pieces import WordPieceTokenizer
from toy import change_a_sample

OUTPUTS = {"data/corpora/tones", "data/manifests/tones", "data/features/tones", "data/dataset"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("pipeline") / "project")


def recipe(project: Path, **overrides: str) -> Config:
    return Config.load(project / "params.yaml", {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.fixture(scope="module")
def own(project: Path) -> DataFolder:
    return prepare_data(recipe(project), project)


def test_the_projects_own_recipe_is_made_in_its_own_folder(project: Path, own: DataFolder) -> None:
    assert own.root == project / "data"
    assert stage_outputs(own).keys() == OUTPUTS
    assert own.store("test").n_mels == 8
    assert ready_data(recipe(project), project) == own


def test_what_a_killed_dvc_left_empty_is_made_anew(project: Path, own: DataFolder) -> None:
    lock, in_use = project / "dvc.lock", project / ".dvc" / "tmp" / "rwlock"
    before, outputs = lock.read_bytes(), stage_outputs(own)
    for path in (lock, in_use):
        assert path.exists()
        path.write_bytes(b"")
    assert prepare_data(recipe(project), project) == own
    assert lock.read_bytes() == before
    assert stage_outputs(own) == outputs


def test_another_recipe_leaves_the_project_as_it_is(project: Path, own: DataFolder) -> None:
    before = {name: (project / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    features = {path: path.stat().st_mtime_ns for path in own.features("tones").rglob("*.npy")}
    other = prepare_data(recipe(project, features__n_mels="5"), project)
    assert project / ".sonosco" in other.root.parents
    assert other.store("train").n_mels == 5
    assert {name: (project / name).read_bytes() for name in before} == before
    assert {path: path.stat().st_mtime_ns for path in own.features("tones").rglob("*.npy")} == features

    # The manifests are the same, the features are not, and the digest of the data says so.
    assert stage_outputs(other)["data/manifests/tones"] == stage_outputs(own)["data/manifests/tones"]
    assert stage_outputs(other)["data/features/tones"] != stage_outputs(own)["data/features/tones"]
    assert DataLineage.of_folder(other).digest != DataLineage.of_folder(own).digest


def test_word_pieces_are_a_vocabulary_of_their_own(project: Path, own: DataFolder) -> None:
    other = prepare_data(recipe(project, tokenizer__kind="word_pieces", tokenizer__size="12"), project)
    assert isinstance(read_tokenizer(own.vocabulary), CharacterTokenizer)
    pieces = read_tokenizer(other.vocabulary)
    assert isinstance(pieces, WordPieceTokenizer)
    assert 6 < len(pieces.pieces) <= 12
    assert stage_outputs(other)["data/corpora/tones"] == stage_outputs(own)["data/corpora/tones"]
    assert stage_outputs(other)["data/features/tones"] == stage_outputs(own)["data/features/tones"]
    assert DataLineage.of_folder(other).vocabulary == pieces.digest
    # How they are drawn in training makes no other data.
    sampled = recipe(project, tokenizer__kind="word_pieces", tokenizer__size="12", tokenizer__sampling="0.1")
    assert ready_data(sampled, project) == other


def test_what_does_not_touch_the_data_shares_it(project: Path, own: DataFolder) -> None:
    assert ready_data(recipe(project, optimizer__lr="0.1", training__seed="7", data__workers="2"), project) == own


def test_one_cache_serves_all_workspaces(project: Path, own: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    # From the command line the project is the working folder, by a relative path.
    monkeypatch.chdir(project)
    other = prepare_data(recipe(project, features__n_mels="6"), Path())
    assert not (other.root.parent / ".dvc" / "cache").exists()
    assert not (other.root.parent / ".dvc" / ".dvc").exists()
    digest = stage_outputs(other)["data/features/tones"]
    assert (project / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]).exists()


def test_what_both_recipes_say_is_said_in_the_same_words(project: Path, tmp_path: Path) -> None:
    path = project / "params.yaml"
    before = path.read_text()
    written = YAML(typ="safe").load(before)
    written["data"]["corpora"] = {
        "default": None,
        "an4": {"hold_out": True},
        "tones": {"kind": "folder", "source": "x"},
    }
    del written["features"]["kind"]
    with path.open("w") as file:
        YAML().dump(written, file)
    try:
        for given, same in [({}, True), ({"features__n_mels": "6"}, False)]:
            config = recipe(project, **given)
            make_private(tmp_path / "workspace", config, project)
            assert Config.load(tmp_path / "workspace" / "params.yaml").features == config.features
            made = YAML(typ="safe").load((tmp_path / "workspace" / "params.yaml").read_text())
            assert (made["features"] == written["features"]) is same
            corpora = made["data"]["corpora"]
            assert {name: corpora[name] for name in ("default", "an4")} == {"default": None, "an4": {"hold_out": True}}
            assert corpora["tones"] == {"kind": "folder", "source": str(project / "x"), "parts": {}}
    finally:
        path.write_text(before)


def test_a_failed_stage_says_why(project: Path) -> None:
    with pytest.raises(UserError, match="src: found no etc/an4_train") as raised:
        prepare_data(recipe(project, data__corpus="an4", data__source="src"), project)
    assert "dvc repro" not in str(raised.value)


def test_an_unknown_corpus_is_refused_at_once(project: Path) -> None:
    with pytest.raises(UserError, match=r"data\.corpora\.an5\.kind: found 'an5', did you mean 'an4'"):
        prepare_data(recipe(project, data__corpus="an5"), project)


def test_a_source_that_does_not_exist_is_named(project: Path) -> None:
    with pytest.raises(UserError, match=r"data\.corpora\.tones\.source: found 'nowhere'"):
        prepare_data(recipe(project, data__source="nowhere"), project)


def test_a_source_that_dvc_does_not_watch_is_refused(project: Path, tmp_path: Path) -> None:
    """The project's own stages name its own source only."""
    shutil.copytree(project, tmp_path / "copy", symlinks=True)
    copy = tmp_path / "copy"
    shutil.copytree(copy / "tones", copy / "others")
    text = (copy / "params.yaml").read_text()
    (copy / "params.yaml").write_text(text.replace("source: tones", "source: others"))
    stages = (copy / "dvc.yaml").read_text()
    (copy / "dvc.yaml").write_text(stages.replace("- ${item.source}", "- tones"))
    with pytest.raises(UserError, match=r"the stage corpus does not name 'others' among its deps.*add the line"):
        prepare_data(recipe(copy), copy)
    (copy / "dvc.yaml").write_text(stages.replace("- ${item.source}", "- others"))
    made = prepare_data(recipe(copy), copy)
    before = DataLineage.of_folder(made).digest
    change_a_sample(copy / "others" / "tone-005.wav")
    assert DataLineage.of_folder(prepare_data(recipe(copy), copy)).digest != before


def test_a_source_is_watched_with_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    config = Config.resolve({"data": {"corpora": {"an4": {"kind": "an4", "source": "archives/an4.tar.gz"}}}}, {})
    for dependency in ("archives", "archives/an4.tar.gz", "${item.source}", "archives/${key}.tar.gz"):
        (tmp_path / "dvc.yaml").write_text(f"stages: {{corpus: {{do: {{deps: ['{dependency}']}}}}}}")
        require_watched(config, "an4", tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {corpus: {do: {deps: [archives/an4.tar]}}}")
    with pytest.raises(UserError, match=r"does not name 'archives/an4\.tar\.gz' among its deps"):
        require_watched(config, "an4", tmp_path)


def test_without_a_pipeline_there_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dvc\.yaml here"):
        prepare_data(Config(), tmp_path)


def test_the_lock_of_the_data_names_the_data_stages_alone(project: Path, own: DataFolder, tmp_path: Path) -> None:
    lock = project / "dvc.lock"
    before = lock.read_text()
    lock.write_text(before + "  train:\n    cmd: train\n")
    text = lock_text(own)
    lock.write_text(before)
    assert text == lock_text(own)
    assert YAML(typ="safe").load(text) == YAML(typ="safe").load(before)
    assert lock_text(DataFolder(tmp_path / "data")) is None


def test_a_runs_data_is_used_as_it_lies_there_or_comes_from_the_cache(
    project: Path, own: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(workspace: Path) -> None:
        raise AssertionError("a stage was run")

    monkeypatch.setattr("sonosco_mlflow.tracking.restoration.reproduce", refuse)
    digest = DataLineage.of_folder(own).digest
    arguments = (recipe(project), project, lock_text(own), digest)
    others = set((project / ".sonosco" / "data").glob("*"))
    assert restore_data(*arguments) == own
    assert set((project / ".sonosco" / "data").glob("*")) == others

    # Edited in place: neither the manifests nor dvc.lock show it.
    lock = (project / "dvc.lock").read_bytes()
    shard = next(own.features("tones").rglob("*.npy"))
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    edited = shard.read_bytes()
    try:
        restored = restore_data(*arguments)
        assert shard.read_bytes() == edited != before
    finally:
        shard.write_bytes(before)
    assert project / ".sonosco" in restored.root.parents
    assert DataLineage.of_folder(restored).digest == digest
    assert (restored.root / shard.relative_to(own.root)).read_bytes() == before
    assert (project / "dvc.lock").read_bytes() == lock


def test_a_private_workspace_has_the_projects_settings(project: Path, own: DataFolder, tmp_path: Path) -> None:
    config = project / ".dvc" / "config"
    before = config.read_text()
    config.write_text(f'{before}    remote = near\n[remote "near"]\n    url = ../../near\n[cache]\n    type = copy\n')
    (project / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {tmp_path / 'shared'}\n")
    workspace = project / ".sonosco" / "data" / "settings"
    try:
        for _ in range(2):
            make_private(workspace, recipe(project), project)
        settings = Settings(str(workspace / ".dvc"))
        assert settings["remote"]["near"]["url"] == str(project.parent / "near")
        assert settings["cache"]["dir"] == str(tmp_path / "shared")
        assert settings["cache"]["type"] == ["copy"]
        assert settings["core"]["no_scm"]
        assert remotes(workspace) == ["near"]
        config.write_text(before + '[remote "a"]\n    url = /a\n[remote "b"]\n    url = /b\n')
        (project / ".dvc" / "config.local").unlink()
        make_private(workspace, recipe(project), project)
        assert remotes(workspace) == ["a", "b"]
        assert Settings(str(workspace / ".dvc"))["cache"]["dir"] == str(project / ".dvc" / "cache")
    finally:
        config.write_text(before)
        (project / ".dvc" / "config.local").unlink(missing_ok=True)
