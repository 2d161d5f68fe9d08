"""Decoding with a language model over words, against every path that there is."""

import math
from pathlib import Path

import pytest
import torch
from plain_ngram import PlainModel
from plain_search import ctc_sums

from sonosco_mlflow.decoding.arpa import write_arpa
from sonosco_mlflow.decoding.ctc import ctc_search
from sonosco_mlflow.decoding.kneser_ney import train_ngrams
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.decoding.words import WordLanguageModel
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import CharacterTokenizer, SpecialToken

TOKENIZER = CharacterTokenizer([" ", "A", "B"])
WORDS = ["A", "AB", "B"]


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    path = tmp_path / "words.arpa"
    write_arpa(train_ngrams([[0, 1], [1, 2, 2], [0, 0, 1], [1]], WORDS, 2), path)
    return path


def random_log_probs(seed: int, batch: int, frames: int) -> torch.Tensor:
    logits = torch.randn(batch, frames, TOKENIZER.vocabulary_size, generator=torch.Generator().manual_seed(seed))
    logits[..., [SpecialToken.PAD, SpecialToken.SOS, SpecialToken.EOS, SpecialToken.UNKNOWN]] = -1e9
    return (2.0 * logits).log_softmax(dim=-1)


def test_what_is_found_is_the_best_sequence_of_words(arpa: Path) -> None:
    search = Search(500, 3, WordLanguageModel.read(arpa, TOKENIZER), language_model_weight=0.6, length_reward=0.3)
    plain = PlainModel(arpa)
    lengths = torch.tensor([5, 3, 4])
    for seed in range(10):
        log_probs = random_log_probs(seed, 3, 5)
        for row, hypotheses in enumerate(ctc_search(log_probs, lengths, search)):
            sums: dict[tuple[str, ...], float] = {}
            for said, probability in ctc_sums(log_probs[row, : lengths[row]]).items():
                words = tuple(TOKENIZER.decode(said).split())
                if set(words) <= set(WORDS):
                    sums[words] = sums.get(words, 0.0) + probability
            totals = {
                words: math.log(probability)
                + 0.3 * len(words)
                + 0.6 * sum(plain.log_prob(["<s>", *words[:i]], word) for i, word in enumerate([*words, "</s>"]))
                for words, probability in sums.items()
            }
            best = sorted(totals, key=lambda words: -totals[words])[:3]
            assert [TOKENIZER.decode(one.tokens) for one in hypotheses] == [" ".join(words) for words in best]
            assert [one.total for one in hypotheses] == pytest.approx([totals[words] for words in best], abs=1e-3)
            exact = ctc_sums(log_probs[row, : lengths[row]])
            assert [one.score for one in hypotheses] == pytest.approx(
                [math.log(exact[tuple(one.tokens)]) for one in hypotheses], abs=1e-4
            )


def test_an_utterance_is_searched_alone_as_in_company(arpa: Path) -> None:
    search = Search(4, 2, WordLanguageModel.read(arpa, TOKENIZER))
    log_probs, lengths = random_log_probs(3, 3, 9), torch.tensor([9, 4, 6])
    together = ctc_search(log_probs, lengths, search)
    for row, count in enumerate(lengths):
        (alone,) = ctc_search(log_probs[row : row + 1, :count], lengths[row : row + 1], search)
        assert [(one.tokens, one.score, one.total) for one in alone] == [
            (one.tokens, one.score, one.total) for one in together[row]
        ]


def test_there_is_always_a_hypothesis(arpa: Path) -> None:
    """Of certain letters that make no word, too."""
    search = Search(2, 1, WordLanguageModel.read(arpa, TOKENIZER))
    tokens = torch.tensor([TOKENIZER.encode("BABB")])
    log_probs = torch.full((1, 4, TOKENIZER.vocabulary_size), -1e30).scatter(2, tokens[..., None], 0.0)
    ((found,),) = ctc_search(log_probs, torch.tensor([4]), search)
    assert found.tokens is not None


def test_a_copy_of_its_state_decodes_the_same(arpa: Path) -> None:
    model = WordLanguageModel.read(arpa, TOKENIZER)
    twin = WordLanguageModel(TOKENIZER, len(model.content))
    twin.load_state_dict(model.state_dict())
    arpa.unlink()
    log_probs, lengths = random_log_probs(1, 2, 8), torch.tensor([8, 8])
    one, other = (ctc_search(log_probs, lengths, Search(5, 5, each)) for each in (model, twin))
    assert [[found.tokens for found in row] for row in one] == [[found.tokens for found in row] for row in other]


def test_words_that_the_tokens_cannot_spell_are_refused(arpa: Path) -> None:
    with pytest.raises(UserError, match=r"words.arpa: the vocabulary's tokens spell none of its words"):
        WordLanguageModel.read(arpa, CharacterTokenizer(["X"]))
