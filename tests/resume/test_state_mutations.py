"""Every item of the state matters: a trainer that forgets any one of them when it loads becomes another one.

One item at a time is replaced by what a trainer that was just made has in its place, as a forgetful
``load_state_dict`` would leave it. Each must be noticed twice: in the state right after loading, and, with that check
left out, in the state at the end. An item that no training depends on would be ballast, or a run that tests too little.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rich_trainer import Draws, LossGuidedRate, maker
from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.testing import (
    MakeTrainer,
    Training,
    assert_exact_resume,
    resume_differences,
    thawed_state,
    undisturbed_training,
)
from sonosco_mlflow.training import precision
from sonosco_mlflow.training.callbacks import (
    Callback,
    EarlyStopping,
    ExponentialAverage,
    History,
    LinearWarmUp,
    ModelCheckpoint,
    PlateauLearningRateReduction,
)
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import model_loss

Keys = tuple[str | int, ...]
ABSENT = object()

# What a resume may lose without any consequence, and why.
WITHOUT_EFFECT = {
    "optimizer/groups/0/capturable": "torch refuses to switch it on without CUDA",
    "optimizer/groups/0/differentiable": "torch refuses to switch it on for parameters that are leaves",
    "trainer/generators/python/version": "a constant of Python's",
}
# What no later step depends on: to lose it changes the end only where no step comes any more.
ONLY_AT_THE_END = {
    "optimizer/groups/0/lr": "each step computes it anew",
    "trainer/stop_reason": "where there is one, no step comes any more",
    **({"trainer/generators/cuda": "each micro-step seeds it anew"} if torch.cuda.is_available() else {}),
}


def steep_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Gradients that overflow float16 at the first scale."""
    return 1e4 * model_loss(model, batch)


class ChangesOptions(Callback):
    """A user's callback that turns every option of the optimizer that it can, once, in the middle of the training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step == self.step:
            trainer.optimizer.param_groups[0].update(
                betas=(0.8, 0.95),
                eps=1e-6,
                weight_decay=0.1,
                decoupled_weight_decay=False,
                amsgrad=False,
                maximize=True,
                foreach=False,
                fused=False,
            )


class Freezes(Callback):
    """A user's callback that trains a part of the model no further."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step == self.step:
            trainer.model.get_parameter("inner.bias").requires_grad_(False)


def stopping_trainer(manifest: Manifest) -> MakeTrainer:
    """Stops early, in the middle of its last epoch but one, after the options and the learning rate were changed."""

    def callbacks(model: nn.Module) -> list[Callback]:
        return [
            LinearWarmUp(3),
            PlateauLearningRateReduction(patience=2, factor=0.5, monitor="val_word_error_rate"),
            ExponentialAverage(0.6),
            EarlyStopping(patience=3, monitor="val_loss"),
            History(),
            Draws(),
            LossGuidedRate(),
            ChangesOptions(step=2),
            Freezes(step=2),
        ]

    return maker(
        manifest,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, amsgrad=True),
        callbacks=callbacks,
        epochs=9,
    )


# ------------------------------------------------------------------ the items of a state


@dataclass(frozen=True)
class Item:
    """Leaves of the state that are forgotten together."""

    name: str
    paths: tuple[Keys, ...]


def leaves(state: Any, fresh: Any, path: Keys = ()) -> Iterator[Keys]:
    """Yield the paths of whatever a new trainer has too, down to single values, and of the rest as a whole."""
    if state in ({}, []) and not isinstance(state, Tensor):
        return
    if isinstance(state, dict) and isinstance(fresh, dict):
        for key, child in state.items():
            yield from leaves(child, fresh.get(key, ABSENT), (*path, key))
    elif isinstance(state, list) and any(isinstance(child, dict) for child in state):
        for position, child in enumerate(state):
            yield from leaves(child, fresh[position], (*path, position))
    else:
        yield path


def items(training: Training, fresh: Mapping[str, Any]) -> list[Item]:
    """Return all items that any state of ``training`` has; an optimizer's moments of one kind are one item."""
    paths: dict[str, set[Keys]] = {}
    for moment in training.moments:
        state = thawed_state(moment.state)
        for path in leaves(state, fresh):
            if path[:2] == ("optimizer", "moments"):
                for kind in at(state, path):
                    paths.setdefault(f"optimizer/moments/*/{kind}", set()).add((*path, kind))
            else:
                paths.setdefault("/".join(map(str, path)), set()).add(path)
    return [Item(name, tuple(sorted(found, key=str))) for name, found in sorted(paths.items())]


def at(tree: Any, path: Keys) -> Any:
    for key in path:
        if not isinstance(tree, dict | list) or (isinstance(tree, dict) and key not in tree):
            return ABSENT
        tree = tree[key]
    return tree


def without(state: Mapping[str, Any], fresh: Mapping[str, Any], item: Item) -> dict[str, Any]:
    """Return ``state`` with ``item`` as a new trainer has it."""
    forgetful = copy.deepcopy(dict(state))
    for path in item.paths:
        node, old, new = at(forgetful, path[:-1]), at(state, path), at(fresh, path)
        if old is ABSENT:
            continue
        if new is not ABSENT:
            node[path[-1]] = new
        elif isinstance(old, Tensor):
            # Gradients and moments that a new trainer does not have yet begin as zeros.
            node[path[-1]] = torch.zeros_like(old)
        else:
            del node[path[-1]]
    return forgetful


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[Item], None]:
    """Make every trainer forget an item whenever it loads a state."""
    remember = ModelTrainer.load_state_dict

    def forget(item: Item) -> None:
        def load_state_dict(self: ModelTrainer, state: Mapping[str, Any]) -> None:
            remember(self, without(state, copy.deepcopy(self.state_dict()), item))

        monkeypatch.setattr(ModelTrainer, "load_state_dict", load_state_dict)

    return forget


@dataclass
class Noticed:
    """Whether a lost item was noticed right after loading, in the end state, and after at least one more step."""

    loaded: bool = False
    end: bool = False
    end_after_a_step: bool = False


def noticed(make_trainer: MakeTrainer, training: Training) -> Noticed:
    result = Noticed()
    # The last moments first: little is left to train from there.
    for moment in reversed(training.moments):
        differences = resume_differences(make_trainer, training, moment)
        result.loaded |= bool(differences.loaded)
        result.end |= bool(differences.end)
        result.end_after_a_step |= bool(differences.end) and moment is not training.moments[-1]
        if result == Noticed(True, True, True):
            break
    return result


# ------------------------------------------------------------------ the proof


def test_every_item_of_the_state_matters(tone_manifest: Manifest, forget: Callable[[Item], None]) -> None:
    make_trainer = stopping_trainer(tone_manifest)
    training = undisturbed_training(make_trainer, seed=1)
    results = {}
    for item in items(training, make_trainer().state_dict()):
        forget(item)
        results[item.name] = noticed(make_trainer, training)

    print(f"{len(results)} items, of which {sum(result.end for result in results.values())} change the end")
    assert {name for name, result in results.items() if not result.loaded} == WITHOUT_EFFECT.keys()
    assert {name for name, result in results.items() if not result.end} == WITHOUT_EFFECT.keys()
    late = {name for name, result in results.items() if not result.end_after_a_step}
    assert late == WITHOUT_EFFECT.keys() | ONLY_AT_THE_END.keys()


def test_what_a_checkpoint_says_of_the_others_matters(
    tone_manifest: Manifest, forget: Callable[[Item], None], tmp_path: Path
) -> None:
    """Apart from the rest, because each training writes checkpoints."""

    def callbacks(model: nn.Module) -> list[Callback]:
        return [ModelCheckpoint(tmp_path, every_steps=1)]

    make_trainer = maker(tone_manifest, callbacks=callbacks, validate_every_steps=1)
    training = undisturbed_training(make_trainer, seed=1)
    state: Any = thawed_state(training.end)
    for key in state["trainer"]["callbacks"]["ModelCheckpoint"]:
        forget(Item(key, (("trainer", "callbacks", "ModelCheckpoint", key),)))
        assert noticed(make_trainer, training) == Noticed(True, True, True), key


def test_what_a_scale_of_gradients_knows_matters(
    tone_manifest: Manifest, forget: Callable[[Item], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart from the rest, because it trains in float16; the scale falls at first, and later rises again."""
    monkeypatch.setattr(precision, "has_units", lambda wanted, device: True)
    plain = maker(tone_manifest, epochs=8, precision="float16", loss=lambda model: steep_loss, accumulation=1)

    def make_trainer() -> ModelTrainer:
        trainer = plain()
        trainer.precision._scaler.set_growth_interval(3)
        return trainer

    training = undisturbed_training(make_trainer, seed=1)
    scales = {float(at(thawed_state(moment.state), ("trainer", "precision", "scale"))) for moment in training.moments}
    assert min(scales) < 65536.0
    state: Any = thawed_state(training.end)
    assert state["trainer"]["precision"].keys() == {"scale", "steps"}
    for key in state["trainer"]["precision"]:
        forget(Item(key, (("trainer", "precision", key),)))
        assert noticed(make_trainer, training) == Noticed(True, True, True), key


def test_the_run_has_what_a_resume_could_lose(tone_manifest: Manifest) -> None:
    make_trainer = stopping_trainer(tone_manifest)
    training = undisturbed_training(make_trainer, seed=1)
    found = {item.name for item in items(training, make_trainer().state_dict())}
    kinds = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert {f"optimizer/moments/*/{kind}" for kind in kinds} <= found
    assert {f"trainer/gradients/{name}" for name, _ in make_trainer().model.named_parameters()} <= found
    assert {f"model/{name}" for name in make_trainer().model.state_dict()} <= found
    trainer = {name.split("/")[1] for name in found if name.startswith("trainer/")}
    # What has no state here has a test of its own above.
    assert trainer == make_trainer().state_dict()["trainer"].keys() - {"precision"}  # type: ignore[attr-defined]


def test_the_public_proof_names_what_was_forgotten(tone_manifest: Manifest, forget: Callable[[Item], None]) -> None:
    forget(Item("best", (("trainer", "callbacks", "EarlyStopping", "best"),)))
    expected = r"right after loading:\n  trainer/callbacks/EarlyStopping/best: \d\.\d+ and inf"
    with pytest.raises(AssertionError, match=expected):
        assert_exact_resume(stopping_trainer(tone_manifest))


@pytest.mark.slow
def test_the_public_proof_goes_red_for_every_item(tone_manifest: Manifest, forget: Callable[[Item], None]) -> None:
    make_trainer = stopping_trainer(tone_manifest)
    training = undisturbed_training(make_trainer, seed=1)
    for item in items(training, make_trainer().state_dict()):
        forget(item)
        if item.name in WITHOUT_EFFECT:
            assert_exact_resume(make_trainer)
            continue
        with pytest.raises(AssertionError, match="continued from micro-step"):
            assert_exact_resume(make_trainer)
