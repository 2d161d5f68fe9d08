import warnings

import pytest
import torch
from torch import nn

from sonosco_mlflow.canary import canary
from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.origin import data_digests
from sonosco_mlflow.training import precision
from sonosco_mlflow.training.callbacks import Callback, History
from sonosco_mlflow.training.precision import Precision
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import model_loss
from toy import ToyModel, tone_loader

CPU = torch.device("cpu")


@pytest.fixture
def with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is said to have units for all of them; it computes with or without."""
    monkeypatch.setattr(precision, "has_units", lambda wanted, device: True)


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})


class Seen(Callback):
    """Notes the types in which the model computes, and the gradients of each step."""

    def __init__(self) -> None:
        self.types: set[tuple[bool, torch.dtype]] = set()
        self.gradients: list[torch.Tensor] = []

    def on_train_begin(self, trainer: ModelTrainer) -> None:
        trainer.model.get_submodule("outer").register_forward_hook(self._note)

    def on_gradients(self, trainer: ModelTrainer) -> None:
        gradient = trainer.model.get_parameter("outer.weight").grad
        assert gradient is not None
        self.gradients.append(gradient.clone())

    def _note(self, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        self.types.add((module.training, output.dtype))


def trained(manifest: Manifest, wanted: str, factor: float = 1.0, epochs: int = 1) -> tuple[ModelTrainer, Seen]:
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return factor * model_loss(model, batch)

    torch.manual_seed(0)
    seen = Seen()
    trainer = ModelTrainer(
        ToyModel(),
        loss=loss,
        train_loader=tone_loader(manifest[:8]),
        val_loader=tone_loader(manifest[8:10], seed=None),
        callbacks=[seen, History()],
        precision=wanted,
        epochs=epochs,
        accumulation=2,
    )
    trainer.start_training()
    return trainer, seen


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_training_computes_in_it_and_evaluation_in_float32(
    wanted: str, tone_manifest: Manifest, with_units: None
) -> None:
    trainer, seen = trained(tone_manifest, wanted)
    assert seen.types == {(True, precision.DTYPES[wanted]), (False, torch.float32)}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in seen.gradients} == {torch.float32}
    assert trainer.precision.used == wanted


@pytest.mark.parametrize(("wanted", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_gradients_are_those_of_float32_rounded(
    wanted: str, tolerance: float, tone_manifest: Manifest, with_units: None
) -> None:
    expected, found = (trained(tone_manifest, name)[1].gradients[0] for name in ("float32", wanted))
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < tolerance * expected.norm()


def test_small_gradients_survive_float16_by_the_scale(tone_manifest: Manifest, with_units: None) -> None:
    expected, found = (trained(tone_manifest, name, 1e-6)[1].gradients[0] for name in ("float32", "float16"))
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_a_step_whose_gradients_overflow_moves_nothing_and_counts(tone_manifest: Manifest, with_units: None) -> None:
    trainer, _ = trained(tone_manifest, "float16", 1e2, epochs=8)
    history = trainer.callbacks[1]
    assert isinstance(history, History)
    norms = torch.tensor(history.curve("gradient_norm")[1])
    overflowed = ~norms.isfinite()
    assert overflowed[0]
    assert not overflowed[-1]
    assert len(norms) == trainer.progress.step
    steps = {int(values["step"]) for values in trainer.optimizer.state.values()}
    assert steps == {int((~overflowed).sum())}
    assert trainer.precision.state_dict()["scale"] == 65536.0 / 2 ** int(overflowed.sum())


def test_gradients_that_overflow_at_any_scale_end_the_training(with_units: None) -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaled = Precision("float16", CPU)

    def step() -> None:
        optimizer.zero_grad()
        scaled.backward((weight * float("inf")).sum())
        scaled.unscale(optimizer)
        scaled.step(optimizer)

    for _ in range(16):
        step()
    with pytest.raises(UserError, match=r"overflow float16 even unscaled; set training\.precision"):
        step()
    assert torch.equal(weight.detach(), torch.ones(1))


@pytest.mark.parametrize("wanted", ["bfloat16", "float16"])
def test_without_units_it_is_refused_with_a_warning(wanted: str, tone_manifest: Manifest, without_units: None) -> None:
    with pytest.warns(UserWarning, match=f"training.precision: found '{wanted}', for which cpu has no units"):
        refused, _ = trained(tone_manifest, wanted)
    plain, _ = trained(tone_manifest, "float32")
    assert refused.precision.used == "float32"
    assert torch.equal(refused.model.get_parameter("outer.weight"), plain.model.get_parameter("outer.weight"))
    assert refused.serialized_parameters()["precision"] == wanted


def test_the_units_of_a_processor_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for unit, wanted in {"amx_bf16": "bfloat16", "avx512_bf16": "bfloat16", "amx_fp16": "float16"}.items():
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda unit=unit: {unit: True})
        assert [name for name in ("bfloat16", "float16") if precision.has_units(name, CPU)] == [wanted]
    # An LSTM could not be computed.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": True})
    assert not precision.has_units("float16", CPU)
    for capability, found in {(7, 5): ["float16"], (8, 0): ["bfloat16", "float16"], (6, 1): []}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        device = torch.device("cuda")
        assert [name for name in ("bfloat16", "float16") if precision.has_units(name, device)] == found
    assert not precision.has_units("float16", torch.device("meta"))


def test_another_precision_is_refused() -> None:
    with pytest.raises(UserError, match="precision is 'bf16', expected one of float32, bfloat16, float16"):
        Precision("bf16", CPU)


def test_what_a_run_computes_in_is_part_of_what_its_state_belongs_to(tone_manifest: Manifest, with_units: None) -> None:
    digests = {}
    for wanted in ("float32", "bfloat16"):
        trainer = ModelTrainer(ToyModel(), train_loader=tone_loader(tone_manifest), precision=wanted)
        lineage = DataLineage.of_loaders(trainer.train_loader, None, None)
        digests[wanted] = data_digests(trainer, lineage)["precision"]
    assert digests == {"float32": "float32", "bfloat16": f"bfloat16 {canary('cpu', 'bfloat16')[:16]}"}
    assert canary("cpu", "bfloat16") != canary()


def test_float32_needs_no_scale_and_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = Precision("float32", CPU)
    assert plain.state_dict() == {}
    plain.load_state_dict({"scale": 4.0, "steps": 1})
    assert plain.state_dict() == {}


class StopsInAStep(Callback, is_part_of_trainer=False):
    def on_safe_point(self, trainer: ModelTrainer) -> None:
        trainer.stop_training("as asked")


@pytest.mark.parametrize(("before", "after"), [("float16", "float32"), ("float32", "float16"), ("float16", "float16")])
def test_gradients_that_wait_for_their_step_survive_another_precision(
    before: str, after: str, tone_manifest: Manifest, with_units: None
) -> None:
    def trainer_in(wanted: str) -> tuple[ModelTrainer, Seen]:
        torch.manual_seed(0)
        seen = Seen()
        trainer = ModelTrainer(
            ToyModel(), train_loader=tone_loader(tone_manifest[:8]), callbacks=[seen], precision=wanted, accumulation=2
        )
        return trainer, seen

    whole, expected = trainer_in("float32")
    whole.epochs = 1
    whole.start_training()
    stopped, _ = trainer_in(before)
    stopped.attach(StopsInAStep())
    stopped.start_training()
    stopped.stop_reason = None
    assert stopped.batches_into_step == 1
    resumed, seen = trainer_in(after)
    resumed.load_state_dict(stopped.state_dict())
    resumed.epochs = 1
    resumed.start_training()
    found, meant = seen.gradients[0], expected.gradients[0]
    assert torch.linalg.vector_norm(found - meant) < 0.05 * torch.linalg.vector_norm(meant)
