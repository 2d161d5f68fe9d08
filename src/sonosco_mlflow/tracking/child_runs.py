"""Runs below another one that are made here, for another process to open by ``MLFLOW_RUN_ID``."""

import os
from collections.abc import Mapping

import mlflow
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.tags import KIND, STATE, TRIAL


def new_run(experiment_id: str, tags: Mapping[str, str], parent: str) -> str:
    """Return the id of a run below run ``parent``, for another process to open by ``MLFLOW_RUN_ID``.

    It is the one that MLflow's launcher made for this process, or else a new one.
    """
    client = mlflow.MlflowClient()
    run_id = os.environ.pop("MLFLOW_RUN_ID", None) or client.create_run(experiment_id).info.run_id
    for key, value in {**tags, MLFLOW_PARENT_RUN_ID: parent}.items():
        client.set_tag(run_id, key, value)
    return str(run_id)


def trial_run(parent: TrackedRun, number: int) -> Run:
    """Return the run of a sweep's trial, below the sweep's own; it is made where there is none."""
    client = mlflow.MlflowClient()
    condition = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.id}' and tags.`{TRIAL}` = '{number}'"
    found = client.search_runs([parent.experiment_id], condition, max_results=1)
    if found:
        return found[0]
    # With its tags at once: a process that is killed here leaves no run that belongs to nobody.
    tags = {MLFLOW_PARENT_RUN_ID: parent.id, TRIAL: str(number), KIND: "train", STATE: "running"}
    return client.create_run(parent.experiment_id, tags=tags)
