"""MLflow's active run: the one that a user's own ``mlflow.log_metric`` and its like log to.

MLflow keeps a list of them for each thread, calls the last of them finished when the process ends, and offers no way
to take one off the list without telling the tracking store so. A run of ours may be made in one thread, trained in
another and stopped from a third, by a process that cannot reach the store.
"""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mlflow
from mlflow.entities import Run
from mlflow.tracking import fluent

from sonosco_mlflow.background import OverdueError, within

SECONDS_FOR_THE_MONITOR = 5.0


# The runs of ours that are active: one that was opened within another ends by itself.
_activations: set[str] = set()


class Activation:
    """A run that is active in the thread that made this, until :meth:`leave`; others may be active below it.

    Args:
        run_id: a run to open again, or None for a new one in MLflow's current experiment.
        monitored: whether the use of the machine is recorded as metrics.
    """

    def __init__(self, run_id: str | None, *, monitored: bool) -> None:
        nested = mlflow.active_run() is not None
        self.run: Run = mlflow.start_run(run_id=run_id, nested=nested, log_system_metrics=monitored)
        self._active = _active_runs()
        _activations.add(self.run.info.run_id)
        # Before MLflow's own hook: a process that ends without a word has not finished its run.
        atexit.register(self.leave, 0.0)

    def leave(self, patience: float = SECONDS_FOR_THE_MONITOR) -> list[str]:
        """Make the run active no more, and return the ids of those that were opened after it and left open.

        Args:
            patience: seconds that MLflow's monitor of the machine has to record its last values.
        """
        run_id = self.run.info.run_id
        ids = [active.info.run_id for active in self._active]
        if run_id not in ids:
            return []
        atexit.unregister(self.leave)
        _activations.discard(run_id)
        above = [other for other in ids[ids.index(run_id) + 1 :] if other not in _activations]
        self._active[:] = [active for active in self._active if active.info.run_id not in (run_id, *above)]
        monitor = fluent.run_id_to_system_metrics_monitor.pop(run_id, None)
        if monitor is not None:
            with suppress(OverdueError):
                within(patience, monitor.finish)
        return above


@contextmanager
def active_here(run: Run) -> Iterator[None]:
    """Have ``run`` active in this thread while the block runs."""
    stack = _active_runs()
    if any(active.info.run_id == run.info.run_id for active in stack):
        yield
        return
    active = mlflow.ActiveRun(run)  # type: ignore[no-untyped-call]
    stack.append(active)
    try:
        yield
    finally:
        stack[:] = [other for other in stack if other is not active]


def _active_runs() -> list[mlflow.ActiveRun]:
    """Return the list itself of this thread's active runs."""
    runs: list[mlflow.ActiveRun] = fluent._active_run_stack.get()  # type: ignore[no-untyped-call]
    return runs
