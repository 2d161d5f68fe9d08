from collections.abc import Callable

import pytest
import torch

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.models.attention import AttentionModel, Memory, attend, sequence_loss, shifted, soft_window
from sonosco_mlflow.models.energies import ENERGIES
from sonosco_mlflow.text import SpecialToken

PAD, SOS, EOS = int(SpecialToken.PAD), int(SpecialToken.SOS), int(SpecialToken.EOS)


def test_attention_gives_padding_no_weight() -> None:
    memory = Memory(torch.randn(2, 4, 3), torch.randn(2, 4, 5), torch.tensor([4, 2]))
    contexts, weights = attend(torch.randn(2, 6, 3), memory)
    assert contexts.shape == (2, 6, 5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 6))
    assert weights[1, :, 2:].count_nonzero() == 0
    torch.testing.assert_close(contexts[1], weights[1, :, :2] @ memory.values[1, :2])


def test_attention_is_the_scaled_inner_product() -> None:
    memory = Memory(
        torch.tensor([[[2.0, 0.0, 0.0, 0.0], [0.0] * 4]]), torch.tensor([[[1.0], [0.0]]]), torch.tensor([2])
    )
    context, _ = attend(torch.tensor([[[3.0, 1.0, 1.0, 1.0]]]), memory)
    torch.testing.assert_close(context.squeeze(), torch.tensor(3.0).sigmoid())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tds", {}),
        *(("las", {"attention": energy, "input_feeding": fed}) for energy in ENERGIES for fed in (False, True)),
    ],
)
def test_each_of_an_utterance_s_rows_attends_as_if_it_were_the_only_one(
    build: Callable[..., AttentionModel], batch: Batch, name: str, settings: dict[str, object]
) -> None:
    model = build(name, **settings).eval()
    memory = model.encode(batch.features, batch.feature_lengths)
    previous = torch.randint(len(SpecialToken), 9, (2, 3, len(batch)))
    alone: list[tuple[torch.Tensor, ...]] = []
    for row in previous.unbind(1):
        first, _, state = model.spell(row[0][:, None], memory)
        second, weights, _ = model.spell(row[1][:, None], memory, state)
        alone.append((first, second, weights))
    together = previous.transpose(1, 2).flatten(1)
    first, _, state = model.spell(together[0][:, None], memory)
    second, weights, _ = model.spell(together[1][:, None], memory, state)
    for side_by_side, apart in zip((first, second, weights), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(side_by_side, torch.stack(apart, dim=1).flatten(0, 1), rtol=0, atol=1e-5)


def test_soft_window_peaks_on_each_utterance_s_own_diagonal() -> None:
    memory = Memory(torch.zeros(2, 13, 1), torch.zeros(2, 13, 1), torch.tensor([12, 6]))
    window = soft_window(memory, 7, torch.tensor([6, 3]), sigma=2.0)
    assert window.shape == (2, 7, 13)
    assert window.argmax(dim=-1)[0, :6].tolist() == [0, 2, 4, 6, 8, 10]
    assert window.argmax(dim=-1)[1, :3].tolist() == [0, 2, 4]
    assert window[0, 1, 5] == -(3.0**2) / (2 * 2.0**2)


def test_previous_tokens_and_targets_are_one_step_apart() -> None:
    previous, targets = shifted(torch.tensor([[7, 8, 9], [7, PAD, PAD]]), torch.tensor([3, 1]))
    assert previous.tolist() == [[SOS, 7, 8, 9], [SOS, 7, PAD, PAD]]
    assert targets.tolist() == [[7, 8, 9, EOS], [7, EOS, PAD, PAD]]


def test_loss_is_the_mean_of_the_utterances_means() -> None:
    logits = torch.randn(2, 4, 6)
    targets = torch.tensor([[5, 5, 5, EOS], [5, EOS, PAD, PAD]])
    log_probs = logits.log_softmax(dim=-1)
    first = -(log_probs[0, :3, 5].sum() + log_probs[0, 3, EOS]) / 4
    second = -(log_probs[1, 0, 5] + log_probs[1, 1, EOS]) / 2
    torch.testing.assert_close(sequence_loss(logits, targets, torch.tensor([4, 2])), (first + second) / 2)


def test_smoothing_spreads_its_share_over_the_vocabulary() -> None:
    logits, targets = torch.randn(1, 1, 6), torch.tensor([[4]])
    log_probs = logits.log_softmax(dim=-1)[0, 0]
    expected = -0.9 * log_probs[4] - 0.1 * log_probs.mean()
    torch.testing.assert_close(sequence_loss(logits, targets, torch.tensor([1]), 0.1), expected)
