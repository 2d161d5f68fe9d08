import itertools
import random
import re
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
from hypothesis import given

from sonosco_mlflow.determinism import random_stream
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.text import SpecialToken
from sonosco_mlflow.vocabulary import make_tokenizer, read_tokenizer
from sonosco_mlflow.word_pieces import BEST, SPACE, WordPieceTokenizer

SYLLABLES = [
    "ZE",
    "RO",
    "ON",
    "TWO",
    "THR",
    "EE",
    "FO",
    "UR",
    "FIF",
    "TEEN",
    "SE",
    "VEN",
    "EI",
    "GHT",
    "TY",
    "NI",
    "NE",
]
LETTERS = sorted(set("".join(SYLLABLES)))
SMALL = WordPieceTokenizer([SPACE, *LETTERS, "EN", "▁SE", "TEE"], [-3.0] + [-4.0] * len(LETTERS) + [-4.0, -5.0, -6.0])

DENSE = WordPieceTokenizer([SPACE, "A", "B", "AB", "BA", "ABA", "▁A"], [-2.0, -3.1, -3.3, -4.4, -4.7, -5.9, -3.6])


def sentences(count: int = 300) -> list[str]:
    """Words of two or three syllables, so that none of them is frequent and their parts are."""
    stream = np.random.default_rng(0)

    def word() -> str:
        return "".join(SYLLABLES[i] for i in stream.integers(len(SYLLABLES), size=stream.integers(2, 4)))

    return [" ".join(word() for _ in range(stream.integers(1, 6))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.of(sentences(), 60)


def pieces_of(tokenizer: WordPieceTokenizer, tokens: list[int]) -> list[str]:
    return [tokenizer.pieces[token - len(SpecialToken)] for token in tokens]


def enumerated(tokenizer: WordPieceTokenizer, word: str) -> dict[tuple[str, ...], float]:
    """Every segmentation of ``word`` with its score, by trying all of them."""
    score = dict(zip(tokenizer.pieces, tokenizer.scores, strict=True))
    found = {}
    for cuts in itertools.product([False, True], repeat=len(word) - 1):
        bounds = [0, *(i for i, cut in enumerate(cuts, start=1) if cut), len(word)]
        parts = tuple(word[start:end] for start, end in itertools.pairwise(bounds))
        if all(part in score for part in parts):
            found[parts] = sum(score[part] for part in parts)
    return found


def test_the_vocabulary_has_about_its_size_and_every_character(tokenizer: WordPieceTokenizer) -> None:
    assert len(tokenizer.pieces) == 60
    assert {SPACE, *LETTERS} <= set(tokenizer.pieces)
    assert tokenizer.vocabulary_size == 60 + len(SpecialToken)
    assert max(map(len, tokenizer.pieces)) > 2
    few = WordPieceTokenizer.of(["AB BA"], 500)
    assert {SPACE, "A", "B"} <= set(few.pieces)
    assert len(few.pieces) < 20


def test_the_same_texts_give_the_same_bytes_in_any_order(tokenizer: WordPieceTokenizer, tmp_path: Path) -> None:
    texts = sentences()
    random.Random(1).shuffle(texts)
    again = WordPieceTokenizer.of(iter(texts), 60)
    assert again.digest == tokenizer.digest
    for name, one in {"a": tokenizer, "b": again}.items():
        one.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert WordPieceTokenizer.of(texts, 61).digest != tokenizer.digest


def test_a_vocabulary_comes_back_from_its_file_and_from_a_document(
    tokenizer: WordPieceTokenizer, tmp_path: Path
) -> None:
    tokenizer.write(tmp_path / "vocabulary.json")
    document = Serializer().describe(tokenizer)
    for again in (read_tokenizer(tmp_path / "vocabulary.json"), Deserializer().build(document)):
        assert isinstance(again, WordPieceTokenizer)
        assert (again.pieces, again.scores, again.digest) == (tokenizer.pieces, tokenizer.scores, tokenizer.digest)


def test_it_spells_as_sentencepiece_does(tokenizer: WordPieceTokenizer, tmp_path: Path) -> None:
    """SentencePiece itself, given the same texts, is the judge."""
    model = tmp_path / "judge"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(sentences())),
        model_prefix=str(model),
        vocab_size=61,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    judge = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
    assert [judge.id_to_piece(i) for i in range(1, judge.get_piece_size())] == list(tokenizer.pieces)
    stream = np.random.default_rng(1)
    made_up = ["".join(LETTERS[i] for i in stream.integers(len(LETTERS), size=7)) for _ in range(200)]
    for text in [*sentences(50), *made_up, "ONE  TWO ", " ONE"]:
        assert pieces_of(tokenizer, tokenizer.encode(text)) == judge.encode(text, out_type=str), text
    for word in ("FOURTEEVEN", "SEVENTY", "ZERO", "FIFTEENVEN", "E"):
        found = [pieces_of(tokenizer, tokens) for tokens in tokenizer.segmentations(SPACE + word, BEST)]
        assert found == judge.nbest_encode(word, nbest_size=BEST, out_type=str)


@pytest.mark.parametrize("count", [1, 3, 10, 10_000])
def test_the_best_segmentations_are_the_best_of_all(count: int, tokenizer: WordPieceTokenizer) -> None:
    for spells, word in ((tokenizer, "▁TWONE"), (DENSE, "▁ABABAB"), (DENSE, "▁AAB"), (DENSE, "▁")):
        every = enumerated(spells, word)
        found = [tuple(pieces_of(spells, tokens)) for tokens in spells.segmentations(word, count)]
        assert len(found) == len(set(found)) == min(count, len(every))
        best = sorted(every.values(), reverse=True)[:count]
        assert [every[parts] for parts in found] == pytest.approx(best, abs=1e-10)


@given(st.text(alphabet=[*LETTERS, " ", "?"], max_size=30), st.integers(0, 5))
def test_texts_come_back_however_they_are_spelled(text: str, key: int) -> None:
    for tokens in (SMALL.encode(text), SMALL.sampled(text, 0.5, random_stream(key))):
        assert SMALL.decode(tokens) == text.replace("?", "")
        assert tokens.count(SpecialToken.UNKNOWN) == text.count("?")
        assert all(token == SpecialToken.UNKNOWN or token >= len(SpecialToken) for token in tokens)


def test_words_are_sampled_with_their_probability_from_the_ten_best() -> None:
    allowed = {tuple(tokens) for tokens in DENSE.segmentations("▁ABABAB", BEST)}
    assert len(allowed) == BEST < len(enumerated(DENSE, "▁ABABAB"))
    best = tuple(DENSE.encode("ABABAB"))
    stream = random_stream("words")
    drawn = Counter(tuple(DENSE.sampled("ABABAB", 0.5, stream)) for _ in range(4000))
    assert drawn.keys() == allowed
    assert drawn[best] / 4000 == pytest.approx(0.5 + 0.5 / BEST, abs=0.04)
    for other in allowed - {best}:
        assert drawn[other] / 4000 == pytest.approx(0.5 / BEST, abs=0.02)
    # Each word has a draw of its own.
    spelled = [tuple(DENSE.sampled("ABABAB ABABAB", 0.5, stream)) for _ in range(200)]
    halves = [tokens[: len(best)] == best and tokens[len(best) :] != best for tokens in spelled]
    assert any(halves)


def test_without_sampling_it_is_the_likeliest_spelling() -> None:
    text = "ABABAB BAB"
    assert DENSE.sampled(text, 0.0, random_stream(1)) == DENSE.encode(text)
    assert DENSE.sampled(text, 1.0, random_stream(1)) == DENSE.sampled(text, 1.0, random_stream(1))


def test_special_tokens_stand_for_nothing_and_no_text_has_no_tokens(tokenizer: WordPieceTokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([SpecialToken.SOS, *tokenizer.encode("ONE TWO"), SpecialToken.EOS]) == "ONE TWO"


def test_fewer_pieces_than_characters_are_refused() -> None:
    count = len(LETTERS) + 1
    with pytest.raises(UserError, match=rf"tokenizer\.size: found {count}, expected more than {count}, the number of"):
        make_tokenizer("word_pieces", count, sentences())
    assert make_tokenizer("word_pieces", count + 1, sentences()).vocabulary_size > count


@pytest.mark.parametrize(("pieces", "scores"), [(["A", "A"], [0.0, 0.0]), (["A"], []), ([""], [0.0])])
def test_pieces_that_are_none_are_refused(pieces: list[str], scores: list[float]) -> None:
    with pytest.raises(UserError, match="expected as many, each piece once"):
        WordPieceTokenizer(pieces, scores)


@pytest.mark.parametrize("character", ["▅", "▁", "\0"])
def test_characters_that_sentencepiece_has_for_itself_are_refused(character: str) -> None:
    with pytest.raises(UserError, match=f"hold {re.escape(repr(character))}, which SentencePiece has for itself"):
        WordPieceTokenizer.of([f"HELLO X{character}Y", "WORLD"], 40)
