"""Speech recognition training in which every number in the MLflow UI can be derived again, bit for bit.

The names below are loaded when they are first used: importing the package costs neither torch nor MLflow.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sonosco_mlflow.config import Config
    from sonosco_mlflow.data.augment import SpecAugment
    from sonosco_mlflow.data.dataset import AudioDataset
    from sonosco_mlflow.data.features import FeatureStatistics, FeatureStore
    from sonosco_mlflow.data.loader import AudioDataLoader, Batch
    from sonosco_mlflow.data.manifest import Manifest
    from sonosco_mlflow.data.processor import AudioDataProcessor
    from sonosco_mlflow.experiment import Experiment
    from sonosco_mlflow.models import build_model
    from sonosco_mlflow.serialization.parameters import serializable
    from sonosco_mlflow.serialization.serializer import Serializer
    from sonosco_mlflow.text import CharacterTokenizer
    from sonosco_mlflow.tracking.checkpoints import Deserializer
    from sonosco_mlflow.tracking.tensorboard import TensorBoard
    from sonosco_mlflow.training.callbacks.base import Callback
    from sonosco_mlflow.training.callbacks.early_stopping import EarlyStopping
    from sonosco_mlflow.training.callbacks.model_checkpoint import ModelCheckpoint
    from sonosco_mlflow.training.trainer import ModelTrainer

__version__ = "0.1.0"

_HOMES = {
    "AudioDataLoader": "data.loader",
    "AudioDataProcessor": "data.processor",
    "AudioDataset": "data.dataset",
    "Batch": "data.loader",
    "Callback": "training.callbacks.base",
    "CharacterTokenizer": "text",
    "Config": "config",
    "Deserializer": "tracking.checkpoints",
    "EarlyStopping": "training.callbacks.early_stopping",
    "Experiment": "experiment",
    "FeatureStatistics": "data.features",
    "FeatureStore": "data.features",
    "Manifest": "data.manifest",
    "ModelCheckpoint": "training.callbacks.model_checkpoint",
    "ModelTrainer": "training.trainer",
    "Serializer": "serialization.serializer",
    "SpecAugment": "data.augment",
    "TensorBoard": "tracking.tensorboard",
    "build_model": "models",
    "serializable": "serialization.parameters",
}

__all__ = [
    "AudioDataLoader",
    "AudioDataProcessor",
    "AudioDataset",
    "Batch",
    "Callback",
    "CharacterTokenizer",
    "Config",
    "Deserializer",
    "EarlyStopping",
    "Experiment",
    "FeatureStatistics",
    "FeatureStore",
    "Manifest",
    "ModelCheckpoint",
    "ModelTrainer",
    "Serializer",
    "SpecAugment",
    "TensorBoard",
    "build_model",
    "serializable",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
