"""What must hold for every model: indifference to padding and company, determinism, learning."""

import dataclasses
from collections.abc import Callable

import jiwer
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.loader import Batch, collate
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.text import CharacterTokenizer

Build = Callable[..., SpeechModel]

VARIANTS = [
    pytest.param(("deepspeech2", {}), id="deepspeech2"),
    pytest.param(("deepspeech2", {"cell": "gru"}), id="deepspeech2-gru"),
    pytest.param(("deepspeech2", {"cell": "rnn", "bidirectional": False}), id="deepspeech2-forward-rnn"),
    pytest.param(("deepspeech2", {"cell": "clipped"}), id="deepspeech2-clipped"),
    pytest.param(("deepspeech2", {"bidirectional": False, "look_ahead": 7}), id="deepspeech2-look-ahead"),
    pytest.param(("las", {}), id="las"),
    pytest.param(("las", {"input_feeding": True, "speller_layers": 2}), id="las-input-feeding"),
    pytest.param(("las", {"attention": "mlp"}), id="las-mlp"),
    pytest.param(("las", {"attention": "additive"}), id="las-additive"),
    pytest.param(("las", {"attention": "location", "location_width": 5}), id="las-location"),
    pytest.param(
        ("las", {"attention": "location", "input_feeding": True, "speller_layers": 2}), id="las-location-input-feeding"
    ),
    pytest.param(("las", {"ctc_weight": 0.3}), id="las-ctc"),
    pytest.param(("tds", {}), id="tds"),
    pytest.param(("tds", {"ctc_weight": 0.3}), id="tds-ctc"),
]


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, build: Build) -> SpeechModel:
    """Each model, with nothing random in training, so that its training mode can be compared too."""
    name, settings = request.param
    quiet = {
        "deepspeech2": {"dropout": 0.0},
        "las": {"dropout": 0.0},
        "tds": {"dropout": 0.0, "random_sampling": 0.0},
    }
    return build(name, **settings, **quiet[name])


def padded_with_noise(batch: Batch, frames: int) -> Batch:
    """The batch with that many more frames, and noise instead of zeros in all padding."""
    features = functional.pad(batch.features, (0, 0, 0, frames))
    padding = torch.arange(features.shape[1]) >= batch.feature_lengths[:, None]
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(batch, features=torch.where(padding[..., None], noise, features))


def gradients(model: SpeechModel, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_an_utterance_does_not_depend_on_company_or_padding(
    model: SpeechModel, batch: Batch, samples: list[Sample]
) -> None:
    model.eval()
    together = model(padded_with_noise(batch, 37))
    decoded = model.decode(padded_with_noise(batch, 37))
    alone = [model(collate([sample])) for sample in samples]
    torch.testing.assert_close(together.loss, torch.stack([one.loss for one in alone]).mean(), rtol=0, atol=1e-5)
    for row, (one, sample) in enumerate(zip(alone, samples, strict=True)):
        steps = int(one.lengths[0])
        assert together.lengths[row] == steps
        torch.testing.assert_close(together.logits[row, :steps], one.logits[0, :steps], rtol=0, atol=1e-5)
        hypothesis = model.decode(collate([sample]))[0]
        assert decoded[row].tokens == hypothesis.tokens
        assert decoded[row].score == pytest.approx(hypothesis.score, abs=1e-3)
        torch.testing.assert_close(decoded[row].alignment, hypothesis.alignment, rtol=0, atol=1e-5)


def test_training_does_not_see_padding(model: SpeechModel, batch: Batch) -> None:
    model.train()
    model.soft_window = True
    twin = Deserializer().build(Serializer().describe(model))
    twin.load_state_dict(model.state_dict())
    twin.soft_window = True
    expected, found = gradients(model, batch), gradients(twin, padded_with_noise(batch, 37))
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer, rtol=0, atol=1e-5, msg=name)


# With all that is drawn in training: dropout, sampled tokens.
RESTLESS = {
    "deepspeech2": {"dropout": 0.2},
    "las": {"dropout": 0.2, "scheduled_sampling": 0.3},
    "tds": {"dropout": 0.2, "random_sampling": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_gives_the_same_bits(variant: tuple[str, dict[str, object]], build: Build, batch: Batch) -> None:
    name, settings = variant
    results = [gradients(build(name, **settings, **RESTLESS[name]), batch) for _ in range(2)]
    for parameter, gradient in results[0].items():
        assert torch.equal(gradient, results[1][parameter]), parameter
    torch.manual_seed(1)
    other = gradients(build(name, **settings), batch)
    assert any(not torch.equal(gradient, other[parameter]) for parameter, gradient in results[0].items())


def test_decoding_changes_nothing(model: SpeechModel, batch: Batch) -> None:
    model.eval()
    generator, state = (
        torch.get_rng_state(),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    model.decode(batch)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Steps and learning rate; the soft window is on for the first half of the steps.
RECIPES = {"deepspeech2": (40, 3e-3), "las": (60, 3e-3), "tds": (60, 3e-3)}


@pytest.mark.parametrize("name", RECIPES)
def test_overfits_eight_utterances(name: str, build: Build, batch: Batch, tokenizer: CharacterTokenizer) -> None:
    steps, rate = RECIPES[name]
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for step in range(steps):
        model.soft_window = step < steps // 2
        optimizer.zero_grad()
        model(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    model.eval()
    decoded = model.decode(batch)
    assert jiwer.wer(batch.texts, [tokenizer.decode(one.tokens) for one in decoded]) == 0.0
    with torch.no_grad():
        output = model(batch)
    assert [tokenizer.decode(tokens) for tokens in model.teacher_forced(output)] == batch.texts
    # Decoding found the references, so the loss must be the mean of its scores per target.
    ends = 0 if output.alignment is None else 1
    per_target = [one.score / (len(one.tokens) + ends) for one in decoded]
    assert float(output.loss) == pytest.approx(-sum(per_target) / len(batch), rel=1e-3)
