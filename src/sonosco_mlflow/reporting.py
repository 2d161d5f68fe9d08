"""What a finished run shows in MLflow: tables, pictures, and the model ready to transcribe."""

import tempfile
from pathlib import Path

from sonosco_mlflow.data.dataset import AudioDataset
from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.decoding.search import GREEDY, Search
from sonosco_mlflow.evaluation import (
    alignment_picture,
    learning_curves,
    mel_spectrogram,
    utterance_results,
)
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.serving.logging import log_recognizer, trained_recognizer
from sonosco_mlflow.serving.registry import register_model
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.training.callbacks.history import History
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation


def log_results(
    run: TrackedRun,
    trainer: ModelTrainer,
    history: History,
    validation: Validation | None,
    test: Validation | None,
    test_loader: AudioDataLoader | None,
    registered_model: str | None,
    search: Search = GREEDY,
) -> None:
    """Log to ``run`` everything that a reader wants to see of a training that has ended; again, nothing is there twice.

    Args:
        run: where to.
        trainer: what has trained.
        history: every metric.
        validation: what the trained model is worth in validation, by which it is ranked, or None.
        test: the evaluation after training, if there was one.
        test_loader: its utterances.
        registered_model: of which the trained model becomes a version, or None.
        search: how the trained model decodes.
    """
    for name, found in (("validation", validation), ("test", test)):
        if found is not None and found.hypotheses:
            results = utterance_results(found)
            run.log_table([vars(result) for result in results], f"evaluation/{name}_hypotheses.json")
    curves = {name: history.curve(name) for name in history.names()}
    run.log_bytes(learning_curves(curves), "evaluation/learning_curves.png")
    loader = test_loader or trainer.val_loader or trainer.train_loader
    if loader is not None and isinstance(loader.dataset, AudioDataset):
        sample = loader.dataset[0]
        run.log_bytes(mel_spectrogram(sample), "evaluation/mel_spectrogram.png")
        if isinstance(trainer.model, SpeechModel):
            picture = alignment_picture(trainer.model, loader.tokenizer, sample)
            run.log_bytes(picture, "evaluation/alignment.png")
    recognizer = trained_recognizer(trainer, search)
    if recognizer is not None:
        with tempfile.TemporaryDirectory() as scratch:
            model_id = log_recognizer(recognizer, trainer.progress.step, Path(scratch))
        if registered_model is not None and validation is not None and trainer.val_loader is not None:
            digest = trainer.val_loader.dataset.manifest.digest
            register_model(run, model_id, registered_model, validation, digest)
