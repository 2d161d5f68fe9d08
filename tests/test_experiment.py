import hashlib
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import mlflow
import pytest
import torch

from sonosco_mlflow import metrics
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.models import build_model
from sonosco_mlflow.tracking.checkpoints import Deserializer
from sonosco_mlflow.tracking.mlflow_run import download
from sonosco_mlflow.training.callbacks import Callback
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import ALPHABET, TOKENIZER, ToyModel, tone_loader

pytestmark = pytest.mark.usefixtures("tracking_store")
TIMINGS = {"utterances_per_second", "epoch_seconds"}


def toy_trainer(manifest: Manifest, *callbacks: Callback, epochs: int = 2) -> ModelTrainer:
    torch.manual_seed(0)
    return ModelTrainer(
        ToyModel(),
        train_loader=tone_loader(manifest),
        val_loader=tone_loader(manifest, seed=None),
        metrics=[metrics.word_error_rate],
        callbacks=callbacks,
        epochs=epochs,
    )


def run_experiment(trainer: ModelTrainer, folder: Path) -> Experiment:
    experiment = Experiment.create({"size": 1}, project=folder, name="toy")
    experiment.setup_model_trainer(trainer, test_loader=trainer.val_loader)
    try:
        experiment.start()
    except KeyboardInterrupt:
        experiment.stop()
    return experiment


def artifacts(run_id: str, folder: str = "") -> set[str]:
    return {item.path for item in mlflow.MlflowClient().list_artifacts(run_id, folder)}


def rows(run_id: str) -> Mapping[tuple[str, int], list[float]]:
    client = mlflow.MlflowClient()
    found: dict[tuple[str, int], list[float]] = {}
    for name in client.get_run(run_id).data.metrics:
        for item in client.get_metric_history(run_id, name):
            if not name.startswith("system/") and name not in TIMINGS:
                found.setdefault((name, item.step), []).append(item.value)
    return found


class Interrupt(Callback):
    """Interrupts at a step, once."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.done = False

    def on_step_end(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step == self.step and not self.done:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)

    def state_dict(self) -> dict[str, object]:
        return {"done": self.done}


def test_a_finished_run_is_whole(tone_manifest: Manifest, tmp_path: Path) -> None:
    trainer = toy_trainer(tone_manifest)
    experiment = run_experiment(trainer, tmp_path)
    run = mlflow.get_run(experiment.run.id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"config.size": "1"}
    assert "| val_loss |" in run.data.tags["mlflow.note.content"]
    assert {"code", "environment", "data", "checkpoints", "evaluation", "logs", "tensorboard"} <= artifacts(
        run.info.run_id
    )
    assert artifacts(run.info.run_id, "evaluation") == {
        "evaluation/test_hypotheses.json",
        "evaluation/validation_hypotheses.json",
        "evaluation/learning_curves.png",
        "evaluation/mel_spectrogram.png",
    }
    names = {"train_loss", "learning_rate", "gradient_norm", "utterances_per_second", "val_loss"}
    assert names | {"val_word_error_rate", "test_loss", "test_word_error_rate"} <= run.data.metrics.keys()
    steps = trainer.progress.step
    found = rows(run.info.run_id)
    assert {step for name, step in found if name == "train_loss"} == set(range(1, steps + 1))
    assert all(len(values) == 1 for values in found.values())


def test_the_same_run_again_ends_in_the_same_bits(tone_manifest: Manifest, tmp_path: Path) -> None:
    first, second = (run_experiment(toy_trainer(tone_manifest), tmp_path) for _ in range(2))
    tags = [mlflow.get_run(experiment.run.id).data.tags for experiment in (first, second)]
    assert tags[0]["sonosco.weights_digest"] == tags[1]["sonosco.weights_digest"]
    assert rows(first.run.id) == rows(second.run.id)


def test_the_weights_digest_is_that_of_the_kept_weights(tone_manifest: Manifest, tmp_path: Path) -> None:
    experiment = run_experiment(toy_trainer(tone_manifest), tmp_path)
    tags = mlflow.get_run(experiment.run.id).data.tags
    weights = download(experiment.run.id, tags["sonosco.checkpoint"], tmp_path) / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == tags["sonosco.weights_digest"]


def test_hypotheses_stand_beside_their_references(tone_manifest: Manifest, tmp_path: Path) -> None:
    experiment = run_experiment(toy_trainer(tone_manifest), tmp_path)
    table = json.loads(download(experiment.run.id, "evaluation/test_hypotheses.json", tmp_path).read_text())
    shown = {row[0]: row[1:3] for row in table["data"]}
    assert experiment.test is not None
    assert shown == {
        name: [reference, hypothesis]
        for name, reference, hypothesis in zip(
            experiment.test.ids, experiment.test.references, experiment.test.hypotheses, strict=True
        )
    }
    assert {name: pair[0] for name, pair in shown.items()} == {item.id: item.text for item in tone_manifest}


def test_stopped_and_continued_is_as_if_never_stopped(tone_manifest: Manifest, tmp_path: Path) -> None:
    whole = toy_trainer(tone_manifest, Interrupt(step=0))
    whole.start_training()

    stopped = run_experiment(toy_trainer(tone_manifest, Interrupt(step=5)), tmp_path)
    run = mlflow.get_run(stopped.run.id)
    assert run.info.status == "KILLED"
    assert run.data.tags["sonosco.state"] == "stopped"
    loader = tone_loader(tone_manifest)
    continued = Deserializer(trusted=["toy", "test_experiment"]).deserialize(
        f"runs:/{stopped.run.id}", train_loader=loader, val_loader=tone_loader(tone_manifest, seed=None)
    )
    assert continued.progress.step == 5
    continued.continue_training()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, continued.model.state_dict()[name]), name
    assert continued.progress == whole.progress


def test_a_failure_is_told_by_the_run(tone_manifest: Manifest, tmp_path: Path) -> None:
    trainer = toy_trainer(tone_manifest)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    experiment = Experiment.create({}, project=tmp_path)
    experiment.setup_model_trainer(trainer)
    with pytest.raises(Exception, match="the loss is nan"):
        experiment.start()
    run = mlflow.get_run(experiment.run.id)
    assert run.info.status == "FAILED"
    assert "the loss is nan at step 1" in run.data.tags["sonosco.error"]


def test_a_run_whose_provenance_fails_does_not_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise OSError("no snapshot today")

    monkeypatch.setattr("sonosco_mlflow.experiment.snapshot_code", broken)
    with pytest.raises(OSError, match="no snapshot"):
        Experiment.create({}, project=tmp_path)
    run = mlflow.search_runs(["0"], output_format="list", max_results=1)[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["sonosco.error"] == "OSError: no snapshot today"


def test_the_kept_model_transcribes_waveforms(tone_manifest: Manifest, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"channels": [2], "blocks": [1], "decoder_size": 16, "kernel": 3, "strides": [2]}
    model = build_model("tds", "small", n_mels=8, vocabulary_size=TOKENIZER.vocabulary_size, settings=settings)
    loader = tone_loader(tone_manifest, seed=None)
    experiment = run_experiment(ModelTrainer(model, train_loader=loader, val_loader=loader, epochs=1), tmp_path)
    logged = mlflow.pyfunc.load_model(f"runs:/{experiment.run.id}/model")
    waveform = torch.zeros(1, 16000).numpy()
    assert logged.metadata.signature is not None
    texts = logged.predict(waveform)
    assert len(texts) == 1
    assert set(texts[0]) <= set(ALPHABET)
    assert "evaluation/alignment.png" in artifacts(experiment.run.id, "evaluation")
