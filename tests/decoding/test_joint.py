"""Attention and CTC together, against every sentence and every alignment that there is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_search import EOS, FIRST, NEVER, JointSpeaker, Speaker, ctc_sums, ranked_sentences
from torch import Tensor

from sonosco_mlflow.decoding.beam import attention_beam
from sonosco_mlflow.decoding.greedy import attention_greedy
from sonosco_mlflow.decoding.joint import JointSteps, PrefixScorer
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import SpecialToken

LETTERS = 2
VOCABULARY = FIRST + LETTERS
seeds = st.integers(0, 2**32 - 1)


def random_frames(generator: torch.Generator, batch: int, frames: int, sharpness: float = 2.0) -> Tensor:
    logits = sharpness * torch.randn(batch, frames, VOCABULARY, generator=generator).double()
    logits[..., [SpecialToken.PAD, SpecialToken.SOS, EOS, SpecialToken.UNKNOWN]] = NEVER
    return logits.log_softmax(dim=-1)


@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=3), st.lists(st.integers(0, 1), max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_prefix_has_the_probability_of_all_that_begins_with_it(
    seed: int, lengths: list[int], letters: list[int]
) -> None:
    """Also of a prefix that is too long for its frames, and beside longer utterances."""
    frames = random_frames(torch.Generator().manual_seed(seed), len(lengths), max(lengths))
    scorer = PrefixScorer(frames, torch.tensor(lengths))
    prefixes, said = scorer.start(2 * len(lengths)), [FIRST + letter for letter in letters]
    for place, token in enumerate(said):
        prefixes, total = scorer.extended(prefixes, torch.full((2 * len(lengths),), token))
        for row, length in enumerate(lengths):
            sums = ctc_sums(frames[row, :length])
            expected = sum(share for labels, share in sums.items() if labels[: place + 1] == tuple(said[: place + 1]))
            assert total[2 * row : 2 * row + 2].exp().tolist() == pytest.approx([expected] * 2, rel=1e-9, abs=1e-300)
    children = scorer.children(prefixes)[::2].exp()
    for row, length in enumerate(lengths):
        sums = ctc_sums(frames[row, :length])
        for token in range(FIRST, VOCABULARY):
            longer = (*said, token)
            expected = sum(share for labels, share in sums.items() if labels[: len(longer)] == longer)
            assert children[row, token].nan_to_num().item() == pytest.approx(expected, rel=1e-9, abs=1e-300)
        expected = sums.get(tuple(said), 0.0)
        assert children[row, EOS].nan_to_num().item() == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(seeds, st.sampled_from([0.3, 0.5, 0.9]), st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_wide_beam_finds_what_trying_all_sentences_finds(seed: int, weight: float, normalisation: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    frames, lengths, limits = random_frames(generator, 3, 4), [4, 1, 3], [3, 2, 3]
    speaker = Speaker.random(generator, 3, LETTERS)
    plain = JointSpeaker(speaker, frames, lengths, weight)
    search = Search(beam=16, n_best=4, length_reward=0.3, length_normalisation=normalisation)
    steps = JointSteps(speaker.steps(search.beam), PrefixScorer(frames, torch.tensor(lengths)), weight)
    for utterance, hypotheses in enumerate(attention_beam(steps, torch.tensor(limits), search)):
        expected = ranked_sentences(plain, utterance, limits[utterance], search)
        assert [one.tokens for one in hypotheses] == [tokens for _, _, tokens in expected[:4]]
        assert [one.total for one in hypotheses] == pytest.approx([rank for rank, _, _ in expected[:4]], abs=1e-9)
        assert [one.score for one in hypotheses] == pytest.approx([score for _, score, _ in expected[:4]], abs=1e-9)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_a_beam_of_one_is_greedy_decoding(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    frames, limits = random_frames(generator, 4, 6), torch.tensor([9, 1, 4, 6])
    speaker, scorer = Speaker.random(generator, 4, LETTERS), PrefixScorer(frames, torch.tensor([6, 2, 5, 6]))
    greedy = attention_greedy(JointSteps(speaker.steps(1), scorer, 0.4), limits)
    found = attention_beam(JointSteps(speaker.steps(1), scorer, 0.4), limits, Search())
    assert [one.tokens for one in greedy] == [one.tokens for (one,) in found]
    assert [one.score for one in greedy] == pytest.approx([one.score for (one,) in found], abs=1e-12)


def test_a_long_utterance_of_a_confident_model_is_scored_to_the_last_digits() -> None:
    """Where the products of its probabilities are far below the smallest number there is."""
    generator = torch.Generator().manual_seed(0)
    lengths = [2000, 1500]
    frames = random_frames(generator, 2, 2000, sharpness=40.0)
    said = torch.randint(FIRST, VOCABULARY, (2, 300), generator=generator)
    scorer = PrefixScorer(frames, torch.tensor(lengths))
    prefixes = scorer.start(2)
    for step in range(said.shape[1]):
        prefixes, _ = scorer.extended(prefixes, said[:, step])
    expected = -torch.nn.functional.ctc_loss(
        frames.transpose(0, 1), said, torch.tensor(lengths), torch.tensor([300, 300]), blank=1, reduction="none"
    )
    assert float(expected.max()) < -10_000
    assert scorer.children(prefixes)[:, EOS].tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_what_ctc_never_says_is_never_said() -> None:
    frames = random_frames(torch.Generator().manual_seed(1), 1, 2)
    steps = JointSteps(
        Speaker.random(torch.Generator().manual_seed(2), 1, LETTERS).steps(1),
        PrefixScorer(frames, torch.tensor([2])),
        0.5,
    )
    state, previous = None, torch.tensor([2])
    for token in (FIRST, FIRST):
        _, _, state = steps(previous, state)
        previous = torch.tensor([token])
    log_probs, _, _ = steps(previous, state)
    # The same token twice takes three frames.
    assert torch.equal(log_probs, torch.full_like(log_probs, NEVER))


def test_no_special_token_is_part_of_a_sentence() -> None:
    scorer = PrefixScorer(torch.zeros(1, 3, VOCABULARY).log_softmax(dim=-1), torch.tensor([3]))
    children = scorer.children(scorer.start(1))[0]
    assert [token for token in range(VOCABULARY) if children[token] > NEVER] == [EOS, *range(FIRST, VOCABULARY)]


@pytest.mark.parametrize("weight", [-0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_named(weight: float) -> None:
    with pytest.raises(UserError, match=r"decoding.ctc_weight: found .*, expected a share from 0 to 1"):
        Search(ctc_weight=weight)
