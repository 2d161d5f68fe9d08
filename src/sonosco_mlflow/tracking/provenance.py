"""What MLflow is told of where a run comes from, before its first step and before the first of each later segment."""

import warnings
from dataclasses import dataclass

from sonosco_mlflow.console import say
from sonosco_mlflow.serialization.checkpoint import Checkpoint
from sonosco_mlflow.tracking.code_snapshot import imported_since
from sonosco_mlflow.tracking.language_model import KeptModel
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.origin import Origin
from sonosco_mlflow.tracking.segments import RECORD, Segment
from sonosco_mlflow.tracking.tags import ALLOWED_CHANGES, CANARY, IMPORTED_DIGEST


@dataclass(frozen=True)
class Provenance:
    """Code, environment, recipe and data, as a process trains with them.

    Attributes:
        origin: the first three.
        lineage: where the data comes from.
        canary: what the arithmetic of the device gives that is trained on.
        language_model: what the test set is decoded with, or None.
    """

    origin: Origin
    lineage: DataLineage
    canary: str
    language_model: KeptModel | None = None

    def log_data(self, run: TrackedRun) -> None:
        """Log the data of a run that begins; its origin was logged as it was made."""
        self._warn_of_late_imports()
        if not self.lineage.outputs:
            say("DVC does not version this data: the run knows it by digests of its own, which cannot bring it back")
        run.set_tags({**self.lineage.tags(), CANARY: self.canary})
        self.lineage.log(run)
        if self.language_model is not None:
            self.language_model.log(run)
        run.adopt_data_runs(self.lineage.digest)

    def log_segment(self, run: TrackedRun, segment: Segment, checkpoint: Checkpoint | None) -> None:
        """Log all of it for a segment that goes on from ``checkpoint``; its record last: then all is there."""
        self._warn_of_late_imports()
        self.origin.log(run, segment.folder)
        self.lineage.log(run, segment.folder)
        if self.language_model is not None:
            self.language_model.log(run, segment.folder)
        run.log_text(segment.record(checkpoint), f"{segment.folder}{RECORD}")
        # What follows shows the run as it now is; a resume does not read it.
        self.origin.log_recipe(run)
        if self.language_model is not None:
            self.language_model.log(run)
        tags = {**self.origin.tags(), **self.lineage.tags(), CANARY: self.canary}
        run.set_tags(tags)
        if IMPORTED_DIGEST not in tags:
            # Another program, which imports nothing of its own, may go on with a run.
            run.forget_tags(IMPORTED_DIGEST)
        changed = {name for branch in segment.branches for name in branch.changes}
        if changed:
            run.set_tags({ALLOWED_CHANGES: ",".join(sorted(changed))})
        run.adopt_data_runs(self.lineage.digest)

    def _warn_of_late_imports(self) -> None:
        late = imported_since(self.origin.code)
        if late:
            warnings.warn(
                "imported after the run's code was kept, and not in it as it is now: "
                f"{', '.join(map(str, late))}; import it before the Experiment is made",
                stacklevel=4,
            )
