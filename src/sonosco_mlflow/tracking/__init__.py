"""Where runs are recorded: MLflow, DVC, git and TensorBoard, and nowhere else."""
