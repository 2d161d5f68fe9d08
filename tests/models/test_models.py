import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.models import MODELS, build_model, model_settings
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer


def test_naming_the_models_imports_no_torch() -> None:
    command = "import sys, sonosco_mlflow.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], env={"PYTHONPATH": "src"}, check=False).returncode == 0


def test_settings_replace_those_of_the_preset() -> None:
    small = model_settings("tds", "small", {})
    changed = model_settings("tds", "small", {"dropout": 0, "channels": (2, 3)})
    assert changed == small | {"dropout": 0.0, "channels": [2, 3]}
    assert model_settings("tds", "small", {}) == small


@pytest.mark.parametrize(
    ("name", "preset", "settings", "expected"),
    [
        ("tsd", "small", {}, r"model.name is 'tsd': did you mean 'tds'\? Valid: deepspeech2, las, tds"),
        ("las", "smal", {}, r"model.preset is 'smal': did you mean 'small'\? Valid: paper, small"),
        (
            "las",
            "small",
            {"droput": 0.1},
            r"model.settings.droput is no setting .*: did you mean 'dropout'\?",
        ),
        ("las", "small", {"dropout": "much"}, "model.settings.dropout is 'much', expected float"),
        ("las", "small", {"speller_layers": True}, "model.settings.speller_layers is True, expected int"),
        ("las", "small", {"speller_layers": 1.5}, "model.settings.speller_layers is 1.5, expected int"),
        (
            "tds",
            "small",
            {"blocks": 3},
            r"model.settings.blocks is 3, expected a list of int, for instance \[",
        ),
        ("tds", "small", {"blocks": []}, r"model.settings.blocks is \[\], expected a list of int"),
        ("tds", "small", {"blocks": [1, "x"]}, "model.settings.blocks.1 is 'x', expected int"),
        ("tds", "small", {"blocks": [1]}, r"channels \[.*\], blocks \[1\] and strides .* one entry"),
        ("tds", "small", {"kernel": 8}, "model.settings.kernel is 8, expected an odd number"),
        ("deepspeech2", "small", {"cell": "gro"}, "model.settings.cell is 'gro': did you mean 'gru'"),
        ("deepspeech2", "small", {"channels": [4]}, "must have one entry for each convolution"),
        ("deepspeech2", "small", {"band_kernels": [4, 5]}, r"band_kernels \[4, 5\] must be odd"),
        ("deepspeech2", "small", {"look_ahead": -1}, "model.settings.look_ahead is -1, expected 0 or more"),
        ("deepspeech2", "small", {"look_ahead": 4}, "look_ahead is 4, .* set model.settings.bidirectional to false"),
        ("las", "small", {"attention": "locatoin"}, "model.settings.attention is 'locatoin': did you mean 'location'"),
        ("las", "small", {"location_width": 4}, "model.settings.location_width is 4, expected an odd number"),
        ("las", "small", {"ctc_weight": 1.5}, "model.settings.ctc_weight is 1.5, expected a share from 0 to 1"),
        *(
            (name, "small", {key: value}, rf"model\.settings\.{key} is {value}, expected a share from 0 to 1")
            for name, key, value in (
                ("las", "scheduled_sampling", 2.0),
                ("las", "label_smoothing", -0.5),
                ("tds", "random_sampling", 7.0),
                ("tds", "dropout", 1.5),
                ("deepspeech2", "dropout", -0.1),
            )
        ),
        *(
            (name, "small", {key: value}, rf"model\.settings\.{key} is {re.escape(str(value))}, expected .* above 0")
            for name, key, value in (
                ("tds", "blocks", [-1, 2]),
                ("tds", "strides", [0, 2]),
                ("tds", "soft_window_sigma", 0.0),
                ("las", "joined_frames", [2, 0]),
                ("las", "attention_size", 0),
                ("las", "location_filters", 0),
                ("deepspeech2", "recurrent_layers", -2),
                ("deepspeech2", "channels", [0, 2]),
                ("deepspeech2", "band_strides", [0, 2]),
            )
        ),
    ],
)
def test_mistakes_are_named_with_the_nearest_choice(
    name: str, preset: str, settings: dict[str, object], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        build_model(name, preset, 80, 30, settings)


@pytest.mark.parametrize("name", MODELS)
def test_presets_are_complete_and_of_their_size(name: str, build: Callable[..., SpeechModel]) -> None:
    assert model_settings(name, "small", {}).keys() == model_settings(name, "paper", {}).keys()
    assert 0.5e6 < build(name).parameter_count() < 3e6


def test_weights_follow_from_the_seed_and_the_description_rebuilds_the_model(
    build: Callable[..., SpeechModel], batch: Batch
) -> None:
    for name in MODELS:
        model = build(name).eval()
        torch.manual_seed(0)
        rebuilt = Deserializer().build(Serializer().describe(model)).eval()
        assert torch.equal(rebuilt(batch).loss, model(batch).loss)


# Settings that came after the first models were kept.
LATER = {
    "las": ["attention", "location_filters", "location_width", "ctc_weight"],
    "deepspeech2": ["look_ahead"],
    "tds": ["ctc_weight"],
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_kept_before_a_setting_came_is_still_the_same(
    name: str, build: Callable[..., SpeechModel], batch: Batch
) -> None:
    model = build(name).eval()
    description = Serializer().describe(model)
    for setting in LATER[name]:
        del description["parameters"][setting]
    rebuilt = Deserializer().build(description).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(batch).loss, model(batch).loss)
