"""Logging a recognizer as an MLflow model of the active run."""

import hashlib
import warnings
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities import LoggedModelStatus, Run
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from sonosco_mlflow.decoding.search import GREEDY, Search
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.serving.recognizer import SpeechRecognizer
from sonosco_mlflow.tracking.lease import condition
from sonosco_mlflow.tracking.store import download, models_of
from sonosco_mlflow.training.trainer import ModelTrainer

# Waveforms [batch, samples]; texts [batch].
SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
    outputs=Schema([TensorSpec(np.dtype(str), (-1,))]),
)
# What transcribing needs, and the package imports on the way.
_REQUIREMENTS = (
    *("mlflow", "torch", "torchaudio", "flashlight-text", "soundfile"),
    *("safetensors", "numpy", "pydantic", "ruamel.yaml"),
)
_PACKAGE = Path(__file__).resolve().parents[1]
_NAME = "model"
_DIGEST = "sonosco.recognizer_digest"


def trained_recognizer(trainer: ModelTrainer, search: Search = GREEDY) -> SpeechRecognizer | None:
    """Return the model of ``trainer`` with what its data goes through and how its output is searched.

    None where only its own program can use it.
    """
    if not isinstance(trainer.model, SpeechModel) or trainer.train_loader is None:
        return None
    dataset = trainer.train_loader.dataset
    recognizer = SpeechRecognizer(trainer.model, dataset.tokenizer, dataset.processor, dataset.statistics, search)
    try:
        recognizer.description()
    except UserError:
        # Its class, or one of its parts, does not say how it was made.
        return None
    return recognizer


def log_recognizer(recognizer: SpeechRecognizer, step: int, scratch: Path) -> str:
    """Log ``recognizer`` under the name ``model`` in the active run, with the metrics of ``step``; return its id.

    ``scratch`` is an empty folder.

    The package's own code goes with it, so that the model loads where the package is not installed. A run that was
    killed at its end comes by here again: the very same model is logged once.
    """
    recognizer.save(scratch / "recognizer")
    files = sorted((scratch / "recognizer").iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    logged = _logged(digest)
    if logged is not None:
        return logged
    with warnings.catch_warnings():
        # It advises examples and annotations even where the signature is given, and warns of its own classes.
        warnings.filterwarnings("ignore", message=".*(input example|type hint).*", category=UserWarning)
        made = mlflow.pyfunc.log_model(
            name=_NAME,
            step=step,
            tags={_DIGEST: digest},
            python_model=str(_PACKAGE / "serving" / "pyfunc.py"),
            artifacts={"recognizer": str(scratch / "recognizer")},
            code_paths=[str(_PACKAGE)],
            signature=SIGNATURE,
            # Inferring them would start another interpreter and import everything again.
            pip_requirements=[f"{name}=={version(name)}" for name in _REQUIREMENTS],
            metadata={"sample_rate": recognizer.processor.sample_rate},
        )
    return str(made.model_id)


def _logged(digest: str) -> str | None:
    """Return the id of this model in the active run, or None; what a crash left half-made is removed."""
    run = mlflow.active_run()
    assert run is not None
    found = None
    for model in models_of(run.info.run_id):
        if model.name != _NAME:
            continue
        if model.status != LoggedModelStatus.READY:
            mlflow.MlflowClient().delete_logged_model(model.model_id)
        elif model.tags.get(_DIGEST) == digest:
            found = str(model.model_id)
    return found


def load_recognizer(run: Run, scratch: Path) -> SpeechRecognizer:
    """Return the recognizer that a training logged; it is downloaded into ``scratch``.

    Raises:
        UserError: the run has no model.
    """
    run_id = run.info.run_id
    try:
        folder = download(run_id, "model", scratch)
    except UserError as error:
        raise UserError(
            f"run {run_id} has no model, which a training of a speech model keeps when it has come to its end; it is "
            f"{condition(run)}, and `sonosco show {run_id}` tells how it goes on ({error})"
        ) from error
    return SpeechRecognizer.load(folder / "artifacts" / "recognizer")
