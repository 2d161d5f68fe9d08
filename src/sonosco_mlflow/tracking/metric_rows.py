"""What the tracking store holds of a run's metrics."""

import mlflow

from sonosco_mlflow.tracking.journal import RESERVED, Recorded, Records


def metric_records(run_id: str) -> Records:
    """Return every metric that the store holds of a run, by name and step; MLflow's own of the machine aside."""
    return {key: rows[-1] for key, rows in metric_rows(run_id).items()}


def metric_rows(run_id: str) -> dict[tuple[str, int], list[Recorded]]:
    """Return the same with every row: a metric has one a step, unless another was written past the journal."""
    client = mlflow.MlflowClient()
    found: dict[tuple[str, int], list[Recorded]] = {}
    for name in client.get_run(run_id).data.metrics:
        if not name.startswith(RESERVED):
            for item in client.get_metric_history(run_id, name):
                found.setdefault((name, item.step), []).append(Recorded(item.value, item.timestamp))
    return found
