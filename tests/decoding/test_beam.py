"""Beam search of attention models, against every sentence that there is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_search import EOS, FIRST, NEVER, SOS, Rules, Speaker, random_rules, ranked_sentences

from sonosco_mlflow.decoding.beam import attention_beam
from sonosco_mlflow.decoding.greedy import Decoded, attention_greedy
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import SpecialToken

# More than there are sentences of three steps over two letters and the end.
EXHAUSTIVE = 16
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def searched(speaker: Speaker, limits: list[int], search: Search) -> list[list[Decoded]]:
    return attention_beam(speaker.steps(search.beam), torch.tensor(limits), search)


@st.composite
def searches(draw: st.DrawFn, beam: int, n_best: int, with_limits: bool = False) -> Search:
    language_model = random_rules(FIRST + 2, generator(draw(seeds))) if draw(st.booleans()) else None
    return Search(
        beam=beam,
        n_best=n_best,
        language_model=language_model,
        language_model_weight=draw(st.sampled_from([0.0, 0.3, 1.0])),
        length_reward=draw(st.sampled_from([0.0, 0.7, -0.4])),
        length_normalisation=draw(st.sampled_from([0.0, 0.6, 1.0])),
        attention_limit=draw(st.sampled_from([None, 1, 2])) if with_limits else None,
        end_threshold=draw(st.sampled_from([None, 0.8, 1.5])) if with_limits else None,
    )


@given(seeds, st.data())
@settings(max_examples=60, deadline=None)
def test_a_wide_beam_finds_what_trying_all_sentences_finds(seed: int, data: st.DataObject) -> None:
    search = data.draw(searches(EXHAUSTIVE, 5, with_limits=True))
    speaker = Speaker.random(generator(seed), 3, 2)
    limits = [3, 1, 2]
    for utterance, hypotheses in enumerate(searched(speaker, limits, search)):
        expected = ranked_sentences(speaker, utterance, limits[utterance], search)
        if not expected:
            # Its limits leave nothing: what is found then is another test's.
            continue
        assert [one.total for one in hypotheses] == pytest.approx([rank for rank, _, _ in expected[:5]], abs=1e-9)
        assert [one.tokens for one in hypotheses] == [tokens for _, _, tokens in expected[:5]]
        assert [one.score for one in hypotheses] == pytest.approx([score for _, score, _ in expected[:5]], abs=1e-9)


@given(seeds, st.sampled_from([0, 1, 2]))
@settings(max_examples=60, deadline=None)
def test_a_beam_of_one_is_greedy_decoding_to_the_last_bit(seed: int, levels: int) -> None:
    """Also where several tokens are equally likely."""
    speaker = Speaker.random(generator(seed), 4, 3)
    if levels:
        speaker.logits = (speaker.logits / 2).round().clamp(-levels, levels).masked_fill(speaker.logits == NEVER, NEVER)
    limits = torch.tensor([7, 1, 3, 5])
    greedy = attention_greedy(speaker.steps(1), limits)
    calls = speaker.calls
    for expected, (found,) in zip(greedy, attention_beam(speaker.steps(1), limits, Search()), strict=True):
        assert (found.tokens, found.score, found.total) == (expected.tokens, expected.score, expected.total)
        assert torch.equal(found.weights, expected.weights)
    assert speaker.calls == 2 * calls


@given(seeds, st.data())
@settings(max_examples=60, deadline=None)
def test_no_beam_finds_worse_than_a_beam_of_one_or_better_than_the_best(seed: int, data: st.DataObject) -> None:
    search = data.draw(searches(1, 1))
    speaker = Speaker.random(generator(seed), 3, 2, sharpness=1.0)
    limits = [5, 4, 5]
    narrow = searched(speaker, limits, search)
    for beam in (2, 3, 7):
        wide = replace(search, beam=beam)
        for utterance, hypotheses in enumerate(searched(speaker, limits, wide)):
            best = ranked_sentences(speaker, utterance, limits[utterance], search)[0][0]
            assert narrow[utterance][0].total <= hypotheses[0].total <= best + 1e-9


@given(seeds, st.data(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_an_utterance_is_searched_alone_as_in_company(seed: int, data: st.DataObject, beam: int) -> None:
    search = data.draw(searches(beam, min(beam, 3), with_limits=True))
    speaker = Speaker.random(generator(seed), 3, 2)
    limits = [6, 2, 4]
    together = searched(speaker, limits, search)
    for utterance, limit in enumerate(limits):
        (alone,) = searched(speaker.only(utterance), [limit], search)
        assert [(one.tokens, one.score, one.total) for one in alone] == [
            (one.tokens, one.score, one.total) for one in together[utterance]
        ]
        for one, other in zip(alone, together[utterance], strict=True):
            assert torch.equal(one.weights, other.weights)


@given(seeds, st.data(), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_n_best_are_sorted_distinct_and_scored_as_what_they_are(seed: int, data: st.DataObject, beam: int) -> None:
    search = data.draw(searches(beam, beam))
    speaker = Speaker.random(generator(seed), 2, 2)
    limits = [5, 4]
    for utterance, hypotheses in enumerate(searched(speaker, limits, search)):
        totals = [one.total for one in hypotheses]
        assert totals == sorted(totals, reverse=True)
        assert len({tuple(one.tokens) for one in hypotheses}) == len(hypotheses)
        known = {
            tuple(tokens): (rank, score)
            for rank, score, tokens in ranked_sentences(speaker, utterance, limits[utterance], search)
        }
        for one in hypotheses:
            if len(one.tokens) < limits[utterance]:
                assert (one.total, one.score) == pytest.approx(known[tuple(one.tokens)], abs=1e-9)


def test_weights_are_those_of_the_hypothesis_own_steps() -> None:
    speaker = Speaker.random(generator(5), 2, 2)
    for utterance, hypotheses in enumerate(searched(speaker, [6, 6], Search(beam=4, n_best=4))):
        for one in hypotheses:
            ended = len(one.tokens) < len(one.weights)
            steps = [*one.tokens, EOS] if ended else one.tokens
            expected = [speaker.plainly(utterance, steps[:step])[1] for step in range(len(steps))]
            assert one.weights.argmax(dim=-1).tolist() == expected


def speaking(sentences: dict[tuple[int, ...], dict[int, float]], peaks: dict[tuple[int, ...], int]) -> Speaker:
    """A speaker that says these with these probabilities behind what was said; with any other it ends."""
    logits = torch.full((1, 97, FIRST + 3), NEVER)
    logits[..., EOS] = 0.0
    looks = torch.zeros(1, 97, dtype=torch.int64)
    for said in {*sentences, *peaks}:
        situation = 0
        for token in said:
            situation = (31 * situation + token) % 97
        looks[0, situation] = peaks.get(said, 0)
        for token, probability in sentences.get(said, {}).items():
            logits[0, situation, token] = torch.tensor(probability).log()
        logits[0, situation, EOS] = torch.tensor(sentences.get(said, {}).get(EOS, 1.0)).log()
    return Speaker(logits, looks, 10)


A, B, C = FIRST, FIRST + 1, FIRST + 2


def test_steps_whose_attention_leaps_are_ruled_out() -> None:
    speaker = speaking({(): {A: 0.6, B: 0.4, EOS: 1e-9}, (A,): {}, (B,): {}}, {(): 0, (A,): 7, (B,): 3})
    found = {
        limit: searched(speaker, [5], Search(beam=3, n_best=3, attention_limit=limit))[0] for limit in (None, 7, 6, 3)
    }
    assert [one.tokens for one in found[None]] == [one.tokens for one in found[7]] == [[A], [B], []]
    assert [one.tokens for one in found[6]] == [one.tokens for one in found[3]] == [[B], []]


def test_where_the_limits_leave_nothing_a_step_is_taken_without_them() -> None:
    speaker = speaking({(): {A: 0.6, B: 0.4, EOS: 0.0}, (A,): {}, (B,): {}}, {(): 0, (A,): 7, (B,): 3})
    (found,) = searched(speaker, [5], Search(beam=3, n_best=3, attention_limit=2))
    assert [one.tokens for one in found] == [[A], [B]]


def test_an_end_below_the_threshold_is_not_considered() -> None:
    """log 0.3 > 1.2 log 0.35 holds, log 0.3 > 1.1 log 0.35 does not."""
    speaker = speaking({(): {A: 0.35, B: 0.35, EOS: 0.3}, (A,): {}, (B,): {}}, {})
    lenient, strict = (
        searched(speaker, [5], Search(beam=4, n_best=4, end_threshold=threshold))[0] for threshold in (1.2, 1.1)
    )
    assert sorted(one.tokens for one in lenient) == [[], [A], [B]]
    assert sorted(one.tokens for one in strict) == [[A], [B]]


def test_the_search_ends_when_nothing_better_can_come() -> None:
    """Where the end is nearly certain, one step is enough for the best; a second hypothesis takes another."""
    speaker = speaking({(): {A: 0.01, EOS: 0.99}, (A,): {A: 0.5, EOS: 0.5}}, {})
    searched(speaker, [9], Search(beam=2))
    assert speaker.calls == 1
    searched(speaker, [9], Search(beam=2, n_best=2))
    assert speaker.calls == 3


def test_utterances_that_are_done_are_searched_no_more() -> None:
    speaker = Speaker.random(generator(2), 4, 3)
    speaker.logits[..., EOS] = NEVER
    searched(speaker, [1, 8, 1, 3], Search(beam=2))
    assert speaker.calls == 8
    assert speaker.rows == 2 * (4 + 2 + 2 + 5 * 1)


def test_a_reward_to_come_keeps_the_search_going() -> None:
    """A second token is unlikely, but once it is said each further one is certain, and rewarded."""
    says = {(A,) * count: {A: 1.0, EOS: 1e-9} for count in range(1, 6)}
    speaker = speaking({(): {A: 0.01, EOS: 0.99}, **says}, {})
    ((best,),) = searched(speaker, [5], Search(beam=2, length_reward=2.0))
    assert best.tokens == [A] * 5
    assert best.total == pytest.approx(torch.tensor(0.01).log().item() + 10.0, abs=1e-6)


def test_a_length_to_come_keeps_the_search_going() -> None:
    """What the language model holds against the first token weighs less the longer the sentence is."""
    says = {(A,) * count: {A: 1.0, EOS: 1e-9} for count in range(1, 12)}
    speaker = speaking({(): {A: 0.5, EOS: 0.5}, **says}, {})
    rules = Rules(torch.zeros(FIRST + 3, FIRST + 3))
    rules.table[SOS, A] = -5.0
    search = Search(beam=2, language_model=rules, language_model_weight=1.0, length_normalisation=1.0)
    ((best,),) = searched(speaker, [12], search)
    assert best.tokens == [A] * 12
    assert best.total == pytest.approx((torch.tensor(0.5).log().item() - 5.0) / 12, abs=1e-6)


def test_a_beam_of_one_is_done_when_its_path_has_ended() -> None:
    """Divided by its length the longer one is better; to go on to it takes a beam of two."""
    speaker = speaking({(): {A: 0.4, EOS: 0.6}, (A,): {}}, {})
    for beam, expected in ((1, []), (2, [A])):
        ((best,),) = searched(speaker, [5], Search(beam=beam, length_normalisation=1.0))
        assert best.tokens == expected


def test_sentences_that_differ_in_special_tokens_alone_are_one() -> None:
    pad = int(SpecialToken.PAD)
    speaker = speaking({(): {pad: 0.3, EOS: 0.7}, (pad,): {}}, {})
    (found,) = searched(speaker, [5], Search(beam=3, n_best=3))
    assert [one.tokens for one in found] == [[]]
    assert found[0].score == pytest.approx(torch.tensor(0.7).log().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"beam": 0}, "decoding.beam: found 0, expected a number above 0"),
        ({"beam": 2, "n_best": 3}, "3 hypotheses are wanted of a beam of 2"),
        ({"language_model_weight": -1.0}, "decoding.language_model_weight: found -1.0, expected 0 or more"),
        ({"attention_limit": 0}, "decoding.attention_limit: found 0"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, float], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Search(**wrong)
