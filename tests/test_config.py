import re
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from sonosco_mlflow.config import Config, valid_keys
from sonosco_mlflow.decisive import LATER, decisive
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.recipe import check_recipe
from sonosco_mlflow.sections import Corpus
from sonosco_mlflow.settings import flatten, plain_settings, settings_digest, yaml_text

# Scripts and people rely on these.
FIXED_KEYS = [
    *("model.name", "model.preset", "training.epochs", "training.seed", "training.accumulation", "optimizer.name"),
    *("optimizer.lr", "data.corpus", "data.workers", "data.frames_per_batch", "features.n_mels"),
    *("checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_last", "checkpoint.keep_best"),
]


def resolve(**overrides: str) -> Config:
    return Config.resolve({}, {key.replace("__", "."): text for key, text in overrides.items()})


def test_the_keys_that_people_rely_on_stand() -> None:
    assert set(FIXED_KEYS) <= set(valid_keys())
    # This one is short for the only corpus's, which has a name.
    assert Config().flat().keys() >= set(FIXED_KEYS) - {"data.corpus"}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.lr", "3e-4", 3e-4),
        ("optimizer.lr", "1", 1.0),
        ("training.epochs", "2", 2),
        ("training.gradient_clip", "null", None),
        ("data.corpora.default.source", "corpus.tar.gz", "corpus.tar.gz"),
        ("features.window", "povey", "povey"),
        ("schedule.epochs", "[3, 5]", [3, 5]),
        ("schedule.epochs", "[]", []),
        ("model.settings.dropout", "0.3", 0.3),
        ("data.corpora.default.parts.train", "[a, b]", ["a", "b"]),
        ("data.corpora.default.parts", "{train: [a]}", {"train": ["a"]}),
        ("model", "las", "las"),
        ("tracking.run_name", "no", "no"),
        ("tracking.run_name", "", ""),
    ],
)
def test_an_override_is_read_as_yaml_1_2(key: str, text: str, value: object) -> None:
    node: Any = Config.resolve({}, {key: text})
    for part in (key if "." in key else "model.name").split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_an_override_wins_over_the_recipe_which_wins_over_the_default() -> None:
    config = Config.resolve({"training": {"epochs": 7, "seed": 3}}, {"training.epochs": "9"})
    assert (config.training.epochs, config.training.seed, config.training.accumulation) == (9, 3, 1)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optimzer.lr", "1", "optimzer.lr: unknown key; did you mean 'optimizer.lr'"),
        ("optimizer.lrr", "1", "optimizer.lrr: unknown key; did you mean 'optimizer.lr'"),
        ("training.epochs", "two", "training.epochs: found 'two', expected integer"),
        ("training.epochs", "2.5", "training.epochs: found 2.5, expected integer"),
        ("training.epochs", "0", "training.epochs: found 0, expected greater than 0"),
        ("training.epochs", "true", "training.epochs: found True, expected integer"),
        ("optimizer.lr", "nan", "optimizer.lr: found 'nan', expected number"),
        ("optimizer.lr", ".nan", "optimizer.lr: found nan, expected "),
        ("optimizer.name", "adamm", "optimizer.name: found 'adamm', did you mean 'adam'"),
        ("features.window", "hannn", "features.window: found 'hannn', did you mean 'hann'"),
        ("checkpoint.keep_last", "1", "checkpoint.keep_last: found 1, expected greater than or equal to 2"),
        ("data.skip", "[audoi]", "data.skip.0: found 'audoi', did you mean 'audio'"),
        ("data.skip", "[audio, speaker]", "data.skip.1: found 'speaker', Valid: audio, clipping"),
        ("training.epochs", "[", "training.epochs: the value '[' cannot be read"),
        ("training.threads", "1e11", "training.threads: found 100000000000.0, expected integer"),
        (
            "training.threads",
            "100000000000",
            "training.threads: found 100000000000, expected less than or equal to 1024",
        ),
        ("features.window_size", "1e300", "features.window_size: found 1e+300, expected less than or equal to 1"),
        ("features.window_stride", "1e300", "features.window_stride: found 1e+300, expected less than or equal to 1"),
        (
            "features.sample_rate",
            f"{10**20}",
            f"features.sample_rate: found {10**20}, expected less than or equal to 10",
        ),
        ("training", "3", "training: unknown key"),
        ("schedule.epochs", "[1, x]", "schedule.epochs.1: found 'x', expected integer"),
        ("training.epochs.x", "3", "training.epochs.x: unknown key; did you mean 'training.epochs'"),
        ("model.settings", "3", "model.settings: found 3, expected dictionary"),
        ("data.parts", "3", "data.parts: found 3, expected dictionary"),
        ("data.parts.train", "clean", "data.parts.train: found 'clean', expected list"),
        ("data.parts.train", "[1]", "data.parts.train.0: found 1, expected string"),
        ("data.corpus", "3", "data.corpus: found 3, expected string"),
        ("data.corpus", "my own", "data.corpus: found 'my own', expected a name of letters, digits, hyphens and un"),
        ("data.corpora", "{}", "data.corpora: found {}, expected one at least"),
        ("data.corpora", "[an4]", "data.corpora: found ['an4'], expected dictionary"),
        ("data.corpora.a/b.kind", "an4", "data.corpora.a/b: found 'a/b', expected a name of letters, digits"),
        ("data.corpora.an4.knd", "an4", "data.corpora.an4.knd: unknown key; did you mean 'kind'"),
        ("data.corpora.an4", "3", "data.corpora.an4: found 3, expected dictionary"),
        ("data.corpora", "{1: {}, a: {}}", "data.corpora.1: found 1, expected string"),
        ("model.settings.a.b", "3", "model.settings.a: found {'b': 3}, expected a number, a text or a list"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_the_nearest_choice(key: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)):
        Config.resolve({}, {key: text})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optimizer:\n  lrr: 1\n", r"params\.yaml: optimizer\.lrr: unknown key; did you mean 'optimizer\.lr'"),
        ("optimizr:\n  lr: 1\n", r"params\.yaml: optimizr: unknown key; did you mean 'optimizer'"),
        ("training:\n  epochs: two\n", r"params\.yaml: training\.epochs: found 'two', expected integer"),
        ("training: 3\n", r"params\.yaml: training: found 3, expected "),
        ("training:\n\t- x\n", r"params\.yaml: not valid YAML"),
        ("- a\n- b\n", r"params\.yaml: expected sections such as 'model:', found list"),
        ("training:\n  epochs: 1\n  epochs: 2\n", r"params\.yaml: not valid YAML"),
        ("training:\n  seed: 2024-01-01\n", r"params\.yaml: training\.seed: found .*, a datetime\.date, expected"),
        ("training:\n  seed: 2024-13-45\n", r"params\.yaml: not valid YAML: month must be"),
        ("tracking:\n  run_name: \udce4\n", r"params\.yaml: not valid YAML: .*can't decode byte 0xe4"),
        ("model: &a\n  settings: *a\n", r"params\.yaml: model: lies within itself"),
        ("data:\n  source: !!binary aGVsbG8=\n", r"params\.yaml: data\.source: found b'hello', a builtins\.bytes"),
        ("model:\n  ? [a, b]\n  : 1\n", r"params\.yaml: model: found the key \('a', 'b'\), a builtins\.tuple"),
        ("optimizer.lr: 1\n", r"params\.yaml: the settings: found the key 'optimizer\.lr', expected none with a dot"),
        ("model: " + "[" * 5000 + "]" * 5000, r"params\.yaml: not valid YAML: maximum recursion depth"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_file(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        Config.load(path)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: cannot be read as a recipe"):
        Config.load(tmp_path)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: no recipe here"):
        Config.load(tmp_path / "params.yaml")


def test_a_recipe_comes_back_from_its_yaml(tmp_path: Path) -> None:
    config = resolve(optimizer__lr="3e-4", schedule__epochs="[2, 4]", model__settings__dropout="0.5")
    path = tmp_path / "params.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = Config.load(path)
    assert again == config
    assert again.digest == config.digest


def test_an_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.touch()
    assert Config.load(path) == Config()


def test_the_digest_follows_the_values() -> None:
    assert Config().digest == resolve(training__epochs="10").digest
    assert Config().digest != resolve(training__epochs="11").digest


def test_nothing_changes_after_it_was_read() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.training.epochs = 3  # type: ignore[misc]


def test_flattening_gives_dotted_keys_and_json_lists() -> None:
    assert dict(flatten({"a": {"b": [1, "x"], "c": None}, "d": 0.5})) == {"a.b": '[1, "x"]', "a.c": None, "d": 0.5}


def test_a_tuple_is_a_list_and_counts() -> None:
    plain = plain_settings({"betas": (0.9, (1, 2)), "inner": MappingProxyType({"sizes": [(1,)]})})
    assert plain == {"betas": [0.9, [1, 2]], "inner": {"sizes": [[1]]}}
    assert dict(flatten({"betas": (0.9, 0.98)})) == {"betas": "[0.9, 0.98]"}


class Colour(Enum):
    RED = "red"


class Name(str):
    pass


@pytest.mark.parametrize(
    ("settings", "key", "kind"),
    [
        ({"data": {"folder": Path("x")}}, "data.folder", "pathlib.PosixPath"),
        ({"colour": Colour.RED}, "colour", "test_config.Colour"),
        ({"rates": [0.1, np.float32(0.2)]}, "rates.1", "numpy.float32"),
        # These are a float and a text, but no YAML can say so.
        ({"rate": np.float64(0.1)}, "rate", "numpy.float64"),
        ({"name": Name("x")}, "name", "test_config.Name"),
        ({"a": {"b": {1, 2}}}, "a.b", "builtins.set"),
        ({"a": [{"b": b"x"}]}, "a.0.b", "builtins.bytes"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_key_and_type(settings: dict[str, Any], key: str, kind: str) -> None:
    for use in (plain_settings, lambda tree: dict(flatten(tree))):
        with pytest.raises(
            UserError, match=rf"^{re.escape(key)}: found .*, a {re.escape(kind)}, expected .*\.item\(\)"
        ):
            use(settings)


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"^layers: found the key 3, a builtins\.int, expected a text"):
        plain_settings({"layers": {3: "x"}})


def test_a_key_with_a_dot_is_refused() -> None:
    """It would be one with a key of a section, and two settings would have one digest."""
    for use in (plain_settings, lambda tree: dict(flatten(tree))):
        with pytest.raises(UserError, match=r"^inner: found the key 'a\.b', expected none with a dot"):
            use({"inner": {"a.b": 1, "a": {"b": 2}}})


def test_what_came_later_does_not_count_at_its_default() -> None:
    """A run from before goes on: its recipe lacks these keys, and its checkpoints hold this digest."""
    before = "de6ad718b7d8382f2a83f4631d038cf6186e1e0f4cf4c2ea2515916d32b6d664"
    assert settings_digest(decisive(Config().model_dump(mode="json"), is_recipe=True)) == before
    later = resolve(training__precision="bfloat16", augment__speeds="[0.9, 1]").model_dump(mode="json")
    assert decisive(later, is_recipe=True).items() >= {
        ("training.precision", "bfloat16"),
        ("augment.speeds", "[0.9, 1.0]"),
    }


def test_the_parts_of_a_corpus_count_where_there_are_any() -> None:
    parts = resolve(data__parts__train="[train-clean-5]")
    key = "data.corpora.default.parts.train"
    assert decisive(parts.model_dump(mode="json"), is_recipe=True)[key] == '["train-clean-5"]'
    assert parts.data_recipe != Config().data_recipe


def test_whether_splits_are_cut_changes_the_data_and_at_its_default_nothing() -> None:
    key = "data.corpora.default.hold_out"
    assert Config.resolve({}, {key: "true"}).data_recipe == Config().data_recipe
    assert "hold_out" not in str(Config().data_recipe)
    assert Config.resolve({}, {key: "false"}).data_recipe != Config().data_recipe


def test_the_only_corpus_can_be_named_in_short() -> None:
    an4 = {"an4": Corpus(kind="an4", source="a.tar.gz")}
    short: dict[str, object] = {"data": {"corpus": "an4", "source": "a.tar.gz"}}
    assert Config.resolve(short, {}).data.corpora == an4
    # In whichever order they are given.
    assert resolve(data__source="a.tar.gz", data__corpus="an4").data.corpora == an4
    # The source of another corpus is none of this one's, and that of this one stays.
    assert Config.resolve(short, {"data.corpus": "librispeech"}).data.corpora == {
        "librispeech": Corpus(kind="librispeech")
    }
    assert Config.resolve(short, {"data.corpus": "an4"}).data.corpora == an4
    assert Config.resolve(short, {"data.corpus": "an4"}).data.corpus == "an4"


def test_several_corpora_have_names_and_an_order() -> None:
    recipe = {"data": {"corpora": {"mine": {"kind": "folder", "source": "x"}, "an4": None}}}
    config = Config.resolve(recipe, {"data.corpora.an4.source": "a.tar.gz", "data.corpora.b.kind": "an4"})
    assert list(config.data.corpora.items()) == [
        ("an4", Corpus(kind="an4", source="a.tar.gz")),
        ("b", Corpus(kind="an4")),
        ("mine", Corpus(kind="folder", source="x")),
    ]
    assert config.data.corpus == "an4+b+mine"
    assert Config.resolve(recipe, {"data.corpus": "default"}).data.corpora == {"default": Corpus()}
    with pytest.raises(UserError, match=r"^data\.source: there is more than one corpus; expected data\.corpora\.NAME"):
        Config.resolve(recipe, {"data.source": "x"})
    with pytest.raises(UserError, match=r"^p\.yaml: data\.source: stands beside data\.corpora; leave one"):
        Config.resolve({"data": {**recipe["data"], "source": "x"}}, {}, origin="p.yaml")


def test_where_checkpoints_are_averaged_it_counts_which_there_are() -> None:
    settings = resolve(training__average="best").model_dump(mode="json")
    assert decisive(settings, is_recipe=True)["checkpoint.keep_best"] == 1


# What a run may go on with otherwise and still end in the same bits, as far as it has come.
FREE_KEYS = {
    *(
        "data.corpora.default.source",
        "data.corpora.default.hold_out",
        "data.workers",
        "data.processes",
        "data.cluster",
        "training.epochs",
        "tracking.experiment",
        "tracking.run_name",
    ),
    "tracking.registered",
    *("checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.every_epochs", "checkpoint.keep_last"),
    *("checkpoint.keep_best", "checkpoint.keep_every_steps"),
    *("decoding.beam", "decoding.language_model", "decoding.language_model_unit", "decoding.language_model_weight"),
    *("decoding.length_reward", "decoding.length_normalisation", "decoding.attention_limit", "decoding.end_threshold"),
    *("decoding.ctc_weight", "augment.noise_corpus", "augment.impulse_responses"),
}


def test_every_key_decides_the_bits_but_those_that_only_decide_the_way() -> None:
    settings = Config().model_dump(mode="json")
    found = decisive(settings, is_recipe=True)
    at_default = {key for key in Config().flat() if any(f"{key}.".startswith(f"{name}.") for name in LATER)}
    assert Config().flat().keys() - found.keys() == FREE_KEYS | at_default
    assert {"training.seed", "training.threads", "training.device", "data.corpora.default.kind"} <= found.keys()
    # The prefix of a name is not the name.
    assert decisive({"training": {"epochs_of_rest": 1}, "checkpoints": 2}, is_recipe=True) == {
        "training.epochs_of_rest": 1,
        "checkpoints": 2,
    }


def test_settings_of_the_users_own_are_all_decisive() -> None:
    own = {"training": {"epochs": 3}, "checkpoint": "base.pt", "tracking": {"x": 1}, "size": [1]}
    assert decisive(own, is_recipe=False) == {
        "training.epochs": 3,
        "checkpoint": "base.pt",
        "tracking.x": 1,
        "size": "[1]",
    }


def test_settings_come_back_from_their_yaml() -> None:
    settings = {
        "next\x85line": "\x85",
        "b": {"lr": 3e-4, "none": None, "on": True, "list": [1, 2.5, "x\x85"]},
        "a": "naïve: text",
        "no": "no",
    }
    text = yaml_text(settings)
    again = YAML(typ="safe").load(text)
    assert again == settings
    assert list(again) == list(settings)
    assert settings_digest(again) == settings_digest(settings)
    assert yaml_text(again) == text


@given(text=st.text(st.sampled_from("ab.:#'\"\\- \n\t\x85é"), max_size=250), depth=st.integers(0, 6))
@example(text=f"{'x' * 70}.  Behind two spaces, where a line of 80 ends.", depth=0)
@example(text="a\\ b " * 30, depth=1)
def test_a_long_text_comes_back_from_its_yaml(text: str, depth: int) -> None:
    settings: dict[str, object] = {"text": text, text.replace(".", "") or "none": [text]}
    for level in range(depth):
        settings = {f"level {level}": settings}
    assert YAML(typ="safe").load(yaml_text(settings)) == settings


def test_the_digest_does_not_follow_the_order_of_keys() -> None:
    assert settings_digest({"a": 1, "b": {"c": 2, "d": 3}}) == settings_digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert settings_digest({"a": 1}) != settings_digest({"a": 1.0})


RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_along_can_be_trained(path: Path) -> None:
    assert check_recipe(Config.load(path))
