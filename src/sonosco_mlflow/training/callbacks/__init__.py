"""What may happen beside the training loop, one small file each.

>>> LinearWarmUp(steps=100).steps
100
"""

from sonosco_mlflow.training.callbacks.averages import CheckpointAverage, ExponentialAverage
from sonosco_mlflow.training.callbacks.base import Callback
from sonosco_mlflow.training.callbacks.early_stopping import EarlyStopping
from sonosco_mlflow.training.callbacks.epoch_time import EpochTimeEstimate
from sonosco_mlflow.training.callbacks.gradient_norms import LayerGradientNorms
from sonosco_mlflow.training.callbacks.history import History
from sonosco_mlflow.training.callbacks.learning_rate import (
    CosineDecay,
    InverseSquareRootDecay,
    LinearWarmUp,
    PlateauLearningRateReduction,
    ScheduledLearningRateReduction,
    StepwiseLearningRateReduction,
)
from sonosco_mlflow.training.callbacks.model_checkpoint import ModelCheckpoint
from sonosco_mlflow.training.callbacks.progress_bar import ProgressBar
from sonosco_mlflow.training.callbacks.soft_window import SoftWindow
from sonosco_mlflow.training.callbacks.text_comparison import TeacherForcedTextComparison, TextComparison

__all__ = [
    "Callback",
    "CheckpointAverage",
    "CosineDecay",
    "EarlyStopping",
    "EpochTimeEstimate",
    "ExponentialAverage",
    "History",
    "InverseSquareRootDecay",
    "LayerGradientNorms",
    "LinearWarmUp",
    "ModelCheckpoint",
    "PlateauLearningRateReduction",
    "ProgressBar",
    "ScheduledLearningRateReduction",
    "SoftWindow",
    "StepwiseLearningRateReduction",
    "TeacherForcedTextComparison",
    "TextComparison",
]
