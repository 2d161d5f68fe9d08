"""Nested settings as a run can keep them: what YAML and JSON give back as it was; as a digest, and flat.

>>> plain_settings({"optimizer": {"betas": (0.9, 0.98)}})
{'optimizer': {'betas': [0.9, 0.98]}}
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from io import StringIO

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from sonosco_mlflow.errors import UserError

Scalar = None | bool | int | float | str


def plain_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Return nested settings of a program's own as YAML and JSON can keep them: tuples as lists.

    Raises:
        UserError: a value is none that comes back from there as it was, or a key is no text or has a dot in it; the
            message names the key and its type.
    """
    return {name: _plain(name, value) for name, value in _named("the settings", settings)}


def settings_digest(settings: Mapping[str, object]) -> str:
    """Return the hexadecimal sha256 of nested settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def yaml_text(tree: Mapping[str, object]) -> str:
    """Return nested mappings, lists, texts and numbers as YAML that gives them back as they were."""
    stream = StringIO()
    yaml = YAML()
    # Where ruamel folds a long line, it loses one of two spaces.
    yaml.width = sys.maxsize
    yaml.dump(_quoted(tree), stream)
    return stream.getvalue()


def _quoted(value: object) -> object:
    """Return a tree in which each text with a line break that YAML would fold is one that is written escaped."""
    match value:
        case str():
            return DoubleQuotedScalarString(value) if "\x85" in value else value
        case Mapping():
            return {_quoted(name): _quoted(item) for name, item in value.items()}
        case list():
            return [_quoted(item) for item in value]
        case _:
            return value


def flatten(settings: Mapping[str, object]) -> Iterator[tuple[str, Scalar]]:
    """Yield the leaves of nested mappings under dotted keys; lists become their JSON text.

    Raises:
        UserError: as :func:`plain_settings`.
    """
    yield from _leaves(plain_settings(settings), "")


def _leaves(tree: Mapping[str, object], prefix: str) -> Iterator[tuple[str, Scalar]]:
    for key, value in tree.items():
        match value:
            case dict():
                yield from _leaves(value, f"{prefix}{key}.")
            case list():
                yield prefix + key, json.dumps(value)
            case None | bool() | int() | float() | str():
                yield prefix + key, value


def _plain(key: str, value: object) -> object:
    # Not their subclasses: what is more than a number or a text would come back as less.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(f"{key}.{name}", item) for name, item in _named(key, value)}
    if isinstance(value, list | tuple):
        return [_plain(f"{key}.{index}", item) for index, item in enumerate(value)]
    raise UserError(
        f"{key}: found {value!r}, a {_type_name(value)}, expected a text, a number, true, false, none, or lists and "
        "mappings of these; write str(...) of a path, .value of an enum, .item() of a scalar of NumPy or torch"
    )


def _named(key: str, settings: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if type(name) is not str:
            raise UserError(f"{key}: found the key {name!r}, a {_type_name(name)}, expected a text")
        if "." in name:
            # Flat, it would be one with a key of the section that it names.
            raise UserError(
                f"{key}: found the key {name!r}, expected none with a dot: write a section, or another name"
            )
        yield name, value


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
