"""The run that MLflow's launcher made for a process which continues another run: below that one, a record of its part.

It holds nothing but how that part ended; all else stands in the run that goes on.
"""

import os
from contextlib import suppress
from typing import Self

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from sonosco_mlflow.tracking.tags import KIND, SEGMENT_RECORD, STATE, STATUS


class SegmentRecord:
    """The record of this process's segment. Where no launcher has made one, there is none to write to.

    Args:
        run_id: the run that goes on.
        record: id of the launcher's, or None.
    """

    def __init__(self, run_id: str, record: str | None = None) -> None:
        self._run_id = run_id
        self._record = record
        self._client = mlflow.MlflowClient()

    @classmethod
    def find(cls, run_id: str, segment: int) -> Self:
        """Make the run that the launcher made for this process, if it did, the record of that segment of ``run_id``."""
        record = os.environ.get("MLFLOW_RUN_ID")
        if record == run_id:
            # `mlflow run --run-id`: should the run be refused, it is not to be marked as failed.
            del os.environ["MLFLOW_RUN_ID"]
            return cls(run_id)
        found = cls(run_id, record)
        if record is not None:
            tags = {
                KIND: "segment",
                MLFLOW_PARENT_RUN_ID: run_id,
                MLFLOW_RUN_NAME: f"segment-{segment}-of-{run_id[:6]}",
                MLFLOW_RUN_NOTE: f"Segment {segment} of run `{run_id}`, which holds all that it recorded.",
            }
            for key, value in tags.items():
                found._client.set_tag(record, key, value)
        return found

    def begin(self) -> None:
        """Note that the segment goes on with the run, whose lease the caller has; so no earlier one does."""
        before = self._client.get_run(self._run_id).data.tags.get(SEGMENT_RECORD)
        if before is not None:
            # One that the user has deleted needs no end.
            with suppress(MlflowException):
                self._end_vanished(before)
        if self._record is not None:
            # Before it is called running: should this process be killed with its launcher, the next one ends it.
            self._client.set_tag(self._run_id, SEGMENT_RECORD, self._record)
            self._client.set_tag(self._record, STATE, "running")

    def end(self, state: str) -> None:
        """Note how the segment ended."""
        if self._record is not None:
            self._end(self._record, state)

    def _end_vanished(self, record: str) -> None:
        if self._client.get_run(record).data.tags.get(STATE) == "running":
            self._end(record, "interrupted")

    def _end(self, record: str, state: str) -> None:
        self._client.set_terminated(record, STATUS[state])
        self._client.set_tag(record, STATE, state)
