"""What the commands do with a run that has been trained: evaluate its model, and transcribe by it."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from sonosco_mlflow import determinism
from sonosco_mlflow.config import Config
from sonosco_mlflow.console import say
from sonosco_mlflow.data.corpora.splits import SPLITS
from sonosco_mlflow.decoding.text import TextDecoder
from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.evaluation import metrics_table, utterance_results, with_intervals
from sonosco_mlflow.language_models import search_of
from sonosco_mlflow.metrics import character_error_rate, word_error_rate
from sonosco_mlflow.outcome import Outcome, report, write_json
from sonosco_mlflow.recipe import build_loader, require_device
from sonosco_mlflow.serving.logging import load_recognizer
from sonosco_mlflow.serving.recognizer import SpeechRecognizer
from sonosco_mlflow.settings import flatten
from sonosco_mlflow.tracking.journal import storable
from sonosco_mlflow.tracking.language_model import kept_model_of
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.mlflow_run import TrackedRun
from sonosco_mlflow.tracking.pipeline import prepare_data, ready_data
from sonosco_mlflow.tracking.segments import newest_segment
from sonosco_mlflow.tracking.store import connect, experiment_name, find_training
from sonosco_mlflow.tracking.tags import DATA_DIGEST, REPRODUCED
from sonosco_mlflow.training.validation import evaluate as evaluate_model


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
    run already holds them, is decoded as it was, and has a device of its kind here, the tag ``sonosco.reproduced`` says
    whether they are equal to the last bit.

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
    if split not in SPLITS:
        raise UserError(f"--split: found '{split}', {nearest(split, SPLITS)}")
    parent = find_training(run_id)
    # The name `train_loss` is that of a training's steps.
    prefix = "train_split_" if split == "train" else f"{split}_"
    with TemporaryDirectory() as scratch:
        recognizer = load_recognizer(parent, Path(scratch))
        name = f"evaluate-{split}-of-{parent.info.run_id[:6]}"
        with TrackedRun.open(experiment_name(parent), "evaluate", name) as run:
            run.make_child_of(parent.info.run_id)
            segment = newest_segment(parent)
            recorded_recipe = segment.recipe()
            config = _decoded_otherwise(recorded_recipe, overrides or {})
            determinism.configure(config.training.threads)
            folder = prepare_data(config, project) if prepare else ready_data(config, project)
            lineage = DataLineage.of_folder(folder, recordings=config.augment.reads_recordings)
            _require_same_data(lineage, parent.info.run_id, parent.data.tags.get(DATA_DIGEST))
            is_at_home = _move_to(recognizer, config.training.device)
            loader = build_loader(config, folder, split)
            search = search_of(config, loader.tokenizer, project, Path(scratch), segment)
            run.log_parameters(dict(flatten({"decoding": config.decoding.model_dump(mode="json")})))
            language_model = kept_model_of(search)
            if language_model is not None:
                language_model.log(run)
            validation = evaluate_model(
                recognizer.model,
                loader,
                prefix,
                decoder=TextDecoder(loader.tokenizer, search),
                metrics=[word_error_rate, character_error_rate],
            )
            validation = with_intervals(validation, prefix)
            run.log_metrics(validation.metrics, step=0)
            table = utterance_results(validation)
            run.log_table([vars(row) for row in table], f"evaluation/{split}_hypotheses.json")
            run.log_dataset(split, lineage.manifests[split], folder.manifest(split), context=split)
            recorded = {key: value for key, value in parent.data.metrics.items() if key in validation.metrics}
            if is_at_home and recorded and config.decoding == recorded_recipe.decoding:
                equal = all(repr(storable(validation.metrics[key])) == repr(value) for key, value in recorded.items())
                run.set_tags({REPRODUCED: str(equal).lower()})
            run.describe(f"Evaluation of run `{run_id}` on its {split} split.\n\n{metrics_table(validation.metrics)}")
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / "metrics.json", validation.metrics)
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
    run = find_training(run_id)
    with TemporaryDirectory() as scratch:
        recognizer = load_recognizer(run, Path(scratch))
        if overrides or n_best > 1:
            segment = newest_segment(run)
            recorded = segment.recipe()
            beam = max(recorded.decoding.beam, n_best)
            config = _decoded_otherwise(recorded, {"decoding.beam": str(beam), **(overrides or {})})
            recognizer.search = search_of(config, recognizer.tokenizer, project, Path(scratch), segment, n_best)
    return recognizer


def _move_to(recognizer: SpeechRecognizer, device: str) -> bool:
    """Have ``recognizer`` compute where its run did, and return whether that can be had; else it stays on the CPU."""
    try:
        require_device(device)
    except UserError as error:
        say(f"evaluated on the CPU, whose last bits are others: {error}")
        return False
    recognizer.model.to(device)
    return True


def run_of(file: Path) -> str:
    """Return the run that a train stage's ``mlflow_run.json`` names.

    Raises:
        UserError: the file is missing or names none.
    """
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: names no run ({error}); `dvc repro train` writes it") from error


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
