"""What the commands do: train a recipe, bring its data, evaluate a run."""

import csv
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sonosco_mlflow import determinism
from sonosco_mlflow.config import Config, flatten
from sonosco_mlflow.console import say
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.decoding.text import TextDecoder
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.evaluation import (
    UtteranceResult,
    learning_curves,
    metrics_table,
    transcripts,
    utterance_results,
    with_intervals,
)
from sonosco_mlflow.experiment import Experiment
from sonosco_mlflow.language_models import search_of
from sonosco_mlflow.metrics import character_error_rate, word_error_rate
from sonosco_mlflow.recipe import build_checkpoints, build_loader, build_loaders, build_trainer, check_recipe
from sonosco_mlflow.serving.logging import load_recognizer
from sonosco_mlflow.serving.recognizer import SpeechRecognizer
from sonosco_mlflow.tracking.changes import lineage_changes, listed
from sonosco_mlflow.tracking.language_model import kept_model_of
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.origin import Origin
from sonosco_mlflow.tracking.pipeline import prepare_data, ready_data
from sonosco_mlflow.tracking.readiness import require_current
from sonosco_mlflow.tracking.restoration import restore_data
from sonosco_mlflow.tracking.resumption import find_unfinished
from sonosco_mlflow.tracking.secrecy import without_secrets
from sonosco_mlflow.tracking.segments import Segment, newest_segment
from sonosco_mlflow.tracking.store import connect, experiment_name, find_run
from sonosco_mlflow.tracking.tags import DATA_DIGEST, REPRODUCED, STATE
from sonosco_mlflow.training.callbacks.interrupt_at import InterruptAt
from sonosco_mlflow.training.callbacks.progress_bar import ProgressBar
from sonosco_mlflow.training.validation import evaluate as evaluate_model


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its id, its final metrics, and what it made of the test utterances."""

    run_id: str
    metrics: dict[str, float]
    results: Sequence[UtteranceResult]


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
        experiment.run.log_parameters({f"model.settings.{key}": value for key, value in settings.items()})
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
    run = find_run(run_id)
    tracked = TrackedRun.find(run)
    recorded = _recipe_of(newest_segment(run))
    config = Config.resolve(recorded.model_dump(mode="json"), overrides or {}, origin=f"run {run_id}")
    if run.data.tags.get(STATE) == "finished" and config.training.epochs == recorded.training.epochs:
        print(f"run {run_id} is finished; there is nothing to do, unless with --set training.epochs=...")
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
    """Bring the data of a recipe up to date, and say so on a run in MLflow."""
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


def evaluate(
    run_id: str,
    project: Path,
    *,
    split: str = "test",
    overrides: Mapping[str, str] | None = None,
    prepare: bool = True,
    results: Path | None = None,
) -> Outcome:
    """Evaluate the model that run ``run_id`` kept, on a run of its own below that one, and print what came of it.

    The numbers are derived again from what MLflow and DVC kept: nothing of the training process is left. Where the
    run already holds them and is decoded as it was, the tag ``sonosco.reproduced`` says whether they are equal to the
    last bit.

    Args:
        run_id: a finished training run.
        project: folder with ``dvc.yaml``.
        split: which split of the run's data to evaluate.
        overrides: keys of the section ``decoding``, to decode in another way than the run did.
        prepare: bring the data up to date first; inside a DVC stage it already is.
        results: folder for what DVC keeps: metrics and hypotheses.

    Raises:
        UserError: there is no such run, it kept no model, or its data is not to be had.
    """
    connect(project)
    with tempfile.TemporaryDirectory() as scratch:
        parent = find_run(run_id)
        name = f"evaluate-{split}-of-{parent.info.run_id[:6]}"
        with TrackedRun.open(experiment_name(parent), "evaluate", name) as run:
            run.make_child_of(parent.info.run_id)
            segment = newest_segment(parent)
            recorded_recipe = _recipe_of(segment)
            config = _decoded_otherwise(recorded_recipe, overrides or {})
            determinism.configure(config.training.threads)
            folder = prepare_data(config, project) if prepare else ready_data(config, project)
            lineage = DataLineage.of_folder(folder, recordings=config.augment.reads_recordings)
            _require_same_data(lineage, parent.info.run_id, parent.data.tags.get(DATA_DIGEST))
            recognizer = load_recognizer(run_id, Path(scratch))
            loader = build_loader(config, folder, split)
            search = search_of(config, loader.tokenizer, project, Path(scratch), segment)
            run.log_parameters(dict(flatten({"decoding": config.decoding.model_dump(mode="json")})))
            language_model = kept_model_of(search)
            if language_model is not None:
                language_model.log(run)
            validation = evaluate_model(
                recognizer.model,
                loader,
                f"{split}_",
                decoder=TextDecoder(loader.tokenizer, search),
                metrics=[word_error_rate, character_error_rate],
            )
            validation = with_intervals(validation, f"{split}_")
            run.log_metrics(validation.metrics, step=0)
            table = utterance_results(validation)
            run.log_table([vars(row) for row in table], f"evaluation/{split}_hypotheses.json")
            run.log_dataset(split, lineage.manifests[split], folder.manifest(split), context=split)
            recorded = {key: value for key, value in parent.data.metrics.items() if key in validation.metrics}
            if recorded and config.decoding == recorded_recipe.decoding:
                equal = all(validation.metrics[key] == value for key, value in recorded.items())
                run.set_tags({REPRODUCED: str(equal).lower()})
            run.describe(f"Evaluation of run `{run_id}` on its {split} split.\n\n{metrics_table(validation.metrics)}")
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        _write_json(results / "metrics.json", validation.metrics)
        with (results / "hypotheses.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(vars(table[0])))
            writer.writeheader()
            writer.writerows(vars(row) for row in table)
    outcome = Outcome(run_id, validation.metrics, table)
    print(report(outcome))
    return outcome


def recognizer_of(
    run_id: str, project: Path, *, overrides: Mapping[str, str] | None = None, n_best: int = 1
) -> SpeechRecognizer:
    """Return the trained model of a run, ready to transcribe.

    Args:
        run_id: a finished training run.
        project: folder that the path of a language model starts from.
        overrides: keys of the section ``decoding``, to decode in another way than the run did.
        n_best: hypotheses that are wanted of each sound; the beam is at least as wide.
    """
    connect(project)
    run = find_run(run_id)
    with tempfile.TemporaryDirectory() as scratch:
        recognizer = load_recognizer(run_id, Path(scratch))
        if overrides or n_best > 1:
            segment = newest_segment(run)
            config = _decoded_otherwise(_recipe_of(segment), {"decoding.beam": str(n_best), **(overrides or {})})
            recognizer.search = search_of(config, recognizer.tokenizer, project, Path(scratch), segment, n_best)
    return recognizer


def run_of(file: Path) -> str:
    """Return the run that a train stage's ``mlflow_run.json`` names.

    Raises:
        UserError: the file is missing or names none.
    """
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: names no run ({error}); `dvc repro train` writes it") from error


def report(outcome: Outcome) -> str:
    """Return what a person wants to read at the end of a run."""
    rates = {name: value for name, value in outcome.metrics.items() if name.endswith("error_rate")}
    lines = [f"  {name:<28} {100 * value:6.2f} %{_interval(outcome.metrics, name)}" for name, value in rates.items()]
    uri = without_secrets(os.environ["MLFLOW_TRACKING_URI"])
    return "\n".join(
        [
            f"\nrun {outcome.run_id}",
            *lines,
            "",
            transcripts(outcome.results, 3),
            "",
            f"see it:  mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else f"see it:  {uri}",
        ]
    )


def _interval(metrics: Mapping[str, float], rate: str) -> str:
    if f"{rate}_lower" not in metrics:
        return ""
    return f"  (95 %: {100 * metrics[f'{rate}_lower']:.2f} to {100 * metrics[f'{rate}_upper']:.2f})"


def _recipe_of(newest: Segment) -> Config:
    """Return the recipe that a training run goes on with.

    Raises:
        UserError: it trains none.
    """
    if not newest.trains_recipe():
        raise UserError(
            f"run {newest.run_id} trains no recipe, but what a program of its own sets up: there "
            f'Experiment.resume("{newest.run_id}") continues it'
        )
    return Config.resolve(newest.settings(), {}, origin=f"run {newest.run_id}")


def _decoded_otherwise(recipe: Config, overrides: Mapping[str, str]) -> Config:
    for key in overrides:
        if not key.startswith("decoding."):
            raise UserError(f"{key}: of a trained model only decoding.* can be set")
    return Config.resolve(recipe.model_dump(mode="json"), overrides, origin="the run's recipe")


def _require_same_data(lineage: DataLineage, run_id: str, expected: str | None) -> None:
    if lineage.digest != expected:
        raise UserError(
            f"the data here is not what run {run_id} used: digest {lineage.digest[:12]}, "
            f"the run's tag {DATA_DIGEST} says {str(expected)[:12]}; data/lineage.json of the run names its parts"
        )


def _write_train_results(results: Path, experiment: Experiment, metrics: dict[str, float]) -> None:
    results.mkdir(parents=True, exist_ok=True)
    _write_json(results / "mlflow_run.json", {"run_id": experiment.run.id})
    _write_json(results / "metrics.json", metrics)
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


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
