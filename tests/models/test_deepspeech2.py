from collections.abc import Callable

import torch
from torch.nn import functional

from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.loader import Batch, collate
from sonosco_mlflow.models.deepspeech2 import DeepSpeech2
from sonosco_mlflow.text import SpecialToken


def test_loss_is_the_mean_over_utterances_of_ctc_per_token(build: Callable[..., DeepSpeech2], batch: Batch) -> None:
    output = build("deepspeech2").eval()(batch)
    expected = functional.ctc_loss(
        output.logits.transpose(0, 1),
        batch.tokens,
        output.lengths,
        batch.token_lengths,
        blank=SpecialToken.BLANK,
        reduction="mean",
    )
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits.exp().sum(dim=-1), torch.ones(output.logits.shape[:2]))


def test_an_utterance_with_too_few_frames_gives_no_gradient(build: Callable[..., DeepSpeech2]) -> None:
    tokens = torch.full((20,), 6)
    short = collate([Sample("0", "", torch.randn(40, 80), tokens)])
    model = build("deepspeech2")
    output = model(short)
    output.loss.backward()
    assert output.loss == 0.0
    assert all(parameter.grad is not None and parameter.grad.count_nonzero() == 0 for parameter in model.parameters())


def test_posteriors_have_a_row_for_each_encoder_frame(build: Callable[..., DeepSpeech2], batch: Batch) -> None:
    model = build("deepspeech2", time_strides=[3, 1]).eval()
    for hypothesis, frames in zip(model.decode(batch), batch.feature_lengths.tolist(), strict=True):
        assert hypothesis.alignment.shape == (-(-frames // 3), 13)
        torch.testing.assert_close(hypothesis.alignment.sum(dim=-1), torch.ones(-(-frames // 3)))
