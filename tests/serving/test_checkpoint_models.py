"""The checkpoints that a run keeps are models in MLflow, each with the metrics of its step."""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.entities import LoggedModel, LoggedModelStatus

from experiments import artifacts, go_on, new_project, rows, run_experiment, toy_trainer
from sonosco_mlflow import metrics
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.models.deepspeech2 import DeepSpeech2
from sonosco_mlflow.serving.checkpoint_models import CheckpointModels
from sonosco_mlflow.serving.logging import trained_recognizer
from sonosco_mlflow.tracking.journal import Row, read_rows
from sonosco_mlflow.tracking.store import artifact_bytes, models_of
from sonosco_mlflow.training.callbacks import ModelCheckpoint
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import TOKENIZER, tone_loader, tones

SMALLEST = {**DeepSpeech2.presets["small"], "channels": [2, 2], "hidden_size": 8, "recurrent_layers": 1}


@pytest.fixture(scope="module")
def finished(module_store: str, tmp_path_factory: pytest.TempPathFactory, tone_manifest: Manifest) -> Experiment:
    torch.set_num_threads(1)
    return run_experiment(toy_trainer(tone_manifest), new_project(tmp_path_factory.mktemp("project")))


def of_checkpoints(run_id: str) -> dict[str, LoggedModel]:
    models = [model for model in models_of(run_id) if "sonosco.checkpoint" in model.tags]
    assert len({model.name for model in models}) == len(models), "each is there once"
    return {model.name: model for model in models}


def manifest(run_id: str, name: str) -> bytes:
    return artifact_bytes(run_id, f"checkpoints/{name}/manifest.json")


def test_every_kept_checkpoint_is_a_model_at_its_step_with_its_metrics(finished: Experiment) -> None:
    run_id = finished.run.id
    models = of_checkpoints(run_id)
    assert {f"checkpoints/{name}" for name in models} == artifacts(run_id, "checkpoints")
    assert len(models) >= 2
    outputs = mlflow.get_run(run_id).outputs
    assert outputs is not None
    shown = {output.model_id: output.step for output in outputs.model_outputs}
    recorded = rows(run_id)
    # To the model they are sent with the run's name and time: the run has one row of each all the same.
    assert {key: values for key, values in recorded.items() if len(values) != 1} == {}
    for name, model in models.items():
        step = int(name.removeprefix("step-"))
        assert shown[model.model_id] == step
        assert model.status == LoggedModelStatus.READY
        found = {metric.key: metric.value for metric in model.metrics or []}
        assert {"train_loss", "learning_rate"} <= found.keys()
        assert ("val_loss" in found) == (("val_loss", step) in recorded)
        assert {(key, step): [value] for key, value in found.items()}.items() <= recorded.items()
        assert model.params == {"config.size": "1"}
    assert any("val_loss" in {metric.key for metric in model.metrics or []} for model in models.values())


def follow(experiment: Experiment, name: str, content: bytes, kept: frozenset[str]) -> None:
    step = int(name.removeprefix("step-"))
    found = [row for row in read_rows(experiment.folder / "journal.jsonl") if row.step == step]
    CheckpointModels(experiment.run, None).follow(name, content, kept, found)


def test_nothing_is_made_twice_and_what_a_crash_has_left_is_completed(
    finished: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = finished.run.id
    before = of_checkpoints(run_id)
    newest = max(before)
    kept = frozenset(before)
    follow(finished, newest, manifest(run_id, newest), kept)
    assert {name: model.model_id for name, model in of_checkpoints(run_id).items()} == {
        name: model.model_id for name, model in before.items()
    }

    # Another state under that name, as a way that was changed may bring: its model is another one.
    for crash in ("log_model_artifacts", "log_batch", "log_outputs", "finalize_logged_model"):
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, crash, failing)
            with pytest.raises(OSError, match="power"):
                follow(finished, newest, crash.encode(), kept)
        assert of_checkpoints(run_id)[newest].status == LoggedModelStatus.PENDING
        unfinished = of_checkpoints(run_id)[newest].model_id
        follow(finished, newest, crash.encode(), kept)
        model = of_checkpoints(run_id)[newest]
        assert (model.model_id, model.status) == (unfinished, LoggedModelStatus.READY)
        outputs = mlflow.get_run(run_id).outputs
        assert outputs is not None
        assert [output.model_id for output in outputs.model_outputs].count(model.model_id) == 1
        assert len(model.metrics or []) == len(before[newest].metrics or [])
    assert {key: values for key, values in rows(run_id).items() if len(values) != 1} == {}


def failing(*_: object, **__: object) -> None:
    raise OSError("the power has failed")


def test_a_model_goes_when_its_checkpoint_goes(finished: Experiment) -> None:
    run_id = finished.run.id
    oldest, *others = sorted(of_checkpoints(run_id))
    gone = of_checkpoints(run_id)[oldest]
    follow(finished, others[-1], manifest(run_id, others[-1]), frozenset(others))
    assert sorted(of_checkpoints(run_id)) == others
    assert not list(Path(gone.artifact_location.removeprefix("file://")).glob("*"))


def test_what_is_no_number_does_not_become_a_zero_of_the_model(finished: Experiment) -> None:
    row = Row(0, 900, 1, {"val_loss": float("nan"), "val_word_error_rate": 0.5, "loading_seconds": 3.0})
    CheckpointModels(finished.run, None).follow(
        "step-00000900", b"x", frozenset(of_checkpoints(finished.run.id)), [row]
    )
    model = of_checkpoints(finished.run.id)["step-00000900"]
    assert [(metric.key, metric.value) for metric in model.metrics or []] == [("val_word_error_rate", 0.5)]


def test_states_within_a_step_and_before_the_first_have_no_model(finished: Experiment) -> None:
    kept = frozenset(of_checkpoints(finished.run.id))
    models = CheckpointModels(finished.run, None)
    models.follow("step-00000003.0001", b"x", kept, [Row(0, 3, 1, {"train_loss": 1.0})])
    models.follow("step-00000000", b"x", kept, [])
    assert frozenset(of_checkpoints(finished.run.id)) == kept


def test_after_an_allowed_change_a_run_keeps_one_value_of_each_step(
    tmp_path: Path, tracking_store: str, tone_manifest: Manifest
) -> None:
    project = new_project(tmp_path)
    stopped = run_experiment(toy_trainer(tone_manifest, stop_at=9), project)
    run_id = stopped.run.id
    before = rows(run_id)
    # As if it had been killed before these were written. Steps 5 to 9 come out otherwise, and 8 has a checkpoint.
    for name in ("step-00000008", "step-00000009"):
        shutil.rmtree(stopped.folder / "checkpoints" / name)
        stopped.run.delete_artifact(f"checkpoints/{name}")
    faster = toy_trainer(tone_manifest, learning_rate=0.1)
    assert go_on(run_id, faster, project, config={"size": 2}, allowed_changes=["config"]).resumption is not None
    after = rows(run_id)
    assert {key: values for key, values in after.items() if len(values) != 1} == {}
    assert before.items() <= after.items()
    found = {metric.key for metric in of_checkpoints(run_id)["step-00000008"].metrics or []}
    assert "learning_rate" not in found, "the run shows the first value of this step, and this model was not made by it"


class Unmarked(DeepSpeech2):
    """A model of a user's, which does not say how it was made."""

    def __init__(self) -> None:
        super().__init__(n_mels=8, vocabulary_size=TOKENIZER.vocabulary_size, **SMALLEST)  # type: ignore[arg-type]


def test_a_model_that_only_its_own_program_can_make_is_trained_all_the_same(
    tmp_path: Path, tracking_store: str, tone_manifest: Manifest
) -> None:
    model = Unmarked()
    trainer = ModelTrainer(
        model,
        train_loader=tone_loader(tone_manifest),
        val_loader=tone_loader(tone_manifest, seed=None),
        metrics=[metrics.word_error_rate],
        epochs=1,
    )
    assert isinstance(model, SpeechModel)
    assert trained_recognizer(trainer) is None
    experiment = Experiment.create({"size": 1}, project=new_project(tmp_path), name="toy")
    experiment.setup_model_trainer(trainer, checkpoints=False)
    experiment.start()
    assert mlflow.get_run(experiment.run.id).info.status == "FINISHED"


def test_the_model_of_a_checkpoint_transcribes(tmp_path: Path, tracking_store: str, tone_manifest: Manifest) -> None:
    torch.manual_seed(0)
    model = DeepSpeech2(n_mels=8, vocabulary_size=TOKENIZER.vocabulary_size, **SMALLEST)  # type: ignore[arg-type]
    trainer = ModelTrainer(
        model,
        train_loader=tone_loader(tone_manifest),
        val_loader=tone_loader(tone_manifest, seed=None),
        metrics=[metrics.word_error_rate],
        callbacks=[ModelCheckpoint()],
        epochs=1,
    )
    experiment = run_experiment(trainer, new_project(tmp_path))
    (logged,) = of_checkpoints(experiment.run.id).values()
    waveform = tones("ABCA").astype(np.float32)
    expected = trained_recognizer(trainer)
    assert expected is not None
    found = mlflow.pyfunc.load_model(f"models:/{logged.model_id}").predict(waveform[None])
    assert list(found) == expected.transcribe([waveform])
    described = json.dumps(mlflow.models.get_model_info(f"models:/{logged.model_id}").metadata)
    assert f"runs:/{experiment.run.id}/checkpoints/{logged.name}" in described
