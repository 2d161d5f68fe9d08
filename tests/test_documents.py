"""What the documents say of keys, settings and files is what the code has."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML

from rich_trainer import maker
from sonosco_mlflow.config import Config
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.models import MODELS, model_settings
from sonosco_mlflow.sections import Corpus
from sonosco_mlflow.testing import assert_exact_resume
from sonosco_mlflow.training import callbacks
from sonosco_mlflow.training.callbacks import History

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def cell(value: object) -> str:
    """Return a value as a table of the documents has it."""
    match value:
        case None | [] | {}:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return repr(value) if "e" not in repr(value) else f"{value:.10f}".rstrip("0")
        case _:
            return str(value)


def rows(text: str, columns: int) -> dict[str, tuple[str, ...]]:
    """Return the first columns of each row of the tables whose first one is a name in code style."""
    found: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        name, *others = (part.strip() for part in line.strip("|").split("|"))
        key = re.fullmatch(r"`([\w.]+)`", name)
        if line.startswith("|") and key is not None and len(others) == columns:
            assert key[1] not in found, key[1]
            found[key[1]] = tuple(others[:-1])
    return found


def recipe_keys() -> Iterator[tuple[str, str, str]]:
    """Every key, its default, and what the project's own recipe has, where that is another."""
    written = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, keys in Config().model_dump().items():
        for key, default in keys.items():
            own = written.get(section, {}).get(key, default)
            if key == "corpora":
                default, own = "default", "+".join(own)
            yield f"{section}.{key}", cell(default), "" if own == default else cell(own)
    for key, default in Corpus().model_dump().items():
        yield f"data.corpora.NAME.{key}", "NAME" if key == "kind" else cell(default), ""


def test_every_key_of_a_recipe_is_explained_with_its_default() -> None:
    text = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8").split("## Settings of the models")[0]
    assert rows(text, 3) == {key: (default, own) for key, default, own in recipe_keys()}


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_of_a_model_is_explained_with_its_presets(model: str) -> None:
    text = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    table = text.split(f"| `{model}` | `small` | `paper` | |\n")[1].split("\n\n")[0]
    small, paper = (model_settings(model, preset, {}) for preset in ("small", "paper"))
    assert rows(table, 3) == {key: (cell(small[key]), cell(paper[key])) for key in small}


def test_the_decoding_document_has_every_key_of_decoding() -> None:
    text = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    assert rows(text, 2).keys() == Config().decoding.model_dump().keys()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_links_to_is_there(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        path = (document.parent / name) if name else document
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_the_documented_callback_has_all_its_state(tone_manifest: Manifest) -> None:
    text = (ROOT / "docs" / "callbacks.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    module = ModuleType("documented_callback")
    sys.modules[module.__name__] = module
    try:
        exec(program, module.__dict__)
        make_trainer = maker(
            tone_manifest, callbacks=lambda model: [History(), module.BestSoFar("val_word_error_rate")], epochs=3
        )
        trainer = make_trainer()
        trainer.start_training()
        (history,) = (callback for callback in trainer.callbacks if isinstance(callback, History))
        found, best = (history.curve(name)[1] for name in ("val_word_error_rate", "best_val_word_error_rate"))
        assert best == [min(found[: index + 1]) for index in range(len(found))]
        assert_exact_resume(make_trainer)
    finally:
        del sys.modules[module.__name__]


def test_every_event_and_every_callback_is_documented() -> None:
    text = (ROOT / "docs" / "callbacks.md").read_text(encoding="utf-8")
    events = [name for name, value in vars(callbacks.Callback).items() if callable(value) and name[0] != "_"]
    assert "on_safe_point" in events
    for name in (*events, *callbacks.__all__):
        assert re.search(rf"\b{name}\b", text), name
