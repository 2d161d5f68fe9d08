"""What the commands do: bring a recipe's data, train it, and continue its training."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from sonosco_mlflow import determinism
from sonosco_mlflow.config import Config
from sonosco_mlflow.console import say
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.evaluation import learning_curves, utterance_results
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.language_models import search_of
from sonosco_mlflow.outcome import Outcome, report, write_json
from sonosco_mlflow.recipe import build_checkpoints, build_loaders, build_trainer, check_recipe
from sonosco_mlflow.tracking.changes import lineage_changes, listed
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.origin import Origin
from sonosco_mlflow.tracking.pipeline import prepare_data, ready_data
from sonosco_mlflow.tracking.readiness import require_current, require_recordings
from sonosco_mlflow.tracking.restoration import restore_data
from sonosco_mlflow.tracking.resumption import find_unfinished
from sonosco_mlflow.tracking.secrecy import require_no_secrets
from sonosco_mlflow.tracking.segments import newest_segment
from sonosco_mlflow.tracking.store import connect, find_training
from sonosco_mlflow.tracking.tags import STATE
from sonosco_mlflow.training.callbacks.interrupt_at import InterruptAt
from sonosco_mlflow.training.callbacks.progress_bar import ProgressBar


def train(
    config: Config,
    project: Path,
    *,
    prepare: bool = True,
    results: Path | None = None,
    go_on: bool = False,
    until_step: int | None = None,
) -> Outcome | None:
    """Train a recipe from its data to a finished run in MLflow, and print what came of it.

    Args:
        config: the recipe.
        project: folder with ``dvc.yaml``.
        prepare: bring the data up to date first; inside a DVC stage it already is.
        results: folder for what DVC keeps of a run: its id, its metrics, its learning curves.
        go_on: continue the newest run that would have come to the same end and did not, if there is one: a DVC stage
            that was killed is run again by the same command.
        until_step: stop after this optimizer step, as an interrupt does.

    Returns:
        How it ended; None where a run that is continued was finished already.

    Raises:
        KeyboardInterrupt: stopped by signal; the state is kept and the run can be continued.
    """
    # Mistakes are to be told before minutes go into data.
    settings = check_recipe(config)
    if go_on and (unfinished := _unfinished(config, project)) is not None:
        print(f"continuing run {unfinished}, which did not come to its end")
        return _continue(unfinished, config, project, (), prepare=prepare, results=results, until_step=until_step)
    name = config.tracking.run_name or f"{config.model.name}-{config.model.preset}-{config.data.corpus}"
    with Experiment.create(config, name=name, experiment=config.tracking.experiment, project=project) as experiment:
        experiment.run.log_parameters(
            {"data.corpus": config.data.corpus, **{f"model.settings.{key}": value for key, value in settings.items()}}
        )
        folder = prepare_data(config, project) if prepare else _current_data(config, project)
        return _train(experiment, config, project, folder, results, until_step)


def resume(
    run_id: str,
    project: Path,
    *,
    overrides: Mapping[str, str] | None = None,
    allowed_changes: Iterable[str] = (),
    prepare: bool = True,
    results: Path | None = None,
) -> Outcome | None:
    """Continue a run from what MLflow and DVC kept, in the same run of MLflow, and print what came of it.

    Args:
        run_id: a training run.
        project: folder with ``dvc.yaml`` and the code.
        overrides: keys of the recipe to go on with other values: ``training.epochs``, say.
        allowed_changes: what may differ from what the run began with.
        prepare: bring the run's data by its digests first; inside a DVC stage it is there.
        results: folder for what DVC keeps of a run.

    Returns:
        How it ended; None where the run was finished already and nothing was to be done.

    Raises:
        UserError: there is no such run, it is being trained, or it would not go on as it began.
        KeyboardInterrupt: stopped by signal; the state is kept and the run can be continued.
    """
    connect(project)
    run = find_training(run_id)
    tracked = TrackedRun.find(run)
    recorded = newest_segment(run).recipe()
    config = Config.resolve(recorded.model_dump(mode="json"), overrides or {}, origin=f"run {run_id}")
    if run.data.tags.get(STATE) == "finished" and config.training.epochs == recorded.training.epochs:
        idle = "" if config == recorded else "; what else was set has no effect"
        print(f"run {run_id} is finished; there is nothing to do, unless with --set training.epochs=...{idle}")
        tracked.leave()
        return None
    check_recipe(config)
    return _continue(run_id, config, project, allowed_changes, prepare=prepare, results=results)


def _continue(
    run_id: str,
    config: Config,
    project: Path,
    allowed_changes: Iterable[str],
    *,
    prepare: bool,
    results: Path | None,
    until_step: int | None = None,
) -> Outcome | None:
    with Experiment.resume(run_id, config, allowed_changes=allowed_changes, project=project) as experiment:
        folder = _data_of(experiment, config, project) if prepare else _current_data(config, project)
        return _train(experiment, config, project, folder, results, until_step)


def _train(
    experiment: Experiment,
    config: Config,
    project: Path,
    folder: DataFolder,
    results: Path | None,
    until_step: int | None = None,
) -> Outcome | None:
    if config.augment.reads_recordings:
        require_recordings(folder)
    loaders = build_loaders(config, folder)
    last = None if experiment.resumption is None else experiment.resumption.last
    search = search_of(config, loaders.test.tokenizer, project, experiment.folder, last)
    trainer = build_trainer(config, loaders)
    trainer.attach(ProgressBar())
    if until_step is not None:
        trainer.attach(InterruptAt(until_step))
    trainer.callbacks.append(build_checkpoints(config))
    registered = f"speech-{config.data.corpus}" if config.tracking.registered else None
    lineage = DataLineage.of_folder(folder, recordings=config.augment.reads_recordings)
    experiment.setup_model_trainer(
        trainer, test_loader=loaders.test, lineage=lineage, registered_model=registered, search=search
    )
    continues = experiment.is_open
    if experiment.resumption is not None and continues:
        found = experiment.resumption.condition
        print(f"run {experiment.run.id} was found {found}; it goes on after step {trainer.progress.step}")
    try:
        experiment.start()
    except KeyboardInterrupt:
        say(f"stopped at step {trainer.progress.step}; `sonosco resume {experiment.run.id}` continues it")
        raise
    if not continues:
        return None
    assert trainer.validation is not None
    assert experiment.test is not None
    metrics = {**trainer.validation.metrics, **experiment.test.metrics}
    if results is not None:
        _write_train_results(results, experiment, metrics)
    outcome = Outcome(experiment.run.id, metrics, utterance_results(experiment.test))
    print(report(outcome))
    return outcome


def _unfinished(config: Config, project: Path) -> str | None:
    connect(project)
    determinism.configure(config.training.threads)
    lineage = DataLineage.of_folder(ready_data(config, project), recordings=config.augment.reads_recordings)
    return find_unfinished(config.tracking.experiment, Origin.take(config, project), lineage.digest)


def _current_data(config: Config, project: Path) -> DataFolder:
    """Return the data as it lies there, refused where it is not what it is taken for."""
    folder = ready_data(config, project)
    require_current(folder)
    return folder


def _data_of(experiment: Experiment, config: Config, project: Path) -> DataFolder:
    """Bring the data that the run used, by its digests; where a change of it is allowed, that of the recipe."""
    assert experiment.resumption is not None
    resumption = experiment.resumption
    expected = resumption.digests.get("data")
    if expected is None or "data" in resumption.allowed:
        return prepare_data(config, project)
    last = resumption.last
    lock = last.data_lock()

    def explain(made: DataLineage) -> str:
        return listed(lineage_changes((last.lineage(), lock), (made.to_json(), made.lock), project))

    return restore_data(config, project, lock, expected, explain)


def bring_data(config: Config, project: Path) -> DataLineage:
    """Bring the data of a recipe up to date, and say so on a run in MLflow.

    Raises:
        UserError: the recipe holds credentials; no run is opened.
    """
    require_no_secrets(config.model_dump(mode="json"))
    connect(project)
    with TrackedRun.open(config.tracking.experiment, "data", f"data-{config.data.corpus}") as run:
        lineage = DataLineage.of_folder(prepare_data(config, project), recordings=config.augment.reads_recordings)
        run.set_tags(lineage.tags())
        run.log_text(config.to_yaml(), "config/params.yaml")
        lineage.log(run)
        run.describe(f"Data of the recipe `{config.data.corpus}`.\n\n{lineage.to_markdown()}")
        training = run.newest_training_on(lineage.digest)
        if training is not None:
            run.make_child_of(training)
    return lineage


def _write_train_results(results: Path, experiment: Experiment, metrics: dict[str, float]) -> None:
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "mlflow_run.json", {"run_id": experiment.run.id})
    write_json(results / "metrics.json", metrics)
    curves = {name: experiment.history.curve(name) for name in experiment.history.names()}
    for file_name, prefixes in (
        ("steps.csv", ("train_loss", "gradient_norm", "learning_rate")),
        ("validations.csv", ("val_",)),
    ):
        # A layer's gradient norm (gradient_norm/<layer>) is not recorded at every step.
        chosen = {name: curve for name, curve in curves.items() if name.startswith(prefixes) and "/" not in name}
        with (results / file_name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *chosen])
            steps = next(iter(chosen.values()))[0]
            writer.writerows(zip(steps, *(values for _, values in chosen.values()), strict=True))
    (results / "learning_curves.png").write_bytes(learning_curves(curves))
