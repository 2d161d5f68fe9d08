"""What a training imports and looks up at its beginning, done once: every killed process is a fork of this one."""

import mlflow.pyfunc
import mlflow.store.tracking.sqlalchemy_store
import torch._inductor.config  # deterministic algorithms import it
import torch.utils.tensorboard
import victim

from sonosco_mlflow.evaluation import learning_curves

assert mlflow.pyfunc
assert torch.utils.tensorboard
assert victim
learning_curves({"val_loss": ([1], [1.0]), "val_word_error_rate": ([1], [1.0])})
