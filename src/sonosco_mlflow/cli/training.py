"""The verbs that train a model, evaluate it and use it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sonosco_mlflow.cli.app import (
    PARAMS,
    RECIPE_KEYS,
    Params,
    Prepare,
    Results,
    Set,
    SetDecoding,
    allowing,
    app,
    parse_settings,
    read_overrides,
    read_recipe,
    refuse_option,
    termination,
)
from sonosco_mlflow.errors import UserError


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
    config = read_recipe(context, settings, params)
    from sonosco_mlflow.runs import train

    with termination():
        train(config, Path(), prepare=prepare, results=results, go_on=go_on, until_step=until_step)


@app.command(context_settings=RECIPE_KEYS)
def resume(
    context: typer.Context,
    run_id: Annotated[str | None, typer.Argument(help="A training run.", callback=refuse_option)] = None,
    run_option: Annotated[str | None, typer.Option("--run_id", hidden=True)] = None,
    settings: Set = None,
    prepare: Prepare = True,
    results: Results = None,
    allow_config_change: Annotated[bool, allowing("the recipe")] = False,
    allow_code_change: Annotated[bool, allowing("the code")] = False,
    allow_data_change: Annotated[bool, allowing("the data")] = False,
    allow_vocabulary_change: Annotated[bool, allowing("the vocabulary")] = False,
    allow_environment_change: Annotated[bool, allowing("the environment")] = False,
    allow_numerics_change: Annotated[bool, allowing("this machine's arithmetic")] = False,
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
    with termination():
        resume(
            chosen,
            Path(),
            overrides=read_overrides(context, settings),
            allowed_changes=[change for change, is_allowed in allowed.items() if is_allowed],
            prepare=prepare,
            results=results,
        )


@app.command(context_settings=RECIPE_KEYS)
def sweep(
    context: typer.Context,
    over: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=CHOICES", help="KEY=first,second or KEY=low..high (:log for its logarithm); repeatable."
        ),
    ],
    name: Annotated[str, typer.Option(help="Of the sweep; the same name again goes on with it.")] = "sweep",
    trials: Annotated[
        int | None, typer.Option(min=1, help="Draw so many at random; without it, the whole grid.")
    ] = None,
    objective: Annotated[str, typer.Option(help="The metric that is to be low.")] = "val_word_error_rate",
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    settings: Set = None,
    params: Params = PARAMS,
) -> None:
    """Train the recipe with keys of it varied, as child runs of one run."""
    config = read_recipe(context, settings, params)
    from sonosco_mlflow.search_space import read_space
    from sonosco_mlflow.sweep import sweep

    with termination():
        result = sweep(config, read_space(over), Path(), name=name, trials=trials, objective=objective, seed=seed)
    typer.echo(f"\nsweep {result.run_id}\n\n{result.to_markdown()}", nl=False)
    if any(trial.value is None for trial in result.trials):
        raise typer.Exit(1)


@app.command(context_settings=RECIPE_KEYS)
def evaluate(
    context: typer.Context,
    run_id: Annotated[str | None, typer.Argument(help="A finished training run.", callback=refuse_option)] = None,
    run_file: Annotated[Path | None, typer.Option(help="File that names the run, as the train stage wrote it.")] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    settings: SetDecoding = None,
    prepare: Prepare = True,
    results: Results = None,
) -> None:
    """Evaluate the model of a run from what MLflow and DVC kept; --set decoding.beam=8 decodes it otherwise."""
    from sonosco_mlflow.trained import evaluate, run_of

    if (run_id is None) == (run_file is None):
        raise UserError("give the id of a run, or --run-file")
    chosen = run_id if run_id is not None else run_of(run_file or Path())
    overrides = read_overrides(context, settings)
    with termination():
        evaluate(chosen, Path(), split=split, overrides=overrides, prepare=prepare, results=results)


@app.command()
def transcribe(
    run_id: Annotated[str, typer.Argument(help="A finished training run.")],
    audio: Annotated[list[Path], typer.Argument(help="Sound files.")],
    n_best: Annotated[int, typer.Option(min=1, help="Print so many hypotheses, each behind its score.")] = 1,
    settings: SetDecoding = None,
) -> None:
    """Print what the model of a run hears in sound files."""
    from sonosco_mlflow.trained import recognizer_of

    recognizer = recognizer_of(run_id, Path(), overrides=parse_settings(settings), n_best=n_best)
    for path in audio:
        for total, text in recognizer.file_hypotheses(path):
            score = "" if n_best == 1 else f"{total:.3f}\t"
            typer.echo(f"{path}\t{score}{text}")
