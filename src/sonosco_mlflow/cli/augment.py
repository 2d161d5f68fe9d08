"""The verbs that show what augmentation does."""

from pathlib import Path
from typing import Annotated

import typer

from sonosco_mlflow.cli.app import PARAMS, RECIPE_KEYS, Params, Prepare, Set, app, read_recipe

augment = typer.Typer(no_args_is_help=True, help="See and hear what the recipe's augmentation does.")
app.add_typer(augment, name="augment")


@augment.command(context_settings=RECIPE_KEYS)
def preview(
    context: typer.Context,
    into: Annotated[Path, typer.Option(help="Folder for sounds and pictures.")] = Path("results/augment"),
    count: Annotated[int, typer.Option(help="Utterances, from the first on.", min=1)] = 4,
    epochs: Annotated[int, typer.Option(help="Epochs, from the first on.", min=1)] = 3,
    utterance: Annotated[list[str] | None, typer.Option(help="An utterance's id instead; repeatable.")] = None,
    settings: Set = None,
    prepare: Prepare = True,
    params: Params = PARAMS,
) -> None:
    """Write some training utterances as the first epochs hear them: wav files, and a picture of each."""
    from sonosco_mlflow.preview import preview_augmentation
    from sonosco_mlflow.tracking.pipeline import prepare_data, ready_data

    config = read_recipe(context, settings, params)
    folder = (prepare_data if prepare else ready_data)(config, Path())
    for path in preview_augmentation(config, folder, into, count=count, epochs=epochs, ids=utterance or ()):
        typer.echo(path)
