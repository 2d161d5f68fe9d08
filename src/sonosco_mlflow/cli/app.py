"""The command line's application, and the options that its verbs share.

Any key of the recipe can be set for one run, as ``--set optimizer.lr=3e-4`` or, the way MLflow passes parameters
on, as ``--optimizer.lr 3e-4``.
"""

from pathlib import Path
from typing import Annotated

import typer

from sonosco_mlflow.config import ALIASES, Config
from sonosco_mlflow.errors import UserError

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


def read_recipe(
    context: typer.Context, settings: list[str] | None, params: Path, chosen: dict[str, str] | None = None
) -> Config:
    """Return the recipe of a file with what the command line sets of it, on top of what it has ``chosen``."""
    return Config.load(params, {**(chosen or {}), **read_overrides(context, settings)})


def read_overrides(context: typer.Context, settings: list[str] | None) -> dict[str, str]:
    """Return the keys of the recipe that the command line sets, either way."""
    return parse_settings(settings) | _dotted(context.args)


def parse_settings(settings: list[str] | None) -> dict[str, str]:
    """Return the keys and values of ``--set``."""
    overrides = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected key=value")
        overrides[key] = value
    return overrides


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


def normalise(arguments: list[str]) -> list[str]:
    """Write keys of the recipe as ``--set``, and flags of ``mlflow run -P allow-code-change=true`` without a value.

    A command with an argument of its own would take the key, or the value behind it, for that.

    >>> normalise(["resume", "--training.epochs", "20", "--allow-code-change", "true", "--run_id", "ab12"])
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
