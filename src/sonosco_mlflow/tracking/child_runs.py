"""Runs below another one that are made here, for another process to open by ``MLFLOW_RUN_ID``."""

import os
from collections.abc import Mapping

import mlflow
from mlflow.entities import LifecycleStage, Run, ViewType
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


def is_deleted(run: Run) -> bool:
    """Return whether somebody has deleted a run, in the UI for instance."""
    return bool(run.info.lifecycle_stage == LifecycleStage.DELETED)


def find_trial(parent: TrackedRun, number: int, deleted_too: bool = False) -> Run | None:
    """Return the run of a sweep's trial, below the sweep's own; None where there is none."""
    view = ViewType.ALL if deleted_too else ViewType.ACTIVE_ONLY
    condition = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.id}' and tags.`{TRIAL}` = '{number}'"
    found = mlflow.MlflowClient().search_runs([parent.experiment_id], condition, run_view_type=view)
    # One that was deleted in the UI, and trained again, is there twice.
    return min(found, key=is_deleted, default=None)


def trial_run(parent: TrackedRun, number: int) -> Run:
    """Return the run of a sweep's trial, to be trained; it is made where there is none."""
    if found := find_trial(parent, number):
        return found
    client = mlflow.MlflowClient()
    # With its tags at once: a process that is killed here leaves no run that belongs to nobody.
    tags = {MLFLOW_PARENT_RUN_ID: parent.id, TRIAL: str(number), KIND: "train", STATE: "running"}
    return client.create_run(parent.experiment_id, tags=tags)
