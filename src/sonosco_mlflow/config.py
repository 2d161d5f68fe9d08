"""The one recipe of a run: strict, frozen, and the same for DVC, MLflow and the command line.

``params.yaml`` holds it; ``--set key=value`` (or MLflow's ``-P key=value``) changes a key for one run. Nothing is
guessed: an unknown key, or a value of the wrong kind, is refused with the nearest valid choice.

>>> config = Config.resolve({"training": {"epochs": 3}}, overrides={"optimizer.lr": "3e-4"})
>>> config.training.epochs, config.optimizer.lr
(3, 0.0003)
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.sections import (
    Augment,
    Checkpoint,
    Corpus,
    Data,
    Decoding,
    Features,
    Model,
    Optimizer,
    Schedule,
    Section,
    Tokenizer,
    Tracking,
    Training,
)
from sonosco_mlflow.settings import Scalar, flatten, plain_settings, settings_digest, yaml_text

# A date or a number that is none, bytes that are no UTF-8, and what is nested too deeply, are told by Python's own.
_NOT_YAML = (YAMLError, ValueError, RecursionError)

# `mlflow run -P model=tds` is short for the key that people set most.
ALIASES = {"model": "model.name"}

# Keys that are short for those of the only corpus of a recipe.
ONE_CORPUS = ("data.corpus", "data.source", "data.parts")

# Sections whose keys are names of the reader's choice.
_OPEN = ("model.settings.", "data.corpora.", "data.parts.")


class Config(Section):
    """The whole recipe."""

    data: Data = Field(default_factory=Data)
    features: Features = Field(default_factory=Features)
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    model: Model = Field(default_factory=Model)
    augment: Augment = Field(default_factory=Augment)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    training: Training = Field(default_factory=Training)
    decoding: Decoding = Field(default_factory=Decoding)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, str] | None = None) -> "Config":
        """Read a ``params.yaml`` and apply ``overrides`` (dotted key to text).

        Raises:
            UserError: the file is missing or malformed, or a key or value is refused.
        """
        try:
            recipe = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError as error:
            raise UserError(f"{path}: no recipe here; run in the project's folder or pass --params") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read as a recipe: {error}") from error
        except _NOT_YAML as error:
            raise UserError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise UserError(f"{path}: expected sections such as 'model:', found {type(recipe).__name__}")
        plain: dict[str, object] = {}
        for section, keys in recipe.items():
            try:
                plain |= plain_settings({section: keys})
            except RecursionError as error:
                raise UserError(f"{path}: {section}: lies within itself, or is nested too deeply") from error
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
        return cls.resolve(plain, overrides or {}, origin=str(path))

    @classmethod
    def resolve(
        cls, recipe: Mapping[str, object], overrides: Mapping[str, str], origin: str = "the recipe"
    ) -> "Config":
        """Apply ``overrides`` to ``recipe`` and check the whole.

        Raises:
            UserError: a key or value is refused; the message names it, what was found, and the nearest valid choice.
        """
        tree: dict[str, Any] = json.loads(json.dumps(recipe))
        short = _name_corpora(tree, origin)
        parsed = {ALIASES.get(key, key): _parse(key, text) for key, text in overrides.items()}
        # The corpus before its source and its parts, in whichever order they were given.
        for key in sorted(parsed, key=lambda key: key != "data.corpus"):
            _check_key(key)
            if key.startswith(ONE_CORPUS):
                _set_one_corpus(tree, key, parsed[key])
            else:
                _set(tree, key, parsed[key])
        _complete_corpora(tree)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            details = error.errors()[0]
            # Below a setting's name pydantic lists the types that it has tried.
            parts = details["loc"][:3] if details["loc"][:2] == ("model", "settings") else details["loc"]
            if parts[-1] == "[key]":
                # Of a corpus it is the name that is refused.
                parts = ("data", "corpus") if "data.corpus" in overrides else parts[:-1]
            names = [ALIASES.get(name, name) for name in overrides]
            key = _as_given(".".join(str(part) for part in parts), [*names, *short])
            overridden = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in names)
            prefix = "" if overridden else f"{origin}: "
            raise UserError(prefix + _explain(key, dict(details))) from error

    def flat(self) -> dict[str, Scalar]:
        """Return the recipe as dotted keys; lists become their JSON text."""
        return dict(flatten(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        """Return the recipe as the text of a ``params.yaml``."""
        return yaml_text(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of the recipe."""
        return settings_digest(self.model_dump(mode="json"))

    @property
    def data_recipe(self) -> dict[str, object]:
        """The part of the recipe that the data stages depend on."""
        return {
            "data": {
                "corpora": {name: corpus.model_dump(exclude=corpus.idle) for name, corpus in self.data.corpora.items()},
                "skip": list(self.data.skip),
            },
            "features": self.features.model_dump(mode="json", exclude=self.features.idle),
            "tokenizer": self.tokenizer.model_dump(mode="json", include={"kind", "size"}),
        }


def valid_keys() -> list[str]:
    """Return every dotted key that can be set."""
    keys = [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    ]
    return [*keys, *ONE_CORPUS]


def _check_key(key: str) -> None:
    section = key.split(".")[0]
    keys = valid_keys()
    if key in keys or key.startswith(_OPEN):
        return
    if section in Config.model_fields:
        keys = [valid for valid in keys if valid.startswith(section + ".")]
    raise UserError(f"{key}: unknown key; {nearest(key, keys) or 'docs/keys.md has them all'}")


def _parse(key: str, text: str) -> object:
    try:
        # A bare `key=` means the empty string, not YAML's null.
        return YAML(typ="safe").load(text) if text else ""
    except _NOT_YAML as error:
        raise UserError(f"{key}: the value {text!r} cannot be read: {error}") from error


def _set(tree: dict[str, object], key: str, value: object) -> None:
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        child = node[parent]
        if not isinstance(child, dict):
            raise UserError(f"{parent}: found {child!r}, expected a section of keys")
        node = child
    node[last] = value


def _name_corpora(tree: dict[str, Any], origin: str) -> list[str]:
    """Write the keys that are short for those of the only corpus as a corpus with a name; return them."""
    data = tree.get("data")
    if not isinstance(data, dict):
        return []
    short = [key for key in ONE_CORPUS if key.removeprefix("data.") in data]
    if short and "corpora" in data:
        raise UserError(f"{origin}: {short[0]}: stands beside data.corpora; leave one of the two out")
    for key in short:
        _set_one_corpus(tree, key, data.pop(key.removeprefix("data.")))
    return short


def _set_one_corpus(tree: dict[str, Any], key: str, value: object) -> None:
    corpora = _corpora(tree) or {"default": {}}
    only = next(iter(corpora)) if len(corpora) == 1 else None
    if key != "data.corpus":
        if only is None:
            raise UserError(
                f"{key}: there is more than one corpus; expected data.corpora.NAME{key.removeprefix('data')}"
            )
        _set(tree, f"data.corpora.{only}{key.removeprefix('data')}", value)
    elif not isinstance(value, str):
        raise UserError(f"{key}: found {value!r}, expected string")
    elif only is None or _kind(only, corpora[only]) != value:
        # The source and the parts of another corpus are none of this one's.
        _set(tree, "data.corpora", {value: {}})


def _kind(name: str, corpus: object) -> object:
    return corpus.get("kind", name) if isinstance(corpus, dict) else name


def _complete_corpora(tree: dict[str, Any]) -> None:
    """Let each corpus that says no kind be of the kind that its name is, and put them in the order of their names."""
    completed = {
        name: {"kind": name, **(entry or {})} if entry is None or isinstance(entry, dict) else entry
        for name, entry in sorted(_corpora(tree).items(), key=lambda item: str(item[0]))
    }
    if completed:
        tree["data"]["corpora"] = completed


def _corpora(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the corpora of a recipe as far as it has any."""
    data = tree.get("data")
    corpora = data.get("corpora") if isinstance(data, dict) else None
    return corpora if isinstance(corpora, dict) else {}


def _as_given(key: str, names: Sequence[str]) -> str:
    """Return the key of a corpus in its short form, if one of ``names``, by which it was given, is."""
    below = re.fullmatch(r"data\.corpora\.[^.]+\.(.*)", key)
    short = key if below is None else f"data.{below[1]}"
    return short if any(f"{short}.".startswith(f"{name}.") for name in names) else key


def _explain(key: str, details: Mapping[str, object]) -> str:
    found = details["input"]
    if details["type"] == "too_short":
        return f"{key}: found {found!r}, expected one at least"
    if details["type"] == "extra_forbidden" and key.startswith("data.corpora."):
        return f"{key}: unknown key; {nearest(key.split('.')[-1], Corpus.model_fields)}"
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(key, [*valid_keys(), *Config.model_fields])}".rstrip("; ")
    if details["type"] == "literal_error":
        context = details["ctx"]
        assert isinstance(context, Mapping)
        choices = re.findall("'(.*?)'", context["expected"])
        return f"{key}: found {found!r}, {nearest(str(found), choices)}"
    if key.startswith("model.settings."):
        return f"{key}: found {found!r}, expected a number, a text or a list of numbers"
    if details["type"] == "string_pattern_mismatch":
        return f"{key}: found {found!r}, expected a name of letters, digits, hyphens and underscores"
    # pydantic says "Input should be ..."; for a reader of a recipe, it is the key's value that should be.
    expected = str(details["msg"]).removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}: found {found!r}, expected {expected}"
