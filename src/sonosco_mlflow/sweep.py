"""A sweep: many trainings of one recipe with keys of it varied, as child runs of one run in MLflow.

Each training is a process and a run of its own, which `resume` continues and `reproduce` makes again like any other.
Optuna draws the values and keeps the trials in ``sweeps.db``; a sweep that was killed and is begun again continues what
was cut off and begins what is missing.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState

from sonosco_mlflow.config import Config
from sonosco_mlflow.console import say
from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.processes import run_interruptibly
from sonosco_mlflow.recipe import check_recipe
from sonosco_mlflow.search_space import Space, as_text, check_space, combination, draw, grid_size
from sonosco_mlflow.tracking.child_runs import find_trial, is_deleted, trial_run
from sonosco_mlflow.tracking.file_lock import locked
from sonosco_mlflow.tracking.lease import Lease, condition
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.names import folder_name
from sonosco_mlflow.tracking.store import connect, find_run
from sonosco_mlflow.tracking.tags import CODE_DIGEST, HOST

STORAGE = "sweeps.db"
OBJECTIVE = "val_word_error_rate"
_RATES = ("loss", "word_error_rate", "character_error_rate")
OBJECTIVES = ("train_loss", *(f"{split}_{name}" for split in ("val", "test") for name in _RATES))
# Of a study, beside what Optuna keeps: its run, and what it must not change while it goes on.
_PARENT, _PROMISE = "run_id", "promise"
_SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class _Plan:
    """What a sweep tries: the whole grid, or ``trials`` that are drawn at random with a seed."""

    space: Space
    objective: str
    trials: int | None
    seed: int

    @property
    def total(self) -> int:
        return grid_size(self.space) if self.trials is None else self.trials

    def settings(self, number: int) -> dict[str, Any]:
        """Return what a trial varies: by its number, since Optuna may have been killed in the middle of noting it."""
        return combination(self.space, number) if self.trials is None else draw(self.space, number, self.seed)

    def promise(self, recipe: Config) -> dict[str, object]:
        """Return what a sweep must not change while it goes on; of random draws more may be asked for."""
        return {
            "recipe": recipe.digest,
            "space": {key: json.loads(distribution_to_json(varied)) for key, varied in self.space.items()},
            "draws": "grid" if self.trials is None else f"random, seed {self.seed}",
            "objective": self.objective,
        }


@dataclass(frozen=True)
class TrialResult:
    """A training of a sweep.

    Attributes:
        number: of the trial.
        settings: the keys that are varied, and their values.
        run_id: its run.
        state: what that run is in truth; ``deleted`` where somebody has deleted it since.
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
    if objective not in OBJECTIVES:
        raise UserError(f"--objective {objective}: no recipe's training has it; {nearest(objective, OBJECTIVES)}")
    plan = _Plan(space, objective, trials, seed)
    total = plan.total
    connect(project)
    with ExitStack() as stack:
        # Two that begin a sweep of one name at once are to have one run.
        with locked(project / ".sonosco" / "sweeps.lock"):
            study = _open_study(plan, config, project, name)
            # By the order of the keys trials have their numbers: it is that of the beginning, however they come now.
            plan = replace(plan, space={key: space[key] for key in study.user_attrs[_PROMISE]["space"]})
            parent = stack.enter_context(_parent(study, config, name))
        recipe = project / "runs" / folder_name(f"sweep-{name}", parent.id) / "params.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(config.to_yaml(), encoding="utf-8")
        parent.log_text(config.to_yaml(), "config/params.yaml")
        tried: set[int] = set()
        while (trial := _next(study, plan, total, tried)) is not None:
            tried.add(trial.number)
            run_id = trial_run(parent, trial.number).info.run_id
            _train(run_id, plan.settings(trial.number), recipe, project)
            _conclude(study, trial.number, run_id, objective)
            parent.describe(_result(study, plan, parent).to_markdown())
        result = _result(study, plan, parent)
        values = [found.value for found in result.trials if found.value is not None]
        if values:
            parent.log_metrics({f"best_{objective}": min(values)}, step=len(values))
    return result


def _open_study(plan: _Plan, recipe: Config, project: Path, name: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{(project / STORAGE).resolve()}")
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, direction="minimize")
    promise = plan.promise(recipe)
    known = study.user_attrs.get(_PROMISE)
    differing = [] if known is None else [part for part in promise if known[part] != promise[part]]
    if differing:
        raise UserError(
            f"the sweep '{name}' was begun with another {' and '.join(differing)}; give it back, or take another --name"
        )
    if known is None:
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


def _next(study: optuna.Study, plan: _Plan, total: int, tried: set[int]) -> optuna.trial.BaseTrial | None:
    """Return a trial that an earlier process left unfinished, else a new one, or None where all are there."""
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING and trial.number not in tried:
            return trial
    if not any(trial.state == TrialState.WAITING for trial in trials):
        if len(trials) >= total:
            return None
        study.enqueue_trial(plan.settings(len(trials)))
    return study.ask(dict(plan.space))


def _train(run_id: str, settings: Mapping[str, object], recipe: Path, project: Path) -> None:
    """Train one run to its end, from its beginning or from where it is."""
    run = find_run(run_id)
    if _is_trained(run_id):
        say(f"run {run_id} is still being trained, by a process of the sweep before; waiting for it")
        while _is_trained(run_id):
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
    run_interruptibly(command, project, variables)


def _is_trained(run_id: str) -> bool:
    """Return whether a process that outlived an earlier sweep trains a run, or is about to."""
    run = find_run(run_id)
    if HOST in run.data.tags:
        return condition(run) == "running"
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("MLFLOW_RUN_ID") == run_id and process.pid != os.getpid():
                return True
    return False


def _conclude(study: optuna.Study, number: int, run_id: str, objective: str) -> None:
    """Tell the study what a training gave; one that failed stays to be tried again by the next process."""
    run = find_run(run_id)
    if condition(run) != "finished":
        say(f"run {run_id} is {condition(run)}; the sweep tries it again when it is begun again")
        return
    value = run.data.metrics.get(objective, math.nan)
    # Optuna takes no NaN for a result.
    study.tell(number, math.inf if math.isnan(value) else value)


def _result(study: optuna.Study, plan: _Plan, parent: TrackedRun) -> SweepResult:
    found = []
    for trial in study.get_trials(deepcopy=False):
        # What it gave is in the study, also where its run was deleted in the UI.
        run = find_trial(parent, trial.number, deleted_too=True)
        if run is not None:
            state = "deleted" if is_deleted(run) else condition(run)
            settings = plan.settings(trial.number)
            found.append(TrialResult(trial.number, settings, run.info.run_id, state, trial.value))
    found.sort(key=lambda result: (math.inf if result.value is None else result.value, result.number))
    return SweepResult(parent.id, plan.objective, found)
