"""What a run is, for a reader: the same text in the UI and in the terminal."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import mlflow
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import position_of
from sonosco_mlflow.tracking.journal import RESERVED
from sonosco_mlflow.tracking.lease import VANISHED, condition
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.mlflow_run import PARAMETER_PREFIX
from sonosco_mlflow.tracking.segments import newest_segment
from sonosco_mlflow.tracking.store import search_runs
from sonosco_mlflow.tracking.tags import (
    ALLOWED_CHANGES,
    CHECKPOINT,
    COMMIT,
    DIRTY,
    ERROR,
    HEARTBEAT,
    HOST,
    KIND,
    MODEL_VERSION,
    REPRODUCED,
    REPRODUCED_BY,
    REPRODUCES,
    SEGMENTS,
    WEIGHTS_DIGEST,
    number_of,
)
from sonosco_mlflow.training.callbacks.base import is_timing

TELLING = ("model.name", "model.preset", "data.corpus", "training.epochs", "training.seed", "optimizer.lr")


@dataclass(frozen=True)
class RunLine:
    """A run in a list of runs.

    Attributes:
        run_id: its id.
        name: how the UI calls it.
        state: what it is in truth.
        begun: when.
        step: optimizer step of its newest checkpoint in MLflow, or None before the first.
        metrics: its last ones.
    """

    run_id: str
    name: str
    state: str
    begun: datetime
    step: int | None
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, run: Run) -> "RunLine":
        """Return the line of ``run``."""
        position = position_of(run.data.tags.get(CHECKPOINT, "").rpartition("/")[2])
        return cls(
            run_id=run.info.run_id,
            name=run.data.tags.get(MLFLOW_RUN_NAME, ""),
            state=condition(run),
            begun=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
            step=None if position is None else position[0],
            metrics=run.data.metrics,
        )


def describe_run(run: Run) -> str:
    """Return what a training run is, on what, how it went and how to go on with it, as Markdown."""
    line = RunLine.of(run)
    error = run.data.tags.get(ERROR, "")
    parts = [
        _headline(run, line),
        f"Error: {error}\n" if error else "",
        _facts(run),
        _results(run),
        _data(run),
        _commands(run, line.state),
    ]
    return "\n".join(part for part in parts if part)


def list_trainings() -> list[RunLine]:
    """Return the trainings of all experiments, the newest first."""
    experiments = [experiment.experiment_id for experiment in mlflow.MlflowClient().search_experiments()]
    newest_first = ["attributes.start_time DESC"]
    return [RunLine.of(run) for run in search_runs(experiments, f"tags.`{KIND}` = 'train'", newest_first)]


def _headline(run: Run, line: RunLine) -> str:
    tags = run.data.tags
    lines = [f"**{line.name or line.run_id}** is {line.state}, begun {line.begun:%Y-%m-%d %H:%M} UTC"]
    if run.info.end_time and line.state not in ("running", VANISHED):
        lines.append(f"took {timedelta(seconds=(run.info.end_time - run.info.start_time) // 1000)}")
    if line.step is not None:
        lines.append(f"kept up to step {line.step}")
    segments = number_of(run, SEGMENTS, 1)
    if segments > 1:
        changes = f" (changed: {tags[ALLOWED_CHANGES]})" if ALLOWED_CHANGES in tags else ""
        lines.append(f"in {segments} segments{changes}")
    text = ", ".join(lines) + ".\n"
    if line.state == VANISHED:
        text += f"\nIts process on {tags.get(HOST)} showed life last at {tags.get(HEARTBEAT)}.\n"
    return text


def _facts(run: Run) -> str:
    tags = run.data.tags
    settings = {key: run.data.params.get(PARAMETER_PREFIX + key) for key in TELLING}
    known = {key: value for key, value in settings.items() if value is not None}
    if not known:
        known = {
            key.removeprefix(PARAMETER_PREFIX): value
            for key, value in run.data.params.items()
            if key.startswith(PARAMETER_PREFIX)
        }
    rows = [f"- recipe: {', '.join(f'{key} {value}' for key, value in known.items())}"] if known else []
    uncommitted = " with uncommitted changes" if tags.get(DIRTY) == "true" else ""
    rows += [f"- code: commit {tags[COMMIT][:12]}{uncommitted}"] if COMMIT in tags else []
    rows += [f"- weights: sha256 {tags[WEIGHTS_DIGEST][:16]}..."] if WEIGHTS_DIGEST in tags else []
    rows += [f"- model: {tags[MODEL_VERSION]} of the registry"] if MODEL_VERSION in tags else []
    rows += [f"- makes run `{tags[REPRODUCES]}` again: {_verdict(tags.get(REPRODUCED))}"] if REPRODUCES in tags else []
    rows += [f"- made again by run `{tags[REPRODUCED_BY]}`"] if REPRODUCED_BY in tags else []
    parent = tags.get(MLFLOW_PARENT_RUN_ID)
    rows += [f"- below run `{parent}`"] if parent and parent != tags.get(REPRODUCES) else []
    return "".join(f"{row}\n" for row in rows)


def _verdict(reproduced: str | None) -> str:
    return {None: "not compared yet", "true": "bit-identical"}.get(reproduced, "not the same")


def _results(run: Run) -> str:
    metrics = {
        name: value
        for name, value in sorted(run.data.metrics.items())
        if name.startswith(("val_", "test_")) and not name.startswith(RESERVED) and not is_timing(name)
    }
    if not metrics:
        return ""
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    return f"| metric, last | value |\n|---|---|\n{rows}"


def _trains_recipe(run: Run) -> bool:
    try:
        return newest_segment(run).trains_recipe()
    except UserError:
        # It was killed before it told how it was started.
        return True


def _data(run: Run) -> str:
    try:
        return DataLineage.read(newest_segment(run).lineage()).to_markdown()
    except UserError:
        # It was killed before it knew its data.
        return ""


def _commands(run: Run, state: str) -> str:
    if run.data.tags.get(KIND) != "train":
        return ""
    run_id = run.info.run_id
    reproduce = f"sonosco reproduce {run_id}    # train it again, and compare every bit"
    resume = f'Experiment.resume("{run_id}")    # in the program that began it'
    match state == "finished", _trains_recipe(run):
        case True, True:
            commands = [
                reproduce,
                f"sonosco evaluate {run_id}     # derive its test numbers again",
                f"sonosco resume {run_id} --set training.epochs=...    # more epochs",
            ]
        case True, False:
            commands = [reproduce, f"{resume}, with more epochs"]
        case False, True:
            commands = [f"sonosco resume {run_id}    # should it not be running any more"]
        case _:
            commands = [f"{resume}, should it not be running any more"]
    return "".join(f"    {command}\n" for command in commands)
