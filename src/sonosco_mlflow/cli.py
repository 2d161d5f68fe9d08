"""The command line: one short function a verb.

Any key of the recipe can be set for one run, as ``--set optimizer.lr=3e-4`` or, the way MLflow passes parameters
on, as ``--optimizer.lr 3e-4``. Exit status: 0 done, 1 a mistake or a failed run (one message; ``--debug`` shows the
traceback), 2 usage, 130 and 143 stopped by SIGINT or SIGTERM and resumable.
"""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sonosco_mlflow.config import ALIASES, Config
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
Allow = Annotated[bool, typer.Option(show_default=False, help="Go on although it differs; the run records it.")]
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
    go_on: Annotated[
        bool, typer.Option("--continue", help="Continue a run of the same recipe, code and data that was cut off.")
    ] = False,
    until_step: Annotated[
        int | None, typer.Option(min=1, help="Stop there as an interrupt does; `resume` continues.")
    ] = None,
) -> None:
    """Train the recipe: data, training, test, all of it in one MLflow run."""
    config = _recipe(context, settings, params)
    from sonosco_mlflow.runs import train

    with _termination():
        train(config, Path(), prepare=prepare, results=results, go_on=go_on, until_step=until_step)


@app.command(context_settings=RECIPE_KEYS)
def resume(
    context: typer.Context,
    run_id: Annotated[str | None, typer.Argument(help="A training run.")] = None,
    run_option: Annotated[str | None, typer.Option("--run_id", hidden=True)] = None,
    settings: Set = None,
    prepare: Prepare = True,
    results: Results = None,
    allow_config_change: Allow = False,
    allow_code_change: Allow = False,
    allow_data_change: Allow = False,
    allow_vocabulary_change: Allow = False,
    allow_environment_change: Allow = False,
    allow_numerics_change: Allow = False,
) -> None:
    """Continue a run that was killed, stopped or failed; with --set training.epochs=N also a finished one."""
    from sonosco_mlflow.runs import resume

    allowed = {
        "config": allow_config_change,
        "code": allow_code_change,
        "data": allow_data_change,
        "vocabulary": allow_vocabulary_change,
        "environment": allow_environment_change,
        "numerics": allow_numerics_change,
    }
    # `mlflow run -P run_id=...` gives an option, `mlflow run --run-id ...` the variable.
    chosen = run_id or run_option or os.environ.pop("MLFLOW_RUN_ID", None)
    if chosen is None:
        raise UserError("give the id of the run that is to go on: sonosco resume RUN_ID")
    with _termination():
        resume(
            chosen,
            Path(),
            overrides=_overrides(context, settings),
            allowed_changes=[change for change, is_allowed in allowed.items() if is_allowed],
            prepare=prepare,
            results=results,
        )


@app.command()
def reproduce(
    run_id: Annotated[str, typer.Argument(help="A training run.")],
    until_step: Annotated[int | None, typer.Option(min=1, help="Stop there: a proof that costs less.")] = None,
    env_manager: Annotated[str, typer.Option(help="uv builds the run's environment, local takes this one.")] = "uv",
    allow_numerics_change: Allow = False,
) -> None:
    """Make a run again from what MLflow and DVC kept, and certify that it comes out the same, bit for bit."""
    from sonosco_mlflow.reproduction import reproduce

    certificate = reproduce(
        run_id,
        Path(),
        until_step=until_step,
        environment_manager=env_manager,
        allow_numerics_change=allow_numerics_change,
    )
    typer.echo(certificate.to_markdown())
    if not certificate.is_identical:
        raise typer.Exit(1)


@app.command()
def show(
    run_id: Annotated[str | None, typer.Argument(help="A training run; without one, all of them.")] = None,
) -> None:
    """Show what runs there are, or what one of them is and how to go on with it."""
    from sonosco_mlflow.overview import show_run, show_runs

    if run_id is None:
        show_runs(Path())
    else:
        show_run(run_id, Path())


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
    arguments = _normalised([argument for argument in sys.argv[1:] if argument != "--debug"])
    debug = "--debug" in sys.argv[1:]
    # A warning is for the reader, who does not care for the line of code that gave it.
    warnings.formatwarning = lambda message, *_, **__: f"sonosco: warning: {message}\n"
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


@contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM stop what is done inside as an interrupt does, and end the process with 143."""
    from sonosco_mlflow.training.interruption import Terminated, raise_on_termination

    previous = signal.getsignal(signal.SIGTERM)
    raise_on_termination()
    try:
        yield
    except Terminated:
        # Typer would take it for the KeyboardInterrupt that it also is, and end with 130.
        sys.exit(143)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _recipe(
    context: typer.Context, settings: list[str] | None, params: Path, chosen: dict[str, str] | None = None
) -> Config:
    return Config.load(params, {**(chosen or {}), **_overrides(context, settings)})


def _overrides(context: typer.Context, settings: list[str] | None) -> dict[str, str]:
    overrides = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected key=value")
        overrides[key] = value
    return overrides | _dotted(context.args)


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


def _normalised(arguments: list[str]) -> list[str]:
    """Write keys of the recipe as ``--set``, and flags of ``mlflow run -P allow-code-change=true`` without a value.

    A command with an argument of its own would take the key, or the value behind it, for that.

    >>> _normalised(["resume", "--training.epochs", "20", "--allow-code-change", "true", "--run_id", "ab12"])
    ['resume', '--set', 'training.epochs=20', '--allow-code-change', '--run_id', 'ab12']
    """
    words: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and ("." in key or key in ALIASES):
            words += ["--set", f"{key}={value if equals else next(remaining, '')}"]
        elif words and words[-1].startswith("--allow-") and argument.lower() in ("true", "false"):
            if argument.lower() == "false":
                words.pop()
        else:
            words.append(argument)
    return words


def _mark_failed(message: str) -> None:
    # Only where `mlflow run` launched this process is there a run that nobody else would mark.
    if "MLFLOW_RUN_ID" in os.environ:
        from sonosco_mlflow.tracking.mlflow_run import mark_launched_run_failed

        mark_launched_run_failed(message)
