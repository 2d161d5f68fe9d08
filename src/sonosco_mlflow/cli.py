"""The command line: one short function a verb.

Any key of the recipe can be set for one run, as ``--set optimizer.lr=3e-4`` or, the way MLflow passes parameters
on, as ``--optimizer.lr 3e-4``. Exit status: 0 done, 1 a mistake or a failed run (one message; ``--debug`` shows the
traceback), 2 usage, 130 and 143 stopped by SIGINT or SIGTERM and resumable.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sonosco_mlflow.config import Config
from sonosco_mlflow.errors import UserError, describe_failure

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Speech recognition training in which every number can be derived again.",
)
RECIPE_KEYS = {"allow_extra_args": True, "ignore_unknown_options": True}

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of the recipe; repeatable.")]
Params = Annotated[Path, typer.Option("--params", help="The recipe.")]
Results = Annotated[Path | None, typer.Option(help="Folder for what DVC keeps of the run.")]
Prepare = Annotated[bool, typer.Option(help="Bring the data up to date first, with DVC.")]
PARAMS = Path("params.yaml")


@app.command(context_settings=RECIPE_KEYS)
def corpus(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="default, an4 or folder; the recipe's by default.")] = None,
    source: Annotated[str | None, typer.Option(help="Archive, folder or address of the corpus.")] = None,
    into: Annotated[Path, typer.Option(help="The data folder.")] = Path("data"),
    settings: Set = None,
    params: Params = PARAMS,
) -> None:
    """Bring a corpus: its audio, and a list of utterances a split."""
    from sonosco_mlflow.console import stage_progress
    from sonosco_mlflow.data.stages import DataFolder, make_corpus

    chosen = {key: value for key, value in {"data.corpus": name, "data.source": source}.items() if value is not None}
    config = _recipe(context, settings, params, chosen)
    with stage_progress() as progress:
        make_corpus(config, DataFolder(into), progress)


@app.command(context_settings=RECIPE_KEYS)
def manifest(
    context: typer.Context,
    into: Annotated[Path, typer.Option(help="The data folder.")] = Path("data"),
    settings: Set = None,
    params: Params = PARAMS,
) -> None:
    """Write the manifests and the vocabulary of the corpus."""
    from sonosco_mlflow.data.stages import DataFolder, make_manifests

    _recipe(context, settings, params)
    make_manifests(DataFolder(into))


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

    config = _recipe(context, settings, params)
    with stage_progress() as progress:
        make_features(config, DataFolder(into), progress)


@app.command(context_settings=RECIPE_KEYS)
def data(context: typer.Context, settings: Set = None, params: Params = PARAMS) -> None:
    """Bring the recipe's data up to date with DVC, and record it in MLflow."""
    from sonosco_mlflow.runs import bring_data

    lineage = bring_data(_recipe(context, settings, params), Path())
    typer.echo(lineage.to_markdown())


@app.command(context_settings=RECIPE_KEYS)
def train(
    context: typer.Context,
    settings: Set = None,
    params: Params = PARAMS,
    prepare: Prepare = True,
    results: Results = None,
) -> None:
    """Train the recipe: data, training, test, all of it in one MLflow run."""
    config = _recipe(context, settings, params)
    from sonosco_mlflow.runs import train
    from sonosco_mlflow.training.interruption import Terminated, raise_on_termination

    raise_on_termination()
    try:
        train(config, Path(), prepare=prepare, results=results)
    except Terminated:
        # Typer would take it for the KeyboardInterrupt that it also is, and end with 130.
        sys.exit(143)


@app.command()
def evaluate(
    run_id: Annotated[str | None, typer.Argument(help="A finished training run.")] = None,
    run_file: Annotated[Path | None, typer.Option(help="File that names the run, as the train stage wrote it.")] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    prepare: Prepare = True,
    results: Results = None,
) -> None:
    """Evaluate the model of a run from what MLflow and DVC kept."""
    from sonosco_mlflow.runs import evaluate, run_of

    if (run_id is None) == (run_file is None):
        raise UserError("give the id of a run, or --run-file")
    chosen = run_id if run_id is not None else run_of(run_file or Path())
    evaluate(chosen, Path(), split=split, prepare=prepare, results=results)


@app.command()
def transcribe(
    run_id: Annotated[str, typer.Argument(help="A finished training run.")],
    audio: Annotated[list[Path], typer.Argument(help="Sound files.")],
) -> None:
    """Print what the model of a run hears in sound files."""
    from sonosco_mlflow.runs import recognizer_of

    recognizer = recognizer_of(run_id, Path())
    for path in audio:
        typer.echo(f"{path}\t{recognizer.transcribe_file(path)}")


def main() -> None:
    """Run the command line and end the process."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments, prog_name="sonosco")
    except Exception as error:
        message = describe_failure(error)
        _mark_failed(message)
        if debug:
            raise
        hint = "" if isinstance(error, UserError) else " (`sonosco --debug ...` shows where)"
        typer.secho(f"sonosco: {message}{hint}", fg=typer.colors.RED, err=True)
        sys.exit(1)


def _recipe(
    context: typer.Context, settings: list[str] | None, params: Path, chosen: dict[str, str] | None = None
) -> Config:
    overrides = dict(chosen or {})
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected key=value")
        overrides[key] = value
    overrides |= _dotted(context.args)
    return Config.load(params, overrides)


def _dotted(arguments: list[str]) -> dict[str, str]:
    """Read ``--key value`` and ``--key=value`` pairs.

    >>> _dotted(["--optimizer.lr", "3e-4", "--model=las"])
    {'optimizer.lr': '3e-4', 'model': 'las'}
    """
    overrides = {}
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument '{argument}'; a key of the recipe is set by --key value")
        key, equals, value = argument.removeprefix("--").partition("=")
        overrides[key] = value if equals else next(remaining, "")
    return overrides


def _mark_failed(message: str) -> None:
    # Only where `mlflow run` launched this process is there a run that nobody else would mark.
    import os

    if "MLFLOW_RUN_ID" in os.environ:
        from sonosco_mlflow.tracking.mlflow_run import mark_launched_run_failed

        mark_launched_run_failed(message)
