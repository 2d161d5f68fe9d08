"""The verbs that make data: each a stage of the pipeline, and all of them together."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sonosco_mlflow.cli.app import PARAMS, RECIPE_KEYS, Params, Prepare, Set, app, read_recipe
from sonosco_mlflow.config import LanguageModelUnit


@app.command(context_settings=RECIPE_KEYS)
def corpus(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="The corpus (docs/corpora.md); the recipe's by default.")] = None,
    source: Annotated[str | None, typer.Option(help="Archive, folder or address of the corpus.")] = None,
    into: Annotated[Path, typer.Option(help="The data folder.")] = Path("data"),
    settings: Set = None,
    params: Params = PARAMS,
) -> None:
    """Bring a corpus: its audio, and a list of utterances a split."""
    from sonosco_mlflow.console import stage_progress
    from sonosco_mlflow.data.stages import DataFolder, make_corpus
    from sonosco_mlflow.tracking.pipeline import require_watched

    chosen = {key: value for key, value in {"data.corpus": name, "data.source": source}.items() if value is not None}
    config = read_recipe(context, settings, params, chosen)
    # By hand, nobody relies on being told when it is to be made again.
    if "DVC_STAGE" in os.environ:
        require_watched(config, Path())
    with stage_progress() as progress:
        make_corpus(config, DataFolder(into), progress)


@app.command(context_settings=RECIPE_KEYS)
def manifests(
    context: typer.Context,
    into: Annotated[Path, typer.Option(help="The data folder.")] = Path("data"),
    settings: Set = None,
    params: Params = PARAMS,
) -> None:
    """Write the manifests and the vocabulary of the corpus."""
    from sonosco_mlflow.data.stages import DataFolder, make_manifests

    make_manifests(read_recipe(context, settings, params), DataFolder(into))


@app.command(context_settings=RECIPE_KEYS)
def features(
    context: typer.Context,
    into: Annotated[Path, typer.Option(help="The data folder.")] = Path("data"),
    settings: Set = None,
    params: Params = PARAMS,
) -> None:
    """Extract the features of every split."""
    from sonosco_mlflow.console import stage_progress
    from sonosco_mlflow.data.stages import DataFolder, make_features

    config = read_recipe(context, settings, params)
    with stage_progress() as progress:
        make_features(config, DataFolder(into), progress)


@app.command("language-model", context_settings=RECIPE_KEYS)
def language_model(
    context: typer.Context,
    order: Annotated[int, typer.Option(min=1, help="Tokens or words of the longest n-grams.")] = 6,
    unit: Annotated[
        LanguageModelUnit, typer.Option(help="Of the vocabulary's tokens, or of words (CTC only).")
    ] = "tokens",
    into: Annotated[Path, typer.Option(help="The ARPA file.")] = Path("data/language_model.arpa"),
    settings: Set = None,
    prepare: Prepare = True,
    params: Params = PARAMS,
) -> None:
    """Train an n-gram on the recipe's training transcripts, for --set decoding.language_model=FILE."""
    from sonosco_mlflow.language_models import train_language_model
    from sonosco_mlflow.tracking.pipeline import prepare_data, ready_data

    config = read_recipe(context, settings, params)
    folder = (prepare_data if prepare else ready_data)(config, Path())
    ngrams = train_language_model(folder, unit, order, into)
    typer.echo(f"{into}: {', '.join(str(len(found.words)) for found in ngrams.orders)} n-grams of 1 to {order} {unit}")


@app.command(context_settings=RECIPE_KEYS)
def data(context: typer.Context, settings: Set = None, params: Params = PARAMS) -> None:
    """Bring the recipe's data up to date with DVC, and record it in MLflow."""
    from sonosco_mlflow.runs import bring_data

    lineage = bring_data(read_recipe(context, settings, params), Path())
    typer.echo(lineage.to_markdown())
