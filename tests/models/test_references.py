"""The models equal what their papers say, written down plainly: float64, results and every gradient."""

import plain_models as plain
import pytest
import torch
from torch import Tensor

from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.loader import Batch, collate
from sonosco_mlflow.models import build_model, model_settings
from sonosco_mlflow.models.base import ModelOutput, SpeechModel

N_MELS, VOCABULARY = 6, 9
LENGTHS, TOKENS = (29, 22, 17), ([5, 8, 8, 6], [7, 6], [6, 5, 7])
TOLERANCE = 1e-10


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(4)
    samples = [
        Sample(str(length), "", torch.randn(length, N_MELS, dtype=torch.float64, generator=generator), torch.tensor(t))
        for length, t in zip(LENGTHS, TOKENS, strict=True)
    ]
    return collate(samples)


def double_model(name: str, **changes: object) -> tuple[SpeechModel, dict]:
    """A model in float64 with weights large enough for every part of it to matter, and all of its settings."""
    settings = model_settings(name, "small", changes)
    torch.manual_seed(0)
    model = build_model(name, "small", N_MELS, VOCABULARY, changes).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.soft_window = True
    return model, settings


def utterances(batch: Batch) -> list[Tensor]:
    return [features[:length] for features, length in zip(batch.features, LENGTHS, strict=True)]


def gradients(model: SpeechModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_equal(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def assert_equal_gradients(model: SpeechModel, output: ModelOutput, expected_loss: Tensor) -> None:
    assert_equal(output.loss, expected_loss, "loss")
    found, expected = gradients(model, output.loss), gradients(model, expected_loss)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} has no part in the loss"
        assert_equal(found[name], gradient, name)


def assert_equal_attention(
    model: SpeechModel, output: ModelOutput, expected: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    assert output.alignment is not None
    for row, (_, logits, alignment) in enumerate(expected):
        steps, frames = alignment.shape
        assert_equal(output.logits[row, :steps], logits, "logits")
        assert_equal(output.alignment[row, :steps, :frames], alignment, "alignment")
    assert_equal_gradients(model, output, torch.stack([loss for loss, _, _ in expected]).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blocks": [1, 2, 1], "channels": [2, 3, 4], "strides": [2, 2, 2], "kernel": 5},
        {"strides": [2, 1], "ctc_weight": 0.3},
    ],
    ids=["small", "three-groups", "ctc"],
)
def test_tds(changes: dict, batch: Batch) -> None:
    model, settings = double_model("tds", decoder_size=8, random_sampling=0.0, soft_window_sigma=1.0, **changes)
    expected = [
        plain.tds(model.get_parameter, settings, frames, tokens)
        for frames, tokens in zip(utterances(batch), TOKENS, strict=True)
    ]
    assert_equal_attention(model, model(batch), expected)


SMALL_LAS = {
    "listener_size": 4,
    "attention_size": 5,
    "speller_size": 6,
    "dropout": 0.0,
    "soft_window_sigma": 1.0,
    "location_filters": 3,
    "location_width": 3,
}


@pytest.mark.parametrize("attention", ["dot", "mlp", "additive", "location"])
@pytest.mark.parametrize("feeding", [False, True], ids=["", "input-feeding"])
@pytest.mark.parametrize(("layers", "joined"), [(1, [2, 2]), (2, [1, 2, 3])], ids=["one-level", "two-levels"])
def test_las(attention: str, feeding: bool, layers: int, joined: list[int], batch: Batch) -> None:
    shape = {"speller_layers": layers, "joined_frames": joined}
    model, settings = double_model("las", **SMALL_LAS, attention=attention, input_feeding=feeding, **shape)
    expected = [
        plain.las(model.get_parameter, settings, frames, tokens)
        for frames, tokens in zip(utterances(batch), TOKENS, strict=True)
    ]
    assert_equal_attention(model, model(batch), expected)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_las_with_a_ctc_loss(weight: float, batch: Batch) -> None:
    model, settings = double_model("las", **SMALL_LAS, joined_frames=[1, 2], ctc_weight=weight)
    expected = [
        plain.las(model.get_parameter, settings, frames, tokens)
        for frames, tokens in zip(utterances(batch), TOKENS, strict=True)
    ]
    loss = torch.stack([loss for loss, _, _ in expected]).mean()
    assert_equal(model(batch).loss, loss, "loss")
    # A validation loss is the likelihood of the decoder, which is what spells.
    apart, _ = double_model("las", **SMALL_LAS, joined_frames=[1, 2])
    apart.load_state_dict(model.state_dict(), strict=False)
    assert_equal(model.eval()(batch).loss, apart.eval()(batch).loss, "validation loss")
    assert (loss - model(batch).loss).abs() > 1e-3


@pytest.mark.parametrize("attention", ["dot", "location"])
def test_las_with_scheduled_sampling_after_its_own_prefix(attention: str) -> None:
    feeding = {"input_feeding": True, "attention": attention, "scheduled_sampling": 0.6, "speller_layers": 2}
    model, settings = double_model("las", **SMALL_LAS, **feeding)
    tokens = [5, 8, 8, 6, 7, 5, 6, 6, 8, 7]
    batch = collate([Sample("0", "", torch.randn(29, N_MELS, dtype=torch.float64), torch.tensor(tokens))])
    torch.manual_seed(8)
    expected = plain.las(model.get_parameter, settings, batch.features[0], tokens, sampling=0.6)
    unsampled = plain.las(model.get_parameter, settings, batch.features[0], tokens)
    assert (expected[1] - unsampled[1]).abs().max() > 1e-3
    torch.manual_seed(8)
    assert_equal_attention(model, model(batch), [expected])


CONVOLUTIONS = {
    1: {"channels": [3], "time_kernels": [5], "band_kernels": [3], "time_strides": [2], "band_strides": [2]},
    2: {
        "channels": [2, 3],
        "time_kernels": [5, 3],
        "band_kernels": [3, 3],
        "time_strides": [2, 1],
        "band_strides": [2, 1],
    },
    3: {
        "channels": [2, 3, 2],
        "time_kernels": [3, 3, 5],
        "band_kernels": [5, 3, 3],
        "time_strides": [1, 2, 1],
        "band_strides": [2, 1, 2],
    },
}


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "clipped"])
@pytest.mark.parametrize(
    ("direction", "convolutions"),
    [({"bidirectional": True}, 1), ({"bidirectional": True}, 3), ({"bidirectional": False, "look_ahead": 3}, 2)],
    ids=["bidirectional", "three-convolutions", "look-ahead"],
)
def test_deepspeech2(cell: str, direction: dict, convolutions: int, batch: Batch) -> None:
    shape = {"cell": cell, "hidden_size": 5, "recurrent_layers": 3, "dropout": 0.0, **direction}
    model, settings = double_model("deepspeech2", **shape, **CONVOLUTIONS[convolutions])
    expected_loss, log_probs = plain.deepspeech2(model.get_parameter, settings, utterances(batch), TOKENS)
    output = model(batch)
    for row, expected in enumerate(log_probs):
        assert_equal(output.logits[row, : len(expected)], expected, "log-probabilities")
    assert_equal_gradients(model, output, expected_loss)
