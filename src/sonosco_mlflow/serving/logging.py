"""Logging a recognizer as an MLflow model of the active run."""

import warnings
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from sonosco_mlflow.serving.recognizer import SpeechRecognizer
from sonosco_mlflow.tracking.mlflow_run import download

# Waveforms [batch, samples]; texts [batch].
SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
    outputs=Schema([TensorSpec(np.dtype(str), (-1,))]),
)
# What transcribing needs, and the package imports on the way.
_REQUIREMENTS = ("mlflow", "torch", "torchaudio", "soundfile", "safetensors", "numpy", "pydantic", "ruamel.yaml")
_PACKAGE = Path(__file__).resolve().parents[1]


def log_recognizer(recognizer: SpeechRecognizer, scratch: Path) -> None:
    """Log ``recognizer`` under the name ``model`` in the active run; ``scratch`` is an empty folder.

    The package's own code goes with it, so that the model loads where the package is not installed.
    """
    recognizer.save(scratch / "recognizer")
    with warnings.catch_warnings():
        # It advises examples and annotations even where the signature is given, and warns of its own classes.
        warnings.filterwarnings("ignore", message=".*(input example|type hint).*", category=UserWarning)
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(_PACKAGE / "serving" / "pyfunc.py"),
            artifacts={"recognizer": str(scratch / "recognizer")},
            code_paths=[str(_PACKAGE)],
            signature=SIGNATURE,
            # Inferring them would start another interpreter and import everything again.
            pip_requirements=[f"{name}=={version(name)}" for name in _REQUIREMENTS],
            metadata={"sample_rate": recognizer.processor.sample_rate},
        )


def load_recognizer(run_id: str, scratch: Path) -> SpeechRecognizer:
    """Return the recognizer that run ``run_id`` logged; it is downloaded into ``scratch``.

    Raises:
        UserError: the run has no model.
    """
    return SpeechRecognizer.load(download(run_id, "model", scratch) / "artifacts" / "recognizer")
