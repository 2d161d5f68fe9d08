"""Where runs are recorded: MLflow, DVC, git and TensorBoard, and nowhere else."""

import os

# GitPython lets itself not be imported where there is no git; there a run's code is what it has imported.
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
