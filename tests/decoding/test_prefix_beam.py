"""Prefix beam search, against every path that there is."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_search import FIRST, ctc_sums, random_rules, ranked_labels
from torch import Tensor

from sonosco_mlflow.decoding import prefix_beam
from sonosco_mlflow.decoding.ctc import ctc_search
from sonosco_mlflow.decoding.greedy import Decoded, ctc_greedy
from sonosco_mlflow.decoding.prefix_beam import ctc_beam
from sonosco_mlflow.decoding.search import GREEDY, Search
from sonosco_mlflow.text import SpecialToken

# More than there are label sequences of four frames over two letters.
EXHAUSTIVE = 32
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_log_probs(seed: int, batch: int, frames: int, letters: int, sharpness: float = 2.0) -> Tensor:
    """Float64, as if the model never said special tokens."""
    logits = sharpness * torch.randn(batch, frames, FIRST + letters, generator=generator(seed), dtype=torch.float64)
    logits[..., [SpecialToken.PAD, SpecialToken.SOS, SpecialToken.EOS, SpecialToken.UNKNOWN]] = -1e9
    return logits.log_softmax(dim=-1)


@st.composite
def searches(draw: st.DrawFn, beam: int, n_best: int) -> Search:
    return Search(
        beam=beam,
        n_best=n_best,
        language_model=random_rules(FIRST + 2, generator(draw(seeds))) if draw(st.booleans()) else None,
        language_model_weight=draw(st.sampled_from([0.0, 0.4, 1.0])),
        length_reward=draw(st.sampled_from([0.0, 0.7, -0.4])),
    )


def facts(hypotheses: list[Decoded]) -> list[tuple[list[int], float, float]]:
    return [(one.tokens, one.score, one.total) for one in hypotheses]


@given(seeds, st.data())
@settings(max_examples=60, deadline=None)
def test_a_wide_beam_finds_what_summing_all_paths_finds(seed: int, data: st.DataObject) -> None:
    search = data.draw(searches(EXHAUSTIVE, 6))
    log_probs, lengths = random_log_probs(seed, 3, 4, 2), torch.tensor([4, 1, 3])
    log_probs[torch.arange(4) >= lengths[:, None]] = torch.nan
    for row, (hypotheses, count) in enumerate(zip(ctc_beam(log_probs, lengths, search), lengths, strict=True)):
        expected = ranked_labels(log_probs[row, :count], search)[:6]
        assert [one.tokens for one in hypotheses] == [tokens for _, _, tokens in expected]
        assert [one.total for one in hypotheses] == pytest.approx([total for total, _, _ in expected], abs=1e-9)
        assert [one.score for one in hypotheses] == pytest.approx([score for _, score, _ in expected], abs=1e-9)


@given(seeds, st.data(), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_prefixes_of_a_narrow_beam_stay_distinct_and_keep_their_sums(seed: int, data: st.DataObject, beam: int) -> None:
    """Over many frames a beginning leaves the beam and comes back; found sums are never above the exact ones."""
    search = data.draw(searches(beam, beam))
    log_probs, lengths = random_log_probs(seed, 2, 12, 2, sharpness=0.7), torch.tensor([12, 9])
    for row, hypotheses in enumerate(ctc_beam(log_probs, lengths, search)):
        assert len({tuple(one.tokens) for one in hypotheses}) == len(hypotheses)
        totals = [one.total for one in hypotheses]
        assert totals == sorted(totals, reverse=True)
        for one in hypotheses:
            frames = log_probs[row : row + 1, : lengths[row]]
            likelihood = -torch.nn.functional.ctc_loss(
                frames.transpose(0, 1),
                torch.tensor([one.tokens], dtype=torch.int64),
                lengths[row : row + 1],
                torch.tensor([len(one.tokens)]),
                blank=int(SpecialToken.BLANK),
                reduction="none",
            )
            assert one.score == pytest.approx(likelihood.item(), abs=1e-9)


@given(seeds, st.sampled_from([3, 10, 16]), st.sampled_from([1.0, 2.0, 3.0]))
@settings(max_examples=60, deadline=None)
def test_one_prefix_is_one_hypothesis(seed: int, beam: int, sharpness: float) -> None:
    """Before scoring: the beam itself holds no prefix twice, whatever has left it meanwhile and come back."""
    log_probs, lengths = random_log_probs(seed, 8, 60, 2, sharpness), torch.full((8,), 60)
    found = prefix_beam._search(log_probs, lengths, Search(beam=beam))
    for tokens, counts in zip(found.tokens.tolist(), found.counts.tolist(), strict=True):
        assert len({tuple(row[:count]) for row, count in zip(tokens, counts, strict=True)}) == beam


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_what_a_wide_beam_searches_by_is_the_sum_over_all_paths(seed: int) -> None:
    log_probs = random_log_probs(seed, 2, 4, 2)
    found = prefix_beam._search(log_probs, torch.tensor([4, 4]), Search(beam=EXHAUSTIVE))
    for row, expected in enumerate(map(ctc_sums, log_probs)):
        texts = [tuple(text[:count]) for text, count in zip(found.tokens[row].tolist(), found.counts[row], strict=True)]
        seen = {text: value for text, value in zip(texts, found.sums[row].exp().tolist(), strict=True) if value > 0}
        assert seen == pytest.approx(expected, abs=1e-12)


@given(seeds, st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_no_beam_finds_worse_than_greedy_decoding_or_better_than_the_best(seed: int, beam: int) -> None:
    log_probs, lengths = random_log_probs(seed, 3, 6, 2), torch.tensor([6, 4, 5])
    greedy = ctc_search(log_probs, lengths, GREEDY)
    assert [facts(row) for row in greedy] == [facts([one]) for one in ctc_greedy(log_probs, lengths)]
    for row, (hypotheses, count) in enumerate(
        zip(ctc_search(log_probs, lengths, Search(beam=beam)), lengths, strict=True)
    ):
        best = ranked_labels(log_probs[row, :count], GREEDY)[0][0]
        assert greedy[row][0].score <= hypotheses[0].score <= best + 1e-9


@given(seeds, st.data(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_an_utterance_is_searched_alone_as_in_company(seed: int, data: st.DataObject, beam: int) -> None:
    search = data.draw(searches(beam, min(beam, 3)))
    log_probs, lengths = random_log_probs(seed, 3, 8, 2).float(), torch.tensor([8, 3, 6])
    together = ctc_beam(log_probs, lengths, search)
    for row, count in enumerate(lengths):
        (alone,) = ctc_beam(log_probs[row : row + 1, :count], lengths[row : row + 1], search)
        assert facts(alone) == facts(together[row])


@given(seeds, st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_hypotheses_worth_the_same_come_in_the_order_of_their_tokens(seed: int, beam: int) -> None:
    """In which places of the beam they lie depends on the padding, and so on who is in the batch."""
    search = Search(beam=beam, n_best=beam)
    # Rounded so much that many sums are equal.
    logits = torch.randint(0, 2, (3, 20, FIRST + 2), generator=generator(seed)).double()
    log_probs, lengths = logits.log_softmax(dim=-1), torch.tensor([20, 7, 1])
    together = ctc_beam(log_probs, lengths, search)
    for row, count in enumerate(lengths):
        (alone,) = ctc_beam(log_probs[row : row + 1, :count], lengths[row : row + 1], search)
        assert [one.tokens for one in alone] == [one.tokens for one in together[row]]


@pytest.mark.parametrize("with_rules", [False, True])
def test_what_is_impossible_is_worth_nothing(with_rules: bool) -> None:
    """The likeliest tokens of these frames are A and A with no blank between, which no alignment says."""
    never = float("-inf")
    shares = torch.zeros(3, FIRST + 2, dtype=torch.float64)
    shares[[0, 2], FIRST], shares[[0, 2], FIRST + 1] = 0.9, 0.1
    shares[1, SpecialToken.EOS], shares[1, FIRST + 1] = 0.6, 0.4
    rules = random_rules(FIRST + 2, generator(0)) if with_rules else None
    search = Search(beam=4, n_best=4, language_model=rules, language_model_weight=0.5)
    (found,) = ctc_beam(shares.log()[None], torch.tensor([3]), search)
    scores = {tuple(one.tokens): one.score for one in found}
    assert scores[FIRST, FIRST + 1, FIRST] == pytest.approx(math.log(0.9 * 0.4 * 0.9))
    if not with_rules:
        assert found[0].tokens == [FIRST, FIRST + 1, FIRST]
    assert all(one.score == never for one in found if one.tokens == [FIRST, FIRST])
    # Where nothing is possible at all, there is an answer all the same.
    (nothing,) = ctc_beam(torch.full((1, 3, FIRST + 2), never, dtype=torch.float64), torch.tensor([3]), search)
    assert (nothing[0].tokens, nothing[0].total) == ([], never)


def test_a_token_behind_a_blank_is_another_one() -> None:
    letters = {"A": FIRST, "B": FIRST + 1}
    paths = ["AA", "A-A", "AB", "ABA"]
    for path in paths:
        symbols = [letters.get(letter, int(SpecialToken.BLANK)) for letter in path]
        log_probs = (20.0 * torch.nn.functional.one_hot(torch.tensor([symbols]), FIRST + 2)).double().log_softmax(-1)
        ((best,),) = ctc_beam(log_probs, torch.tensor([len(path)]), replace(GREEDY, beam=3))
        expected = {"AA": "A", "A-A": "AA", "AB": "AB", "ABA": "ABA"}[path]
        assert best.tokens == [letters[letter] for letter in expected]
