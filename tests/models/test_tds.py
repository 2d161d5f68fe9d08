from collections.abc import Callable

import pytest
import torch

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.models.attention import AttentionModel, shifted
from sonosco_mlflow.models.tds import TDS
from sonosco_mlflow.text import SpecialToken


def test_time_is_subsampled_by_the_product_of_the_strides(build: Callable[..., TDS], batch: Batch) -> None:
    for strides in ([2, 2], [3, 1]):
        output = build("tds", strides=strides)(batch)
        frames = batch.feature_lengths
        for stride in strides:
            frames = -(-frames // stride)
        assert output.alignment is not None
        assert output.alignment.shape == (8, int(batch.token_lengths.max()) + 1, int(frames.max()))


def test_soft_window_holds_in_training_alone(build: Callable[..., TDS], batch: Batch) -> None:
    model = build("tds", dropout=0.0, random_sampling=0.0, soft_window_sigma=0.3)
    steps, frames = int(batch.token_lengths[0]) + 1, -(-int(batch.feature_lengths[0]) // 8)
    diagonal = torch.arange(steps) * frames / steps

    def distance_from_diagonal() -> float:
        alignment = model(batch).alignment
        assert alignment is not None
        attended = alignment[0, :steps, :frames].detach() @ torch.arange(float(frames))
        return float((attended - diagonal).abs().max())

    model.train()
    model.soft_window = False
    free = distance_from_diagonal()
    model.soft_window = True
    assert distance_from_diagonal() < 0.6 < 1.5 < free
    model.eval()
    assert distance_from_diagonal() == pytest.approx(free, abs=1e-4)


def test_random_sampling_replaces_letters_by_letters(build: Callable[..., TDS], batch: Batch) -> None:
    model = build("tds", random_sampling=0.5)
    previous, _ = shifted(batch.tokens, batch.token_lengths)
    sampled = model.perturb(previous)
    letters = previous >= len(SpecialToken)
    assert torch.equal(sampled[~letters], previous[~letters])
    assert (sampled[letters] >= len(SpecialToken)).all()
    assert 0.25 < (sampled[letters] != previous[letters]).float().mean() < 0.65
    model.eval()
    assert torch.equal(model(batch).loss, model(batch).loss)


def test_random_draws_come_from_the_global_generator(build: Callable[..., TDS], batch: Batch) -> None:
    model = build("tds", random_sampling=0.5, dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(model(batch).loss.detach()))
    assert losses[0] == losses[1] != losses[2]


def test_decoding_is_bounded_by_the_encoder(build: Callable[..., TDS], batch: Batch) -> None:
    """A model that never ends a sentence stops at twice its encoder frames and ten."""
    model = build("tds").eval()
    assert isinstance(model, AttentionModel)
    with torch.no_grad():
        model.output.bias[SpecialToken.EOS] = -1e9
    for hypothesis, frames in zip(model.decode(batch), batch.feature_lengths.tolist(), strict=True):
        encoded = -(-frames // 8)
        assert hypothesis.alignment.shape == (2 * encoded + 10, encoded)
