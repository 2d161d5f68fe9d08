"""Classes of torch's, which nobody marked: what is written is proven, and what cannot be known is refused by name."""

import functools
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.serialization.state import json_bytes, split_tree, tensor_bytes

MODULES: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(3, 4),
    lambda: nn.Linear(3, 4, bias=False),
    lambda: nn.Linear(3, 4, dtype=torch.float64),
    lambda: nn.Linear(3, 4).half(),
    lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular", bias=False),
    lambda: nn.Conv1d(4, 4, (3,), stride=2, groups=2),
    lambda: nn.ConvTranspose2d(3, 4, 3, output_padding=1, stride=2),
    lambda: nn.LSTM(3, 4, 2, bidirectional=True, dropout=0.1),
    lambda: nn.LSTM(4, 4, proj_size=2, dtype=torch.float64),
    lambda: nn.GRU(3, 4, bias=False, batch_first=True),
    lambda: nn.RNN(3, 4, nonlinearity="relu"),
    lambda: nn.RNNCell(3, 4, nonlinearity="relu", bias=False),
    lambda: nn.Embedding(5, 3, padding_idx=-1),
    lambda: nn.Embedding.from_pretrained(torch.zeros(5, 3)),
    lambda: nn.LayerNorm(4, bias=False),
    lambda: nn.LayerNorm((4, 2), elementwise_affine=False),
    lambda: nn.BatchNorm2d(3, track_running_stats=False, momentum=None),
    lambda: nn.GroupNorm(2, 4, affine=False),
    lambda: nn.PReLU(3, init=0.5),
    lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Dropout(0.3)),
    lambda: nn.Sequential(OrderedDict(second=nn.Linear(2, 2), first=nn.Tanh())),
    lambda: nn.ModuleList([nn.Linear(2, 2, bias=False)]),
    lambda: nn.ModuleDict({"b": nn.ReLU(), "a": nn.Tanh()}),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=True, bias=False),
    lambda: nn.TransformerEncoderLayer(8, 2, activation=nn.SiLU(), layer_norm_eps=0.1),
    lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.3, batch_first=True),
    lambda: nn.MultiheadAttention(8, 2, bias=False, kdim=4, add_bias_kv=True),
    lambda: nn.MultiheadAttention(8, 2, vdim=4, add_zero_attn=True, batch_first=True),
    lambda: nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"),
    lambda: nn.CTCLoss(blank=1, zero_infinity=True),
    lambda: nn.Hardtanh(-2, 2),
    lambda: nn.Identity(),
]


def structure(module: nn.Module) -> Any:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return repr(module), {name: (t.dtype, t.shape, t.requires_grad) for name, t in tensors.items()}


def through_json(document: Any) -> Any:
    return json.loads(json_bytes(document))


@pytest.mark.parametrize("make", MODULES)
def test_modules_of_torch_come_back_without_a_mark(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = make()
    generator = torch.get_rng_state()
    document = through_json(Serializer().describe(module))
    assert torch.equal(torch.get_rng_state(), generator)
    again = Deserializer().build(document)
    assert structure(again) == structure(module)
    assert through_json(Serializer().describe(again)) == document
    Serializer().serialize(module, tmp_path)
    assert tensor_bytes(Deserializer().deserialize(tmp_path).state_dict()) == tensor_bytes(module.state_dict())


def pruned() -> nn.Module:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.ones(5, 5))
    return module


def with_an_attribute_of_the_users() -> nn.Module:
    module = nn.Linear(2, 2)
    module.scale = 3  # type: ignore[assignment]
    return module


def half_of_it() -> nn.Module:
    module = nn.MultiheadAttention(4, 2)
    module.out_proj.double()
    return module


def another_child() -> nn.Module:
    module = nn.TransformerEncoderLayer(4, 2)
    module.dropout2 = nn.Dropout(0.9)
    return module


def without_a_bias() -> nn.Module:
    module = nn.TransformerEncoderLayer(4, 2)
    module.linear2.bias = None  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (pruned, "its _parameters does not follow"),
        (with_an_attribute_of_the_users, "its scale does not follow"),
        (half_of_it, "its out_proj._parameters does not follow"),
        (another_child, "its dropout2.p does not follow"),
        (without_a_bias, "its linear2._parameters does not follow"),
        (lambda: nn.LazyLinear(3), "LazyLinear cannot be serialised"),
        (lambda: nn.Transformer(8, 2, 1, 3, batch_first=True), "Transformer cannot be serialised"),
        (lambda: nn.ParameterList([nn.Parameter(torch.ones(1))]), "ParameterList cannot be serialised"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "ParametrizedLinear"),
        (lambda: nn.CrossEntropyLoss(weight=torch.ones(2)), r"^weight: a tensor is no parameter"),
    ],
)
def test_modules_that_their_attributes_do_not_explain_are_refused(make: Callable[[], nn.Module], match: str) -> None:
    module = make()
    with pytest.raises(UserError, match=match):
        Serializer().describe(module)


def test_the_refusal_names_place_and_remedy() -> None:
    with pytest.raises(UserError, match=r"args\[1\]: .*:Linear .*serializable\(Linear\) before the object is made"):
        Serializer().describe(nn.Sequential(nn.ReLU(), with_an_attribute_of_the_users()))


def test_a_class_of_torch_is_marked_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Transformer, "__init__", nn.Transformer.__init__)
    before = nn.Transformer(8, 2, 1, 1, batch_first=True)
    serializable(nn.Transformer)
    made = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    again = Deserializer().build(through_json(Serializer().describe(made)))
    assert structure(again) == structure(made)
    with pytest.raises(UserError, match="Transformer cannot be serialised"):
        Serializer().describe(before)


def halved(epoch: int) -> float:
    return 0.5**epoch


SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=3),
    lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.25, 0.75, total_iters=4),
    lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 9, power=2.0),
    lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=0.01),
    lambda optimizer: lr_scheduler.LambdaLR(optimizer, halved),
    lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, halved),
    lambda optimizer: lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=1, min_lr=0.001, cooldown=1, threshold=0.1
    ),
    lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        milestones=[4],
    ),
]


def optimizer_of(lr: float = 0.1) -> torch.optim.Optimizer:
    return SGD([nn.Parameter(torch.ones(1))], lr=lr, momentum=0.9)


def rates(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The learning rates of ``steps`` steps; the loss of a plateau."""
    found = []
    for _ in range(steps):
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR gives its schedulers an epoch, which torch warns of
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found


def check_continuation(scheduler: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    rates(scheduler, optimizer, 3)
    Serializer(external={"optimizer": optimizer}).serialize(scheduler, folder)
    moments = optimizer.state_dict()
    other = optimizer_of()
    again = Deserializer(trusted=[__name__]).deserialize(folder, optimizer=other)
    other.load_state_dict(moments)  # afterwards: making a scheduler sets the first learning rate
    assert type(again) is type(scheduler)
    assert json_bytes(split_tree(again.state_dict())[0]) == json_bytes(split_tree(scheduler.state_dict())[0])
    assert rates(again, other, 5) == rates(scheduler, optimizer, 5)


@pytest.mark.parametrize("make", SCHEDULERS)
def test_schedulers_continue_with_an_optimizer_given_anew(
    make: Callable[[torch.optim.Optimizer], Any], tmp_path: Path
) -> None:
    optimizer = optimizer_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_continuation(make(optimizer), optimizer, tmp_path)


def test_a_scheduler_that_is_marked_from_outside_continues(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lr_scheduler.OneCycleLR, "__init__", lr_scheduler.OneCycleLR.__init__)
    optimizer = optimizer_of()
    with pytest.raises(UserError, match=r"OneCycleLR cannot be serialised.*serializable\(OneCycleLR\)"):
        Serializer({"optimizer": optimizer}).describe(lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9))
    serializable(lr_scheduler.OneCycleLR)
    optimizer = optimizer_of()
    check_continuation(lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20), optimizer, tmp_path)


def test_a_lambda_in_a_scheduler_is_refused_by_name() -> None:
    optimizer = optimizer_of()
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    with pytest.raises(UserError, match=r"lr_lambda\[0\] is a lambda"):
        Serializer({"optimizer": optimizer}).describe(scheduler)


def test_the_milestones_come_back_and_their_counted_state_is_refused() -> None:
    optimizer = optimizer_of()
    scheduler = lr_scheduler.MultiStepLR(optimizer, [2, 2, 5], gamma=0.5)
    document = through_json(Serializer({"optimizer": optimizer}).describe(scheduler))
    again = Deserializer().build(document, optimizer=optimizer_of())
    assert rates(again, again.optimizer, 6) == rates(scheduler, optimizer, 6)
    with pytest.raises(TypeError, match="the state at 'milestones' is a Counter"):
        split_tree(scheduler.state_dict())


def test_an_optimizer_is_refused_with_what_to_do() -> None:
    optimizer = optimizer_of()
    with pytest.raises(UserError, match=r"\[1\]: an optimizer \(SGD\) belongs .*ModelTrainer.*external="):
        Serializer().describe([1, optimizer])
    with pytest.raises(UserError, match=r"optimizer: an optimizer \(SGD\)"):
        Serializer().describe(lr_scheduler.StepLR(optimizer, 2))
    factory = functools.partial(SGD, lr=0.5)
    assert Deserializer().build(Serializer().describe(factory)).keywords == {"lr": 0.5}
