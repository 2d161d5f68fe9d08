"""The command line's application, and the options that its verbs share.

Any key of the recipe can be set for one run, as ``--set optimizer.lr=3e-4`` or, the way MLflow passes parameters
on, as ``--optimizer.lr 3e-4``.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

from sonosco_mlflow.config import ALIASES, Config
from sonosco_mlflow.errors import UserError, nearest

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Speech recognition training in which every number can be derived again.",
)
RECIPE_KEYS = {"allow_extra_args": True, "ignore_unknown_options": True}

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of the recipe; repeatable.")]
SetDecoding = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of `decoding`; repeatable.")
]
Params = Annotated[Path, typer.Option("--params", help="The recipe.")]
Results = Annotated[Path | None, typer.Option(help="Folder for what DVC keeps of the run.")]
Prepare = Annotated[bool, typer.Option(help="Bring the data up to date first, with DVC.")]
PARAMS = Path("params.yaml")


def allowing(what: str) -> OptionInfo:
    """Return the option that lets a run go on although something of it is not as it was."""
    option: OptionInfo = typer.Option(show_default=False, help=f"Go on although {what} differs; the run records it.")
    return option


def refuse_option(context: typer.Context, value: str | None) -> str | None:
    """Return the value of an argument; what a misspelt option would be taken for is refused."""
    if value is None or not value.startswith("-"):
        return value
    shown = [parameter for parameter in context.command.params if not getattr(parameter, "hidden", False)]
    names = [name for parameter in shown for name in (*parameter.opts, *parameter.secondary_opts)]
    options = [name for name in names if name.startswith("--")]
    name = value.partition("=")[0]
    raise UserError(f"{name} is no option of `sonosco {context.info_name}`; {nearest(name, options)}".rstrip("; "))


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


@contextmanager
def termination() -> Iterator[None]:
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
