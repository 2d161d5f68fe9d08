import pytest
import torch

from sonosco_mlflow.decoding.greedy import State, attention_greedy, ctc_greedy
from sonosco_mlflow.text import SpecialToken

PAD, BLANK, SOS, EOS, UNKNOWN = (int(token) for token in SpecialToken)
A, B, C = 5, 6, 7


def log_probs_of(paths: list[list[int]], confidence: float = 8.0) -> torch.Tensor:
    return (confidence * torch.nn.functional.one_hot(torch.tensor(paths), 8)).float().log_softmax(dim=-1)


def test_ctc_merges_repeats_and_drops_blanks_and_special_tokens() -> None:
    paths = [
        [A, A, BLANK, A, B, B],
        [BLANK, BLANK, C, C, C, A],
        [BLANK] * 6,
        [A, PAD, B, UNKNOWN, SOS, C],
    ]
    decoded = ctc_greedy(log_probs_of(paths), torch.tensor([6, 5, 6, 6]))
    assert [one.tokens for one in decoded] == [[A, A, B], [C], [], [A, B, C]]


def test_ctc_score_sums_all_alignments() -> None:
    """Two frames of A (0.6) or blank (0.4): the paths AA, A- and -A all say A."""
    probabilities = torch.full((1, 2, 8), 1e-20)
    probabilities[..., A], probabilities[..., BLANK] = 0.6, 0.4
    (decoded,) = ctc_greedy(probabilities.log(), torch.tensor([2]))
    assert decoded.tokens == [A]
    assert decoded.score == pytest.approx(torch.tensor(0.6 * 0.6 + 2 * 0.6 * 0.4).log().item(), abs=1e-5)


def test_ctc_does_not_read_padding() -> None:
    path = [[A, B, C, A]]
    (short,) = ctc_greedy(log_probs_of([[A, B]]), torch.tensor([2]))
    (padded,) = ctc_greedy(log_probs_of(path), torch.tensor([2]))
    assert short.tokens == padded.tokens == [A, B]
    assert short.score == padded.score


def scripted(scripts: list[list[int]], confidence: float = 5.0) -> tuple:
    """A decoder that says each utterance its script, whatever was said before, and counts its steps."""
    calls: list[list[int]] = []

    def step(previous: torch.Tensor, state: State | None) -> tuple[torch.Tensor, torch.Tensor, State]:
        position = 0 if state is None else int(state[0][0]) + 1
        calls.append(previous.tolist())
        said = torch.tensor([script[min(position, len(script) - 1)] for script in scripts])
        logits = confidence * torch.nn.functional.one_hot(said, 8).float()
        weights = torch.full((len(scripts), 3), float(position))
        return logits.log_softmax(dim=-1), weights, (torch.full((len(scripts),), position),)

    return step, calls


def test_attention_decoding_ends_each_utterance_at_its_own_end() -> None:
    step, calls = scripted([[A, B, EOS, C], [EOS, C, C, C], [C, PAD, A, EOS]])
    decoded = attention_greedy(step, torch.tensor([9, 9, 9]))
    assert [one.tokens for one in decoded] == [[A, B], [], [C, A]]
    assert calls == [[SOS, SOS, SOS], [A, EOS, C], [B, C, PAD], [EOS, C, A]]
    assert [one.weights[:, 0].tolist() for one in decoded] == [[0, 1, 2], [0], [0, 1, 2, 3]]
    best = (5.0 * torch.nn.functional.one_hot(torch.tensor(A), 8).float()).log_softmax(dim=-1)[A].item()
    assert [one.score for one in decoded] == pytest.approx([3 * best, best, 4 * best])


def test_attention_decoding_stops_at_each_utterance_s_limit() -> None:
    step, calls = scripted([[A], [B]])
    decoded = attention_greedy(step, torch.tensor([2, 4]))
    assert [one.tokens for one in decoded] == [[A, A], [B, B, B, B]]
    assert len(calls) == 4
