"""The models by name.

A module is imported when its model is asked for, so that naming the models costs nothing.

>>> sorted(MODELS)
['deepspeech2', 'las', 'tds']
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from sonosco_mlflow.errors import UserError, nearest

if TYPE_CHECKING:
    from sonosco_mlflow.models.base import SpeechModel

MODELS: Mapping[str, str] = {
    "deepspeech2": "sonosco_mlflow.models.deepspeech2:DeepSpeech2",
    "las": "sonosco_mlflow.models.las:LAS",
    "tds": "sonosco_mlflow.models.tds:TDS",
}


def build_model(
    name: str, preset: str, n_mels: int, vocabulary_size: int, settings: Mapping[str, object]
) -> "SpeechModel":
    """Return a new model, its weights drawn from torch's global generator.

    Args:
        name: key of ``MODELS``.
        preset: key of the model's ``presets``.
        n_mels: mel bands of the features.
        vocabulary_size: number of token ids.
        settings: what differs from the preset.

    Raises:
        UserError: the name, the preset or a setting is unknown, or a setting's value does not fit; the
            message names the key, the value and what is valid.
    """
    resolved = model_settings(name, preset, settings)
    try:
        return _model_class(name)(n_mels=n_mels, vocabulary_size=vocabulary_size, **resolved)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        # What torch says of a size or a probability outside its range.
        raise UserError(f"model.settings {resolved} make no {name} model: {error}") from error


def model_settings(name: str, preset: str, settings: Mapping[str, object]) -> dict[str, object]:
    """Return all of the model's own settings: those of the preset, replaced by ``settings``.

    Raises:
        UserError: the name, the preset or a setting is unknown, or a setting has another type than in the
            preset.
    """
    presets = _model_class(name).presets
    if preset not in presets:
        raise UserError(f"model.preset is '{preset}': {nearest(preset, presets)}")
    resolved = dict(presets[preset])
    for key, value in settings.items():
        if key not in resolved:
            raise UserError(f"model.settings.{key} is no setting of model '{name}': {nearest(key, resolved)}")
        resolved[key] = _fitting(f"model.settings.{key}", value, resolved[key])
    return resolved


def _model_class(name: str) -> "type[SpeechModel]":
    if name not in MODELS:
        raise UserError(f"model.name is '{name}': {nearest(name, MODELS)}")
    module, _, attribute = MODELS[name].partition(":")
    found: type[SpeechModel] = getattr(import_module(module), attribute)
    return found


def _fitting(key: str, value: object, example: object) -> object:
    """Return ``value`` where it has the type of ``example``; an int also does for a float."""
    if isinstance(example, list) and isinstance(value, list | tuple) and value:
        return [_fitting(f"{key}.{i}", entry, example[0]) for i, entry in enumerate(value)]
    if isinstance(example, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(example) or value == []:
        expected = f"a list of {type(example[0]).__name__}" if isinstance(example, list) else type(example).__name__
        raise UserError(f"{key} is {value!r}, expected {expected}, for instance {example!r}")
    return value
