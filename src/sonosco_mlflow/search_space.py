"""What a sweep varies: keys of the recipe, each with its choices or its range.

>>> read_space(["optimizer.lr=1e-4..1e-2:log", "model=tds,las"])    # doctest: +NORMALIZE_WHITESPACE
{'optimizer.lr': FloatDistribution(high=0.01, log=True, low=0.0001, step=None),
 'model.name': CategoricalDistribution(choices=('tds', 'las'))}
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sonosco_mlflow.config import ALIASES, Config
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.recipe import check_recipe

Space = Mapping[str, BaseDistribution]
Choice = str | int | float | bool | None
_LOGARITHMIC = ":log"
_RANGE = re.compile(r"[^,/\[\]]+\.\.[^,/\[\]]+")


def read_space(dimensions: Iterable[str]) -> Space:
    """Read ``key=first,second,...`` (choices) and ``key=low..high`` (a range; ``:log`` behind it for its logarithm).

    Raises:
        UserError: one is neither, or a key comes twice.
    """
    space: dict[str, BaseDistribution] = {}
    for dimension in dimensions:
        key, equals, text = dimension.partition("=")
        key = ALIASES.get(key, key)
        if not equals or not text:
            raise UserError(f"--over {dimension}: expected key=first,second,... or key=low..high")
        if key in space:
            raise UserError(f"--over {dimension}: {key} is varied twice")
        space[key] = _range(dimension, key, text) if _RANGE.fullmatch(text) else _choices(dimension, text)
    if not space:
        raise UserError("a sweep varies something: --over optimizer.lr=1e-4,1e-3")
    return space


def check_space(space: Space, recipe: Config) -> None:
    """Try every choice and both ends of every range, each for itself.

    Raises:
        UserError: the recipe refuses one; the message names the key.
    """
    tree = recipe.model_dump(mode="json")
    for key, distribution in space.items():
        match distribution:
            case CategoricalDistribution():
                values = distribution.choices
            case FloatDistribution() | IntDistribution():
                values = (distribution.low, distribution.high)
        for value in values:
            check_recipe(Config.resolve(tree, {key: as_text(value)}))


def grid_size(space: Space) -> int:
    """Return how many combinations of choices there are.

    Raises:
        UserError: a key has a range.
    """
    return math.prod(len(choices) for choices in _grid(space).values())


def combination(space: Space, number: int) -> dict[str, Choice]:
    """Return the choices of one combination of the grid; the last key varies fastest."""
    grid = _grid(space)
    return dict(zip(grid, next(itertools.islice(itertools.product(*grid.values()), number, None)), strict=True))


def draw(space: Space, number: int, seed: int) -> dict[str, Any]:
    """Draw a value for each key; it follows from the number and the seed alone."""
    key = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=int.from_bytes(key[:4])))
    return study.ask(dict(space)).params


def _grid(space: Space) -> dict[str, tuple[Choice, ...]]:
    grid = {}
    for key, distribution in space.items():
        if not isinstance(distribution, CategoricalDistribution):
            raise UserError(
                f"{key} has a range, and a grid has none; give its choices, or --trials for a random search"
            )
        grid[key] = tuple(distribution.choices)
    return grid


def as_text(value: object) -> str:
    """Return a drawn value as the recipe reads it."""
    if not isinstance(value, str):
        return json.dumps(value)
    # A quoted '1' is a text and stays one; a list is kept as its text and becomes one again.
    try:
        read = YAML(typ="safe").load(value)
    except (YAMLError, ValueError):
        return json.dumps(value)
    return value if read == value or isinstance(read, list | dict) else json.dumps(value)


def _takes_fractions(key: str) -> bool:
    """Return whether a key of the recipe takes any number between two whole ones."""
    if key.startswith("model.settings."):
        # Most are sizes; which are not, is said by the model alone.
        return False
    try:
        Config.resolve({}, {key: "0.5"})
    except UserError:
        return False
    return True


def _range(dimension: str, key: str, text: str) -> BaseDistribution:
    log = text.endswith(_LOGARITHMIC)
    low, _, high = text.removesuffix(_LOGARITHMIC).partition("..")
    first, last = _yaml(dimension, low), _yaml(dimension, high)
    try:
        match first, last:
            case int(), int() if not _takes_fractions(key):
                return IntDistribution(first, last, log=log)
            case int() | float(), int() | float():
                return FloatDistribution(first, last, log=log)
        raise UserError(f"--over {dimension}: expected two numbers, low..high")
    except ValueError as error:
        raise UserError(f"--over {dimension}: {error}") from error


def _choices(dimension: str, text: str) -> BaseDistribution:
    values = _yaml(dimension, f"[{text}]")
    strange = [value for value in values if not isinstance(value, Choice | list | dict)]
    if strange or not values:
        found = f"{strange[0]}, a {type(strange[0]).__name__}" if strange else "nothing"
        raise UserError(
            f"--over {dimension}: found {found}; expected texts (in quotes) or numbers: key=first,second,..."
        )
    # A list is a choice as a whole; Optuna takes plain values only.
    choices = [json.dumps(value) if isinstance(value, list | dict) else value for value in values]
    if len({*choices}) != len(choices):
        raise UserError(f"--over {dimension}: a choice comes twice")
    return CategoricalDistribution(choices)


def _yaml(dimension: str, text: str) -> Any:
    try:
        return YAML(typ="safe").load(text)
    except (YAMLError, ValueError) as error:
        raise UserError(f"--over {dimension}: {text!r} cannot be read: {error}") from error
