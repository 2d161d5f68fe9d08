from collections.abc import Callable
from itertools import product

import pytest
import torch

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.models.attention import shifted
from sonosco_mlflow.models.energies import ENERGIES
from sonosco_mlflow.models.las import LAS


def test_listener_joins_frames(build: Callable[..., LAS], batch: Batch) -> None:
    memory = build("las", joined_frames=[1, 2, 4]).encode(batch.features, batch.feature_lengths)
    assert torch.equal(memory.lengths, (batch.feature_lengths + 7) // 8)
    assert memory.values.shape[1] == memory.lengths.max()


def test_steps_at_once_equal_steps_one_by_one(build: Callable[..., LAS], batch: Batch) -> None:
    for feeding, attention in product((False, True), ENERGIES):
        model = build("las", input_feeding=feeding, attention=attention, speller_layers=2).eval()
        memory = model.encode(batch.features, batch.feature_lengths)
        previous, _ = shifted(batch.tokens, batch.token_lengths)
        together, weights, _ = model.spell(previous, memory)
        state = None
        for step in range(previous.shape[1]):
            logits, attended, state = model.spell(previous[:, step : step + 1], memory, state)
            torch.testing.assert_close(logits[:, 0], together[:, step], rtol=0, atol=1e-5)
            torch.testing.assert_close(attended[:, 0], weights[:, step], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "does"), [({}, False), ({"input_feeding": True}, True), ({"attention": "location"}, True)]
)
def test_where_a_step_looked_reaches_the_next_one_only_if_that_reads_it(
    build: Callable[..., LAS], batch: Batch, settings: dict[str, object], does: bool
) -> None:
    model = build("las", **settings).eval()
    memory = model.encode(batch.features, batch.feature_lengths)
    previous, _ = shifted(batch.tokens, batch.token_lengths)
    bias = torch.zeros(8, previous.shape[1], memory.keys.shape[1])
    _, free, _ = model.spell(previous, memory, bias=bias)
    bias[:, 0, 1:] = float("-inf")
    _, held, _ = model.spell(previous, memory, bias=bias)
    assert torch.equal(free[:, 1], held[:, 1]) is not does


def test_scheduled_sampling_draws_from_the_model(build: Callable[..., LAS], batch: Batch) -> None:
    previous, _ = shifted(batch.tokens, batch.token_lengths)
    for share, lowest, highest in ((0.0, 0.0, 0.0), (0.5, 0.3, 0.55), (1.0, 0.8, 1.0)):
        model = build("las", scheduled_sampling=share)
        memory = model.encode(batch.features, batch.feature_lengths)
        sampled = model.perturb(previous, memory)
        assert torch.equal(sampled[:, 0], previous[:, 0])
        assert lowest <= (sampled != previous)[:, 1:].float().mean() <= highest
    # A model that is sure of one token has nothing else to draw.
    with torch.no_grad():
        model.output[-1].bias[7] = 1e4
    assert (model.perturb(previous, memory)[:, 1:] == 7).all()


def test_scheduled_sampling_reaches_steps_that_are_made_one_by_one(build: Callable[..., LAS], batch: Batch) -> None:
    """A model that is sure of one token reads it from then on, whatever the reference says."""
    model = build("las", input_feeding=True, scheduled_sampling=1.0, dropout=0.0)
    previous, _ = shifted(batch.tokens, batch.token_lengths)
    memory = model.encode(batch.features, batch.feature_lengths)
    with torch.no_grad():
        model.output[-1].bias[7] = 1e4
    sevens = torch.full_like(previous, 7)
    sevens[:, 0] = previous[:, 0]
    expected, _, _ = model.spell(sevens, memory)
    found, _, _ = model.spell_in_training(previous, memory)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    reference, _, _ = model.spell(previous, memory)
    assert not torch.allclose(found, reference, rtol=0, atol=1e-3)
