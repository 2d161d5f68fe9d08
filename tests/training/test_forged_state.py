"""A checkpoint whose digests are right and whose state is none of the trainer's is refused by what is wrong with it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from experiments import toy_trainer
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import checkpoints_in
from sonosco_mlflow.serialization.serializer import Deserializer
from sonosco_mlflow.training.callbacks import ModelCheckpoint
from toy import tone_loader


@pytest.fixture(scope="module")
def whole(tone_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a trainer."""
    folder = tmp_path_factory.mktemp("forged")
    trainer = toy_trainer(tone_manifest, epochs=1)
    checkpoint = trainer.callbacks[-1]
    assert isinstance(checkpoint, ModelCheckpoint)
    checkpoint.directory = folder
    trainer.start_training()
    return checkpoints_in(folder)[-1]


@pytest.fixture
def forged(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def reseal(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def load(checkpoint: Path, manifest: Manifest) -> Any:
    loaders = {"train_loader": tone_loader(manifest), "val_loader": tone_loader(manifest, seed=None)}
    return Deserializer().deserialize(checkpoint, **loaders)


def strides(*steps: int) -> Callable[[Any], object]:
    return lambda state: state["trainer"]["parameters"]["strides"].update({"inner.weight": list(steps)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        *(
            (strides(*steps), r"trainer/parameters/strides/inner\.weight: found .*, which does not lay out")
            for steps in ((10**11, 1), (0, 0), (1, 1), (9, 1), (-8, 1), (1,), (8, 1, 1))
        ),
        (lambda state: state["trainer"].pop("progress"), "the state lacks 'progress'"),
        (lambda state: state.pop("model"), "the state lacks 'model'"),
        (lambda state: state["trainer"]["progress"].update(step="x"), "trainer/progress/step is 'x', expected a whole"),
        (lambda state: state["trainer"]["progress"].update(epoch=-1), "trainer/progress/epoch is -1, expected a whole"),
        (lambda state: state["trainer"]["progress"].update(other=1), "does not fit .* 'other'"),
        (lambda state: state["optimizer"].update(groups=[]), "optimizer/groups: found 0, expected the optimizer's 1"),
    ],
)
def test_a_state_that_is_none_of_the_trainers(
    change: Callable[[Any], object], match: str, forged: Path, tone_manifest: Manifest
) -> None:
    state = json.loads((forged / "state.json").read_text())
    change(state)
    reseal(forged, "state.json", json.dumps(state).encode())
    with pytest.raises(UserError, match=rf"{forged.name}: .*{match}"):
        load(forged, tone_manifest)


def test_strides_that_the_parameter_can_have(forged: Path, tone_manifest: Manifest) -> None:
    state = json.loads((forged / "state.json").read_text())
    strides(1, 16)(state)
    reseal(forged, "state.json", json.dumps(state).encode())
    assert load(forged, tone_manifest).model.inner.weight.stride() == (1, 16)


def test_weights_of_another_shape(forged: Path, tone_manifest: Manifest) -> None:
    weights = safetensors.torch.load_file(forged / "model.safetensors")
    weights["inner.weight"] = weights["inner.weight"][:2].clone()
    reseal(forged, "model.safetensors", safetensors.torch.save(weights))
    with pytest.raises(UserError, match=rf"(?s){forged.name}: the state does not fit .*inner\.weight"):
        load(forged, tone_manifest)
