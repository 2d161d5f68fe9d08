"""The commands' work, in this process: on the data of a project that stands ready."""

import csv
import json
import os
from pathlib import Path

import mlflow
import numpy as np
import pytest
import soundfile

from project import make_data, make_project, run
from sonosco_mlflow import trained
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.outcome import Outcome, report
from sonosco_mlflow.runs import resume, train
from sonosco_mlflow.serialization.checkpoint import checkpoints_in
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.segments import newest_segment
from sonosco_mlflow.tracking.store import download
from sonosco_mlflow.trained import evaluate, recognizer_of, run_of
from toy import ALPHABET, change_a_sample

pytestmark = pytest.mark.usefixtures("tracking_store")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(make_project(tmp_path_factory.mktemp("runs") / "project"))


@pytest.fixture
def outcome(project: Path) -> Outcome:
    return train(recipe(project), project, prepare=False, results=project / "results" / "train")


def recipe(project: Path, **overrides: str) -> Config:
    return Config.load(project / "params.yaml", {key.replace("__", "."): value for key, value in overrides.items()})


def test_a_run_leaves_what_dvc_keeps(project: Path, outcome: Outcome) -> None:
    results = project / "results" / "train"
    assert run_of(results / "mlflow_run.json") == outcome.run_id
    assert json.loads((results / "metrics.json").read_text()) == outcome.metrics
    logged = mlflow.get_run(outcome.run_id).data.metrics
    assert {name: logged[name] for name in outcome.metrics} == outcome.metrics
    with (results / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["train_loss"]) == logged["train_loss"]
    assert (results / "validations.csv").read_text().startswith("step,val_character_error_rate,val_loss,")


@pytest.mark.parametrize("way", [{"training__ema_decay": "0.9"}, {"training__average": "last"}])
def test_a_run_ends_with_averaged_weights_and_its_numbers_are_of_them(project: Path, way: dict[str, str]) -> None:
    settings = {
        "augment__speeds": "[0.9, 1.0, 1.1]",
        "augment__noise_snr": "[10, 20]",
        "schedule__reduction": "cosine",
        "training__epochs": "3",
        **way,
    }
    outcome = train(recipe(project, **settings), project, prepare=False)
    assert outcome is not None
    evaluate(outcome.run_id, project, prepare=False)
    (again,) = mlflow.MlflowClient().search_runs(
        ["0"], f"tags.`mlflow.parentRunId` = '{outcome.run_id}'", order_by=["attributes.start_time DESC"]
    )
    assert again.data.tags["sonosco.reproduced"] == "true"
    kept = sorted(artifact.path for artifact in mlflow.MlflowClient().list_artifacts(outcome.run_id, "checkpoints"))
    assert len(kept) >= 2


def test_where_training_reads_recordings_the_lineage_has_them(project: Path) -> None:
    folder = DataFolder(project / "data")
    plain, before = DataLineage.of_folder(folder), DataLineage.of_folder(folder, recordings=True)
    assert plain.contents.keys() | {"train recordings"} == before.contents.keys()
    assert plain.digest != before.digest
    train = Manifest.read(folder.manifest("train"))
    path = train.audio_path(train[0])
    content = path.read_bytes()
    change_a_sample(path)
    try:
        assert DataLineage.of_folder(folder, recordings=True).digest != before.digest
        # The features were made of it, and have not changed.
        assert DataLineage.of_folder(folder).digest == plain.digest
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("augment__noise_snr", "[10]", r"augment\.noise_snr: found \[10\.0\], expected the lowest and the highest"),
        ("augment__speeds", "[9]", r"augment\.speeds: found \[9\.0\], expected numbers from 0\.5 to 2"),
        ("tokenizer__sampling", "0.1", r"tokenizer\.sampling: found 0\.1 beside tokenizer\.kind 'characters'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_any_data(key: str, value: str, message: str, project: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(recipe(project, **{key: value}), project, prepare=False)


def test_the_report_says_what_a_person_wants_to_know(outcome: Outcome) -> None:
    text = report(outcome)
    assert outcome.run_id in text
    assert f"test_word_error_rate         {100 * outcome.metrics['test_word_error_rate']:6.2f} %  (95 %: " in text
    low, high = (100 * outcome.metrics[f"test_character_error_rate_{end}"] for end in ("lower", "upper"))
    assert f"(95 %: {low:.2f} to {high:.2f})" in text
    assert low <= 100 * outcome.metrics["test_character_error_rate"] <= high
    assert "val_word_error_rate_lower" not in outcome.metrics
    assert text.count("reference") == text.count("hypothesis") == 3
    assert "mlflow ui --backend-store-uri sqlite:///" in text


def test_the_recipe_decides_which_checkpoints_are_kept(project: Path) -> None:
    settings = {"data__frames_per_batch": "100", "checkpoint__every_steps": "2", "checkpoint__keep_last": "4"}
    config = recipe(project, **settings, checkpoint__keep_best="0", tracking__run_name="kept")
    run_id = train(config, project, prepare=False).run_id
    kept = [
        int(path.name.removeprefix("step-"))
        for path in checkpoints_in(project / "runs" / f"kept-{run_id[:6]}" / "checkpoints")
    ]
    assert len(kept) == 4
    assert [step % 2 for step in kept[:-1]] == [0, 0, 0]
    stored = mlflow.MlflowClient().list_artifacts(run_id, "checkpoints")
    assert [int(item.path.rpartition("-")[2]) for item in stored] == kept


def test_a_run_that_was_cut_off_goes_on_though_what_decides_no_bit_has_changed(project: Path) -> None:
    settings = {"data__frames_per_batch": "100", "training__seed": "7"}
    with pytest.raises(KeyboardInterrupt):
        train(recipe(project, **settings), project, prepare=False, until_step=2)
    before = mlflow.MlflowClient().search_runs(["0"], "tags.`sonosco.kind` = 'train'")
    commit = ["commit", "--quiet", "--allow-empty", "--message", "the same code"]
    run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *commit], project)
    other = recipe(project, **settings, data__workers="1", checkpoint__keep_last="3")
    outcome = train(other, project, prepare=False, go_on=True)
    assert outcome is not None
    assert outcome.run_id == before[0].info.run_id
    assert len(mlflow.MlflowClient().search_runs(["0"], "tags.`sonosco.kind` = 'train'")) == len(before)
    # As it now is asked for, not as it was.
    assert Config.resolve(newest_segment(mlflow.get_run(outcome.run_id)).settings(), {}) == other


def test_an_evaluation_derives_the_same_numbers_from_what_was_kept(
    project: Path, outcome: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    again = evaluate(outcome.run_id, project, prepare=False, results=project / "results" / "evaluate")
    assert again.metrics == {name: value for name, value in outcome.metrics.items() if name.startswith("test_")}
    assert again.results == outcome.results
    assert report(again) in capsys.readouterr().out
    with (project / "results" / "evaluate" / "hypotheses.csv").open() as file:
        assert [row["hypothesis"] for row in csv.DictReader(file)] == [row.hypothesis for row in outcome.results]
    assert set(recognizer_of(outcome.run_id, project).transcribe_file(next(project.glob("tones/*.wav")))) <= set(
        ALPHABET
    )


def test_an_evaluation_computes_where_its_run_did_or_says_nothing_of_equal_bits(
    project: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verdicts() -> list[str | None]:
        query = f"tags.`mlflow.parentRunId` = '{outcome.run_id}'"
        found = mlflow.MlflowClient().search_runs(["0"], query, order_by=["attributes.start_time ASC"])
        return [child.data.tags.get("sonosco.reproduced") for child in found]

    def absent(device: str) -> None:
        raise UserError(f"there is no {device}")

    moved: list[object] = []
    monkeypatch.setattr(SpeechModel, "to", lambda model, device: moved.append(device))
    evaluate(outcome.run_id, project, prepare=False)
    monkeypatch.setattr(trained, "require_device", absent)
    evaluate(outcome.run_id, project, prepare=False)
    assert moved == ["cpu"]
    assert verdicts() == ["true", None]
    assert "evaluated on the CPU, whose last bits are others: there is no cpu" in capsys.readouterr().err


def test_what_the_training_did_not_evaluate_is_not_compared(project: Path, outcome: Outcome) -> None:
    evaluated = evaluate(outcome.run_id, project, prepare=False, split="train")
    assert evaluated.metrics.keys() == {
        name.replace("test_", "train_split_") for name in outcome.metrics if name.startswith("test_")
    }
    (child,) = mlflow.MlflowClient().search_runs(["0"], f"tags.`mlflow.parentRunId` = '{outcome.run_id}'")
    assert "sonosco.reproduced" not in child.data.tags
    with pytest.raises(UserError, match=f"run {child.info.run_id} is no training: its tag sonosco.kind is 'evaluate'"):
        evaluate(child.info.run_id, project, prepare=False)
    with pytest.raises(UserError, match="--split: found 'foo', Valid: dev, test, train"):
        evaluate(outcome.run_id, project, prepare=False, split="foo")
    # A mistake leaves no run.
    assert len(mlflow.MlflowClient().search_runs(["0"], f"tags.`mlflow.parentRunId` = '{outcome.run_id}'")) == 1


def test_a_run_that_has_not_come_to_its_end_has_no_model_to_be_evaluated(project: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe(project, training__epochs="3"), project, prepare=False, until_step=2)
    (run,) = mlflow.MlflowClient().search_runs(["0"], "tags.`sonosco.state` = 'interrupted'", max_results=1)
    with pytest.raises(UserError, match=f"run {run.info.run_id} has no model, .* it is interrupted"):
        evaluate(run.info.run_id, project, prepare=False)
    # It stands behind that step already.
    with pytest.raises(KeyboardInterrupt):
        train(recipe(project, training__epochs="3"), project, prepare=False, go_on=True, until_step=1)
    assert mlflow.get_run(run.info.run_id).data.tags["sonosco.state"] == "interrupted"


def test_a_finished_run_says_that_other_settings_have_no_effect(
    project: Path, outcome: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(outcome.run_id, project, overrides={"optimizer.lr": "0.5"}, prepare=False) is None
    assert "what else was set has no effect" in capsys.readouterr().out
    assert resume(outcome.run_id, project, prepare=False) is None
    assert "no effect" not in capsys.readouterr().out


def test_a_sound_that_is_too_short_is_named(project: Path, outcome: Outcome, tmp_path: Path) -> None:
    recognizer = recognizer_of(outcome.run_id, project)
    path = tmp_path / "click.wav"
    soundfile.write(path, np.zeros(100, np.float32), 16_000)
    with pytest.raises(UserError, match=f"^{path}: its 100 samples are shorter than one analysis window"):
        recognizer.file_hypotheses(path)
    assert recognizer.predict(np.zeros((0, 16_000), np.float32)).tolist() == []


def test_other_data_than_the_runs_is_refused(project: Path, outcome: Outcome) -> None:
    manifest = project / "data" / "dataset" / "test.jsonl"
    before, times = manifest.read_text(), manifest.stat()
    manifest.write_text(before.replace('"text": "', '"text": "A', 1))
    try:
        with pytest.raises(UserError, match="the data here is not what run"):
            evaluate(outcome.run_id, project, prepare=False)
    finally:
        manifest.write_text(before)
        # Else its features would be older than it.
        os.utime(manifest, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("training.device", "gpu", "training.device: found 'gpu'"),
        ("training.device", "meta", "training.device: found 'meta'"),
        ("features.window_size", "0.000001", "features.window_size 1e-06"),
        ("features.n_mels", "100000", "features.n_mels is 100000"),
        ("model.settings.dropout", "2", "model.settings.*dropout"),
    ],
)
def test_a_value_that_cannot_be_is_told_before_any_data_is_made(
    project: Path, key: str, value: str, named: str
) -> None:
    config = Config.load(project / "params.yaml", {key: value, "data.source": "nowhere"})
    with pytest.raises(UserError, match=named):
        train(config, project)


def test_a_name_stays_inside_the_projects_folder(project: Path, outcome: Outcome) -> None:
    before = set((project / "runs").iterdir())
    run_id = train(recipe(project, tracking__run_name="../../a/b"), project, prepare=False).run_id
    (folder,) = set((project / "runs").iterdir()) - before
    assert folder.name == f"-..-a-b-{run_id[:6]}"


def test_the_console_log_holds_the_report_and_a_failure(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = train(recipe(project), project, prepare=False).run_id
    log = download(run_id, "logs/console.log", tmp_path / "finished").read_text()
    assert "see it:  mlflow ui" in log
    assert "see it:  mlflow ui" in capsys.readouterr().out

    with pytest.raises(UserError, match="nowhere"):
        train(recipe(project, data__source="nowhere"), project)
    failed = mlflow.search_runs(["0"], output_format="list", max_results=1)[0]
    assert failed.info.status == "FAILED"
    assert failed.data.tags["sonosco.kind"] == "train"
    assert failed.data.params["config.data.corpora.tones.source"] == "nowhere"
    log = download(failed.info.run_id, "logs/console.log", tmp_path / "failed").read_text()
    assert failed.data.tags["sonosco.error"] in log


def test_a_wrong_model_is_told_before_any_data_is_made(project: Path) -> None:
    with pytest.raises(UserError, match=r"model\.name.*'tsd'.*did you mean 'tds'"):
        train(recipe(project, model__name="tsd", data__source="nowhere"), project)


@pytest.mark.parametrize("content", ["", "{}", "[]", None])
def test_a_file_that_names_no_run_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json: names no run"):
        run_of(tmp_path / "run.json")
