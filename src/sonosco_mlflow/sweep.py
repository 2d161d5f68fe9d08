"""A sweep: many trainings of one recipe with keys of it varied, as child runs of one run in MLflow.

Each training is a process and a run of its own, which `resume` continues and `reproduce` makes again like any other.
Optuna draws the values and keeps the trials in ``sweeps.db``; a sweep that was killed and is begun again continues what
was cut off and begins what is missing.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState

from sonosco_mlflow.config import Config
from sonosco_mlflow.console import say
from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.recipe import check_recipe
from sonosco_mlflow.search_space import Space, as_text, check_space, combination, draw, grid_size
from sonosco_mlflow.tracking.lease import Lease, condition
from sonosco_mlflow.tracking.mlflow_run import TrackedRun, trial_run
from sonosco_mlflow.tracking.store import connect, find_run
from sonosco_mlflow.tracking.tags import CODE_DIGEST, HOST

STORAGE = "sweeps.db"
OBJECTIVE = "val_word_error_rate"
# Of a study, beside what Optuna keeps: its run, and what it must not change while it goes on.
_PARENT, _PROMISE = "run_id", "promise"
_SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class TrialResult:
    """A training of a sweep.

    Attributes:
        number: of the trial.
        settings: the keys that are varied, and their values.
        run_id: its run.
        state: what that run is in truth.
        value: the objective, or None where it did not come to its end.
    """

    number: int
    settings: dict[str, object]
    run_id: str
    state: str
    value: float | None


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended: its run, what it minimised, and its trainings, the best first."""

    run_id: str
    objective: str
    trials: list[TrialResult]

    def to_markdown(self) -> str:
        """Return the trainings as a table."""
        keys = list(self.trials[0].settings) if self.trials else []
        rows = [
            [
                *(as_text(trial.settings[key]) for key in keys),
                "" if trial.value is None else f"{trial.value:.6g}",
                trial.state,
                f"`{trial.run_id}`",
            ]
            for trial in self.trials
        ]
        table = [[*keys, self.objective, "state", "run"], ["---"] * (len(keys) + 3), *rows]
        return "".join(f"| {' | '.join(row)} |\n" for row in table)


def sweep(
    config: Config,
    space: Space,
    project: Path,
    *,
    name: str,
    trials: int | None = None,
    objective: str = OBJECTIVE,
    seed: int = 0,
) -> SweepResult:
    """Train a recipe with keys of it varied, and return what came of it.

    Args:
        config: the recipe.
        space: the keys that are varied.
        project: folder with ``dvc.yaml``.
        name: of the sweep; under a known one that sweep goes on.
        trials: how many are drawn at random; None trains the whole grid of choices.
        objective: the metric whose last value is to be low.
        seed: of the random draws; trial *n* is the same whatever became of those before it.

    Raises:
        UserError: the recipe refuses a value, or the sweep of that name varies something else.
        KeyboardInterrupt: stopped; the training that ran has kept its state.
    """
    check_recipe(config)
    check_space(space, config)
    total = grid_size(space) if trials is None else trials
    connect(project)
    study = _open_study(config, space, project, name, random=trials is not None, objective=objective, seed=seed)
    with _parent(study, config, name) as parent:
        recipe = project / "runs" / f"sweep-{name}-{parent.id[:6]}" / "params.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(config.to_yaml(), encoding="utf-8")
        parent.log_text(config.to_yaml(), "config/params.yaml")
        tried: set[int] = set()
        while (trial := _next(study, space, total, tried, None if trials is None else seed)) is not None:
            tried.add(trial.number)
            run_id = trial_run(parent, trial.number).info.run_id
            _train(run_id, trial.params, recipe, project)
            _conclude(study, trial.number, run_id, objective)
            parent.describe(_result(study, parent, objective).to_markdown())
        result = _result(study, parent, objective)
        values = [found.value for found in result.trials if found.value is not None]
        if values:
            parent.log_metrics({f"best_{objective}": min(values)}, step=len(values))
    return result


def _open_study(
    config: Config, space: Space, project: Path, name: str, *, random: bool, objective: str, seed: int
) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{(project / STORAGE).resolve()}")
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, direction="minimize")
    promise = {
        "recipe": config.digest,
        "space": {key: json.loads(distribution_to_json(distribution)) for key, distribution in space.items()},
        "draws": f"random, seed {seed}" if random else "grid",
        "objective": objective,
    }
    known = study.user_attrs.get(_PROMISE)
    differing = [] if known is None else [part for part in promise if known[part] != promise[part]]
    if differing:
        raise UserError(
            f"the sweep '{name}' was begun with another {' and '.join(differing)}; give it back, or take another --name"
        )
    study.set_user_attr(_PROMISE, promise)
    return study


@contextmanager
def _parent(study: optuna.Study, config: Config, name: str) -> Iterator[TrackedRun]:
    """Open the run that the trainings are below: a new one, or that of the sweep that goes on."""
    known = study.user_attrs.get(_PARENT)
    # No two processes work on one sweep.
    lease = None if known is None else Lease.take(known)
    try:
        with TrackedRun.open(config.tracking.experiment, "sweep", f"sweep-{name}", run_id=known) as run:
            lease = lease or Lease.take(run.id)
            lease.start()
            study.set_user_attr(_PARENT, run.id)
            yield run
    finally:
        if lease is not None:
            lease.release()


def _next(
    study: optuna.Study, space: Space, total: int, tried: set[int], seed: int | None
) -> optuna.trial.BaseTrial | None:
    """Return a trial that an earlier process left unfinished, else a new one, or None where all are there."""
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING and trial.number not in tried:
            return trial
    if not any(trial.state == TrialState.WAITING for trial in trials):
        if len(trials) >= total:
            return None
        number = len(trials)
        study.enqueue_trial(combination(space, number) if seed is None else draw(space, number, seed))
    return study.ask(dict(space))


def _train(run_id: str, settings: Mapping[str, object], recipe: Path, project: Path) -> None:
    """Train one run to its end, from its beginning or from where it is."""
    run = find_run(run_id)
    if condition(run) == "running" and HOST in run.data.tags:
        say(f"run {run_id} is still being trained, by a process of the sweep before; waiting for it")
        while condition(run) == "running":
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            run = find_run(run_id)
    if condition(run) == "finished":
        return
    arguments = ["resume", run_id]
    # Whatever a run was killed in before it had told where it comes from, it begins anew.
    if CODE_DIGEST not in run.data.tags:
        arguments = ["train", "--params", str(recipe.resolve())]
        arguments += [f"--set={key}={as_text(value)}" for key, value in settings.items()]
    command = [sys.executable, "-P", "-m", "sonosco_mlflow", *arguments]
    variables = {**os.environ, "MLFLOW_RUN_ID": run_id} if arguments[0] == "train" else None
    print(f"\nsonosco {' '.join(arguments)}", flush=True)
    # In a session of its own: of an interrupt from the keyboard it hears from here, and once.
    process = subprocess.Popen(command, cwd=project, env=variables, start_new_session=True)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise


def _conclude(study: optuna.Study, number: int, run_id: str, objective: str) -> None:
    """Tell the study what a training gave; one that failed stays to be tried again by the next process."""
    run = find_run(run_id)
    if condition(run) != "finished":
        say(f"run {run_id} is {condition(run)}; the sweep tries it again when it is begun again")
        return
    if objective not in run.data.metrics:
        raise UserError(f"run {run_id} has no metric '{objective}' to minimise; {nearest(objective, run.data.metrics)}")
    value = run.data.metrics[objective]
    # Optuna takes no NaN for a result.
    study.tell(number, math.inf if math.isnan(value) else value)


def _result(study: optuna.Study, parent: TrackedRun, objective: str) -> SweepResult:
    found = []
    for trial in study.get_trials(deepcopy=False):
        run = trial_run(parent, trial.number)
        found.append(TrialResult(trial.number, trial.params, run.info.run_id, condition(run), trial.value))
    found.sort(key=lambda result: (math.inf if result.value is None else result.value, result.number))
    return SweepResult(parent.id, objective, found)
