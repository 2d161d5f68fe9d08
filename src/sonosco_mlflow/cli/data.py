"""The verbs that make data: each a stage of the pipeline, and all of them together."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from sonosco_mlflow.cli.app import PARAMS, RECIPE_KEYS, Params, Prepare, Set, app, read_recipe, refuse_option
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.manifest_tools.findings import Finding
from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.sections import LanguageModelUnit

Name = Annotated[
    str | None,
    typer.Argument(help="One corpus of the recipe (data.corpora); all of them by default.", callback=refuse_option),
]
Into = Annotated[Path, typer.Option(help="The data folder.")]
DATA = Path("data")


@app.command(context_settings=RECIPE_KEYS)
def corpus(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            help="A corpus of the recipe, or a kind of corpus (docs/corpora.md) in its place.", callback=refuse_option
        ),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Archive, folder or address of the corpus.")] = None,
    into: Into = DATA,
    settings: Set = None,
    params: Params = PARAMS,
) -> None:
    """Bring each corpus of the recipe, or one: its audio, and a list of utterances a split."""
    from sonosco_mlflow.console import say
    from sonosco_mlflow.data.stages import DataFolder, make_corpus
    from sonosco_mlflow.tracking.pipeline import require_watched

    own = name in Config.load(params).data.corpora
    place = f"data.corpora.{name}.source" if own else "data.source"
    given = {"data.corpus": None if own else name, place: source}
    config = read_recipe(context, settings, params, {key: text for key, text in given.items() if text is not None})
    for chosen in _corpora(config, name):
        # By hand, nobody relies on being told when it is to be made again.
        if _inside_dvc():
            require_watched(config, chosen, Path())
        with _stage(f"corpus@{chosen}") as progress:
            unusable = make_corpus(config, chosen, DataFolder(into), progress)
        if unusable:
            say(
                f"corpus {chosen}: {len(unusable)} utterances are of no use ({_checks(unusable)}); "
                f"{DataFolder(into).corpus(chosen)}/*.unusable.jsonl names them"
            )


@app.command(context_settings=RECIPE_KEYS)
def manifests(
    context: typer.Context, name: Name = None, into: Into = DATA, settings: Set = None, params: Params = PARAMS
) -> None:
    """Write the manifests of each corpus, without what the recipe skips (data.skip)."""
    from sonosco_mlflow.console import say
    from sonosco_mlflow.data.stages import DataFolder, make_manifests

    config, folder = read_recipe(context, settings, params), DataFolder(into)
    for chosen in _corpora(config, name):
        with _stage(f"manifests@{chosen}") as progress:
            skipped = make_manifests(config, chosen, folder, progress)
        if skipped:
            rows = len({(finding.manifest, finding.line) for finding in skipped})
            why, where = _checks(skipped), folder.skipped(chosen)
            say(f"corpus {chosen}: {rows} utterances are left out ({why}); {where} names them")


@app.command(context_settings=RECIPE_KEYS)
def features(
    context: typer.Context, name: Name = None, into: Into = DATA, settings: Set = None, params: Params = PARAMS
) -> None:
    """Extract the features of every split of each corpus."""
    from sonosco_mlflow.data.stages import DataFolder, make_features

    config = read_recipe(context, settings, params)
    for chosen in _corpora(config, name):
        with _stage(f"features@{chosen}") as progress:
            make_features(config, chosen, DataFolder(into), progress)


@app.command(context_settings=RECIPE_KEYS)
def dataset(context: typer.Context, into: Into = DATA, settings: Set = None, params: Params = PARAMS) -> None:
    """Put the corpora together: their manifests as one, the vocabulary, the statistics of the features."""
    from sonosco_mlflow.data.stages import DataFolder, make_dataset
    from sonosco_mlflow.tracking.data_lock import remove_former

    config = read_recipe(context, settings, params)
    with _stage("dataset"):
        if _inside_dvc():
            remove_former(config, Path())
        make_dataset(config, DataFolder(into))


def _inside_dvc() -> bool:
    return "DVC_STAGE" in os.environ


@contextmanager
def _stage(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of a stage; inside DVC, end with it, and wait for what an earlier one has left behind."""
    from sonosco_mlflow.console import say, stage_progress
    from sonosco_mlflow.tracking.file_lock import stage_of_dvc

    def waits() -> None:
        say(f"{name}: another process is at it; waiting until it has ended")

    with stage_of_dvc(name, Path(), waits) if _inside_dvc() else nullcontext(), stage_progress() as progress:
        yield progress


def _checks(findings: list[Finding]) -> str:
    """Return how often each check found something."""
    counts = Counter(finding.check for finding in findings)
    return ", ".join(f"{check} {count}" for check, count in sorted(counts.items()))


def _corpora(config: Config, name: str | None) -> list[str]:
    names = list(config.data.corpora)
    if name is None:
        return names
    if name not in names:
        raise UserError(f"'{name}' is no corpus of the recipe; {nearest(name, names)}")
    return [name]


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
