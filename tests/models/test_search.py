"""Every model, trained a little, is searched by every means."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.loader import Batch, collate
from sonosco_mlflow.decoding.arpa import write_arpa
from sonosco_mlflow.decoding.greedy import ctc_log_likelihood
from sonosco_mlflow.decoding.kneser_ney import train_ngrams
from sonosco_mlflow.decoding.ngram import TokenLanguageModel
from sonosco_mlflow.decoding.search import GREEDY, Search
from sonosco_mlflow.decoding.symbols import token_symbols
from sonosco_mlflow.decoding.words import WordLanguageModel
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.models.attention import AttentionModel, shifted
from sonosco_mlflow.models.base import Hypothesis, SpeechModel
from sonosco_mlflow.text import CharacterTokenizer, SpecialToken

VARIANTS = {
    "deepspeech2": ("deepspeech2", {}),
    "las": ("las", {}),
    "las-input-feeding": ("las", {"input_feeding": True, "speller_layers": 2}),
    "tds": ("tds", {}),
    "tds-ctc": ("tds", {"ctc_weight": 0.5}),
}
# The narrow ones differ from greedy decoding, the wide ones find nothing new.
WIDTHS = (1, 2, 4, 8, 16)
STATES: dict[str, dict[str, torch.Tensor]] = {}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, build: Callable[..., SpeechModel], batch: Batch) -> SpeechModel:
    """Each model, uncertain of what it has half learnt."""
    name, settings = VARIANTS[request.param]
    model = build(name, **settings)
    if request.param not in STATES:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(10 if request.param == "deepspeech2" else 25):
            model.soft_window = True
            optimizer.zero_grad()
            model(batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        STATES[request.param] = model.state_dict()
    model.load_state_dict(STATES[request.param])
    return model.eval()


@pytest.fixture
def language_model(tokenizer: CharacterTokenizer, batch: Batch, tmp_path: Path) -> TokenLanguageModel:
    sentences = [[token - len(SpecialToken) for token in tokenizer.encode(text)] for text in batch.texts]
    write_arpa(train_ngrams(sentences, token_symbols(tokenizer), 4), tmp_path / "tokens.arpa")
    return TokenLanguageModel.read(tmp_path / "tokens.arpa", tokenizer)


def likelihood(model: SpeechModel, sample: Sample, one: Hypothesis) -> float:
    """What forced decoding says of a hypothesis."""
    batch = collate([Sample("", "", sample.features, torch.tensor(one.tokens, dtype=torch.int64))])
    with torch.no_grad():
        output = model(batch)
    if not isinstance(model, AttentionModel):
        return -float(output.loss) * max(len(one.tokens), 1)
    _, targets = shifted(batch.tokens, batch.token_lengths)
    log_probs = output.logits.log_softmax(dim=-1)[0].gather(1, targets[0][:, None])
    # One that came to the limit has no end of sentence.
    return float(log_probs[: len(one.alignment)].sum())


def test_one_hypothesis_is_greedy_decoding(model: SpeechModel, batch: Batch) -> None:
    for found, (searched,) in zip(model.decode(batch), model.search(batch, GREEDY), strict=True):
        assert (found.tokens, found.score) == (searched.tokens, searched.score)
        assert torch.equal(found.alignment, searched.alignment)


def test_a_wider_beam_scores_no_worse(model: SpeechModel, batch: Batch) -> None:
    scores = [[one.score for one in model.decode(batch, Search(beam=width))] for width in WIDTHS]
    for narrow, wide in pairwise(scores):
        assert all(second >= first - 1e-4 for first, second in zip(narrow, wide, strict=True))
    assert sum(scores[-1]) > sum(scores[0])


def test_hypotheses_are_scored_as_the_model_scores_them(
    model: SpeechModel, batch: Batch, samples: list[Sample], language_model: TokenLanguageModel
) -> None:
    search = Search(4, 4, language_model, language_model_weight=0.5, length_reward=0.2)
    for sample, hypotheses in zip(samples, model.search(batch, search), strict=True):
        totals = [one.total for one in hypotheses]
        assert totals == sorted(totals, reverse=True)
        assert len({tuple(one.tokens) for one in hypotheses}) == len(hypotheses)
        for one in hypotheses:
            assert one.score == pytest.approx(likelihood(model, sample, one), abs=1e-3)
            states = language_model.start(1)
            total = one.score + 0.2 * len(one.tokens)
            ended = not isinstance(model, AttentionModel) or len(one.alignment) > len(one.tokens)
            for token in [*one.tokens, *([int(SpecialToken.EOS)] if ended else [])]:
                total += 0.5 * language_model.log_probs(states)[0, token].item()
                states = language_model.advance(states, torch.tensor([token]))
            assert one.total == pytest.approx(total, abs=1e-3)


def test_attention_and_ctc_are_both_asked_of_each_sentence(
    build: Callable[..., SpeechModel], batch: Batch, samples: list[Sample]
) -> None:
    model = build("las", ctc_weight=0.3)
    model.ctc_output.weight.data *= 20.0
    model.eval()
    search = Search(4, 4, ctc_weight=0.4)
    for sample, hypotheses in zip(samples, model.search(batch, search), strict=True):
        alone = model.search(collate([sample]), search)[0]
        assert [one.tokens for one in alone] == [one.tokens for one in hypotheses]
        for one in hypotheses:
            ended = len(one.alignment) > len(one.tokens)
            with torch.no_grad():
                memory = model.encode(sample.features[None], torch.tensor([len(sample.features)]))
                heard = model.ctc_output(memory.values).log_softmax(dim=-1).double()
            tokens = torch.tensor([one.tokens], dtype=torch.int64)
            of_ctc = float(ctc_log_likelihood(heard, memory.lengths, tokens, torch.tensor([len(one.tokens)])))
            assert ended
            assert one.score == pytest.approx(0.6 * likelihood(model, sample, one) + 0.4 * of_ctc, abs=1e-3)


def test_ctc_is_not_asked_where_it_was_not_trained(build: Callable[..., SpeechModel], batch: Batch) -> None:
    with pytest.raises(UserError, match=r"decoding.ctc_weight: found 0.3, but this model was trained without CTC"):
        build("tds").eval().search(batch, Search(ctc_weight=0.3))
    with pytest.raises(UserError, match=r"decoding.ctc_weight: found 0.3, but DeepSpeech2 has no attention"):
        build("deepspeech2").eval().search(batch, Search(ctc_weight=0.3))


def test_an_utterance_is_searched_alone_as_in_company(
    model: SpeechModel, batch: Batch, samples: list[Sample], language_model: TokenLanguageModel
) -> None:
    search = Search(4, 2, language_model)
    for sample, together in zip(samples, model.search(batch, search), strict=True):
        (alone,) = model.search(collate([sample]), search)
        assert [one.tokens for one in alone] == [one.tokens for one in together]
        assert [one.total for one in alone] == pytest.approx([one.total for one in together], abs=1e-3)
        torch.testing.assert_close(alone[0].alignment, together[0].alignment, rtol=0, atol=1e-4)


def test_searching_changes_nothing(model: SpeechModel, batch: Batch) -> None:
    generator, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    model.search(batch, Search(beam=3))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_a_kind_of_model_does_not_know_is_refused(
    model: SpeechModel, batch: Batch, tokenizer: CharacterTokenizer, tmp_path: Path
) -> None:
    write_arpa(train_ngrams([[0]], ["ABBA"], 2), tmp_path / "words.arpa")
    words = Search(4, 1, WordLanguageModel.read(tmp_path / "words.arpa", tokenizer))
    if isinstance(model, AttentionModel):
        with pytest.raises(UserError, match=r"decoding.language_model: an attention model asks for the next token"):
            model.search(batch, words)
        assert all(math.isfinite(one.total) for one in model.decode(batch, Search(2, attention_limit=3)))
    else:
        assert {tokenizer.decode(one.tokens).split(" ")[0] for one in model.decode(batch, words)} <= {"ABBA", ""}
        with pytest.raises(UserError, match=r"decoding.attention_limit: found 3, but DeepSpeech2 has no attention"):
            model.search(batch, Search(2, attention_limit=3))
