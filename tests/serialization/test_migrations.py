"""Checkpoints of older versions: each is kept here as that version wrote it, and must load for ever.

Each was written by the last version of its schema, by what is :func:`write_fixture` here now, in the middle of an
accumulation. When the schema changes, write a fixture with the version that goes, add it to
``FIXTURES`` with its digests (``sha256sum schema-*/*/*``), and never touch it again.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.determinism import preserved_generators
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.metrics import character_error_rate, word_error_rate
from sonosco_mlflow.models import build_model
from sonosco_mlflow.serialization.checkpoint import (
    BrokenCheckpointError,
    checkpoints_in,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from sonosco_mlflow.serialization.migrations import MIGRATIONS, SCHEMA
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.serialization.state import Tree, split_tree, tensor_bytes
from sonosco_mlflow.training.callbacks import (
    Callback,
    EarlyStopping,
    EpochTimeEstimate,
    History,
    LayerGradientNorms,
    LinearWarmUp,
    ModelCheckpoint,
    PlateauLearningRateReduction,
    SoftWindow,
    TextComparison,
)
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import TOKENIZER, tone_corpus, tone_loader, tone_texts

HERE = Path(__file__).parent
FIXTURES: dict[int, dict[str, str]] = {
    1: {
        "manifest.json": "99c4f23260f04cb73403cb75f5d094a45d145f2405b88830dfa432d1096b16ca",
        "model.safetensors": "4cf32aa19cb196972cb5178b770c73f7311e3e0e3cd015fd7601e29e962aa1d4",
        "objects.json": "25b1206c71edbfe321e01d8b605aadf3f88a33ba52f1bbfa736e89f61fb4d4ef",
        "optimizer.safetensors": "1551737942257c12c589f6497f95f1f682a603e9551f434f1d6666d3d781cf30",
        "state.json": "382a1efe6b55dfe911c1675ac96d9c3d006f634c5369b5d674293e7763a9ce54",
        "trainer.safetensors": "a7c38d9d49e1516ae2153a1c0b7f50c457da5b68d5e42780b645039aff713f74",
    },
    2: {
        "manifest.json": "ea913d7a6f920549f98e541c1366aa260e34c0fa23b29f04715f46f9c14b1093",
        "model.safetensors": "2e4739684e8338d8ea4f33fddc19f05adedefeb0cc89b6e8d621dc28957a20be",
        "objects.json": "59712b7950c48785683b0ea79f107ac27b199f99a85890237d368f6fde1858e7",
        "optimizer.safetensors": "f92ae1088bfe3aab8ad226309740078448543a7020900917b95e2bab77c95d8e",
        "state.json": "86fc7d5aab7f36cf1da9f3a0831c330cde317e78c54eaaeca0a7fcb363a6ecfa",
        "trainer.safetensors": "331502b350f32f762f97b56b9d38207eea6f6714cc31e0f10af19a7e8213bba2",
    },
}


class Stop(Callback):
    """Interrupts at a micro-step."""

    def __init__(self, micro_step: int) -> None:
        self.micro_step = micro_step

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        if trainer.progress.micro_step == self.micro_step:
            raise KeyboardInterrupt


def loaders(manifest: Manifest) -> dict[str, Any]:
    return {
        "train_loader": tone_loader(manifest[:8], frames_per_batch=60),
        "val_loader": tone_loader(manifest[8:], seed=None),
    }


def write_fixture(folder: Path, manifest: Manifest) -> Path:
    """Write a checkpoint of the current schema as the fixtures are: step 4, micro-step 12, one batch into step 5."""
    torch.manual_seed(0)
    settings = {"channels": [2], "blocks": [1], "decoder_size": 8, "kernel": 3, "strides": [2]}
    model = build_model("tds", "small", n_mels=8, vocabulary_size=TOKENIZER.vocabulary_size, settings=settings)
    trainer = ModelTrainer(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        metrics=[word_error_rate, character_error_rate],
        callbacks=[
            History(),
            TextComparison(2),
            LinearWarmUp(3),
            PlateauLearningRateReduction(1, 0.5, 1e-4),
            SoftWindow(1),
            EarlyStopping(5),
            LayerGradientNorms(3),
            EpochTimeEstimate(),
            ModelCheckpoint(folder, every_steps=2, keep_best=1),
        ],
        epochs=4,
        seed=3,
        accumulation=3,
        gradient_clip=1.0,
        validate_every_steps=2,
        **loaders(manifest),
    )
    trainer.attach(Stop(micro_step=12))
    with pytest.raises(KeyboardInterrupt):
        trainer.start_training()
    return checkpoints_in(folder)[-1]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The recordings that the fixtures were trained on."""
    return tone_corpus(tmp_path_factory.mktemp("tones"), tone_texts(12))


def fixture_of(schema: int) -> Path:
    (path,) = (HERE / f"schema-{schema}").iterdir()
    return path


def load(path: Path, manifest: Manifest) -> ModelTrainer:
    trainer = Deserializer().deserialize(path, **loaders(manifest))
    assert isinstance(trainer, ModelTrainer)
    return trainer


def tensors_of(tree: Tree) -> bytes:
    return tensor_bytes(split_tree(tree)[1])


def finish(trainer: ModelTrainer, folder: Path) -> dict[str, bytes]:
    """Train to the end, saving into ``folder``, and return the bytes of all that is saved there."""
    keeper = trainer.callbacks[-1]
    assert isinstance(keeper, ModelCheckpoint)
    keeper.directory = folder
    with preserved_generators():
        trainer.continue_training()
    assert (trainer.progress.epoch, trainer.progress.batch) == (4, 0)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob("*/*"))}


# ------------------------------------------------------------------ the rules


def test_every_older_schema_has_its_migration_and_its_fixture() -> None:
    older = list(range(1, SCHEMA))
    assert sorted(MIGRATIONS) == older
    assert sorted(FIXTURES) == older
    assert sorted(path.name for path in HERE.glob("schema-*")) == [f"schema-{schema}" for schema in older]


def test_a_schema_of_the_future_is_refused_by_its_number(tmp_path: Path) -> None:
    path = Serializer().serialize({"value": 1}, tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema"] == SCHEMA
    manifest["schema"] = SCHEMA + 1
    (path / "manifest.json").write_text(json.dumps(manifest))
    expected = f"schema {SCHEMA + 1}, this version reads 1 to {SCHEMA}; use the version that wrote it"
    for read in (read_checkpoint, verify_checkpoint):
        with pytest.raises(UserError, match=expected) as refusal:
            read(path)
        # Of what is broken, the one before would be taken in its place.
        assert not isinstance(refusal.value, BrokenCheckpointError)


# ------------------------------------------------------------------ what every fixture must do


@pytest.mark.parametrize("schema", FIXTURES)
def test_nobody_has_changed_the_fixture(schema: int) -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in fixture_of(schema).iterdir()}
    assert found == FIXTURES[schema], "a checkpoint that stands here is what an older version wrote: put it back"
    assert json.loads((fixture_of(schema) / "manifest.json").read_text())["schema"] == schema
    verify_checkpoint(fixture_of(schema))


@pytest.mark.parametrize("schema", FIXTURES)
def test_it_loads_with_all_of_its_state(schema: int, manifest: Manifest) -> None:
    path = fixture_of(schema)
    with preserved_generators():
        trainer = load(path, manifest)
        state: Any = trainer.state_dict()
    assert vars(trainer.progress) == {
        **{"epoch": 2, "batch": 2, "micro_step": 12, "step": 4},
        **{"utterances": 19, "frames": 592},
    }
    assert trainer.batches_into_step == 2
    digests = json.loads((path / "manifest.json").read_text())["files"]
    for part in ("model", "optimizer"):
        name = f"{part}.safetensors"
        assert hashlib.sha256(tensors_of(state[part])).hexdigest() == digests[name]["sha256"]
    stored = safetensors.torch.load((path / "trainer.safetensors").read_bytes())
    loaded = split_tree(state["trainer"])[1]
    written = json.loads((path / "state.json").read_text())["trainer"]
    assert tensor_bytes({name: loaded[name] for name in stored}) == tensor_bytes(stored)
    # What has become a tensor since.
    if schema == 1:
        assert loaded["generators/python/internal"].tolist() == written["generators"]["python"]["internal"]
    assert any(name.startswith("gradients/") for name in loaded)
    for name in ("stop_reason", "window_loss", "progress"):
        assert state["trainer"][name] == written[name]
    kept = state["trainer"]["callbacks"]["ModelCheckpoint"]
    assert (kept["kept"], sorted(kept["scores"])) == ([2, 4], [2, 4])
    assert state["trainer"]["callbacks"]["EarlyStopping"] == written["callbacks"]["EarlyStopping"]


@pytest.mark.parametrize("schema", FIXTURES)
def test_it_goes_on_to_the_end_the_same_way_each_time(schema: int, manifest: Manifest, tmp_path: Path) -> None:
    ends = [finish(load(fixture_of(schema), manifest), tmp_path / str(attempt)) for attempt in (1, 2)]
    assert ends[0] == ends[1]
    assert {json.loads(content)["schema"] for name, content in ends[0].items() if name.endswith("manifest.json")} == {
        SCHEMA
    }


@pytest.mark.parametrize("schema", FIXTURES)
def test_written_again_it_is_of_the_current_schema_and_has_the_same_state(
    schema: int, manifest: Manifest, tmp_path: Path
) -> None:
    with preserved_generators():
        trainer = load(fixture_of(schema), manifest)
        snapshot = Serializer().snapshot(trainer, trainer.progress.step, batches=trainer.batches_into_step)
        again = load(write_checkpoint(tmp_path, snapshot), manifest)
        expected, found = (split_tree(one.state_dict()) for one in (trainer, again))
    assert found[0] == expected[0]
    assert tensor_bytes(found[1]) == tensor_bytes(expected[1])


# ------------------------------------------------------------------ the steps


def test_from_1_a_checkpoint_callback_no_longer_says_where_it_writes() -> None:
    objects = read_checkpoint(fixture_of(1)).objects
    (callback,) = [
        document for document in objects["parameters"]["callbacks"] if document["$object"].endswith(":ModelCheckpoint")
    ]
    assert callback["parameters"] == {
        **{"every_minutes": None, "every_steps": 2, "keep_best": 1, "keep_last": 2, "monitor": "val_loss"}
    }
    assert "runs/toy" in (fixture_of(1) / "objects.json").read_text()
    trainer = read_checkpoint(fixture_of(1)).state["trainer"]
    assert "dropped" not in trainer["callbacks"]["ModelCheckpoint"]
    assert trainer["validation"] is None
    assert isinstance(trainer["generators"]["python"]["internal"], Tensor)


def test_from_2_what_was_done_to_the_parameters_is_not_known_and_stays(manifest: Manifest) -> None:
    checkpoint = read_checkpoint(fixture_of(2))
    assert checkpoint.state["trainer"]["parameters"] is None
    with preserved_generators():
        trainer = Deserializer().build(checkpoint.objects, **loaders(manifest))
        first = next(trainer.model.parameters()).requires_grad_(False)
        trainer.load_state_dict(checkpoint.state)
    assert not first.requires_grad


def test_from_2_curves_are_tensors_of_the_same_values() -> None:
    written = json.loads((fixture_of(2) / "state.json").read_text())["trainer"]["callbacks"]["History"]
    curves = read_checkpoint(fixture_of(2)).state["trainer"]["callbacks"]["History"]
    assert len(curves) > 5
    assert {name: {key: part.tolist() for key, part in curve.items()} for name, curve in curves.items()} == written
    assert {(curve["steps"].dtype, curve["values"].dtype) for curve in curves.values()} == {
        (torch.int64, torch.float64)
    }


def test_from_2_each_history_is_changed_and_nothing_that_is_called_alike() -> None:
    curves = {"loss": {"steps": [1], "values": [math.inf]}}
    callbacks = {"History": curves, "History-2": curves, "HistoryOfMine": curves}
    state = {"trainer": {"progress": {}, "callbacks": callbacks}, "optimizer": {"moments": {}, "groups": []}}
    changed = MIGRATIONS[2]({}, state)[1]
    assert changed["optimizer"] == {"moments": {}, "groups": [], "own": {}}
    found = changed["trainer"]["callbacks"]
    assert found["HistoryOfMine"] == curves
    for name in ("History", "History-2"):
        assert found[name]["loss"]["values"].tolist() == [math.inf]
    assert state["trainer"]["callbacks"]["History"] == curves, "what was read is not changed"


def test_from_2_a_board_no_longer_says_where_it_writes() -> None:
    name = "sonosco_mlflow.tracking.tensorboard:TensorBoard"
    board = {"$object": name, "parameters": {"directory": {"$path": "runs/board"}}}
    objects, _ = MIGRATIONS[2]({"$object": "somewhere:Thing", "parameters": {"callbacks": [board]}}, {})
    assert objects["parameters"]["callbacks"] == [{"$object": name, "parameters": {}}]


@pytest.mark.parametrize("schema", MIGRATIONS)
def test_what_is_no_trainer_stays_as_it_is(schema: int) -> None:
    objects = {"$object": "somewhere:Thing", "parameters": {"directory": "here", "callbacks": [{"directory": 1}]}}
    state = {"trainer": {"steps": 1}, "model": {"weight": 2}}
    assert MIGRATIONS[schema](objects, state) == (objects, state)


# ------------------------------------------------------------------ the recipe


def test_the_recipe_of_the_fixtures_goes_on_as_if_it_had_never_stopped(manifest: Manifest, tmp_path: Path) -> None:
    with preserved_generators():
        path = write_fixture(tmp_path / "run", manifest)
    assert path.name == "step-00000004.0002"
    shutil.copytree(path, tmp_path / "copy" / path.name)
    assert finish(load(path, manifest), tmp_path / "run") == finish(
        load(tmp_path / "copy" / path.name, manifest), tmp_path / "copy"
    )
