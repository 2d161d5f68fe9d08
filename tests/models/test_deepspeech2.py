from collections.abc import Callable

import pytest
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


def of_ten_frames(name: str, tokens: list[int]) -> Sample:
    """An utterance of which the encoder makes ten frames."""
    return Sample(name, "", torch.randn(40, 80), torch.tensor(tokens))


def test_an_utterance_with_too_few_frames_gives_no_gradient_and_is_named(build: Callable[..., DeepSpeech2]) -> None:
    """Between equal tokens there is a blank: six of them need eleven frames."""
    model = build("deepspeech2")
    with pytest.warns(UserWarning, match="^short: too few frames for its text"):
        output = model(collate([of_ten_frames("short", [6] * 6)]))
    output.loss.backward()
    assert output.loss == 0.0
    assert all(parameter.grad is not None and parameter.grad.count_nonzero() == 0 for parameter in model.parameters())


def test_utterances_with_just_enough_frames_are_learnt_from_in_silence(build: Callable[..., DeepSpeech2]) -> None:
    enough = [of_ten_frames("0", [6, 7] * 5), of_ten_frames("1", [6] * 5), of_ten_frames("2", [])]
    output = build("deepspeech2")(collate(enough))
    assert output.lengths.tolist() == [10, 10, 10]
    assert output.loss > 0
    assert build("deepspeech2")(collate(enough[2:])).loss > 0


def test_posteriors_have_a_row_for_each_encoder_frame(build: Callable[..., DeepSpeech2], batch: Batch) -> None:
    model = build("deepspeech2", time_strides=[3, 1]).eval()
    for hypothesis, frames in zip(model.decode(batch), batch.feature_lengths.tolist(), strict=True):
        assert hypothesis.alignment.shape == (-(-frames // 3), 13)
        torch.testing.assert_close(hypothesis.alignment.sum(dim=-1), torch.ones(-(-frames // 3)))
