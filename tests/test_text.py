from pathlib import Path
from typing import cast

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import CharacterTokenizer, SpecialToken
from sonosco_mlflow.vocabulary import read_tokenizer


@given(st.lists(st.text(max_size=20), max_size=5))
def test_texts_come_back(texts: list[str]) -> None:
    tokenizer = CharacterTokenizer.of(texts)
    for text in texts:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert len(tokens) == len(text)
        assert all(len(SpecialToken) <= token < tokenizer.vocabulary_size for token in tokens)


def test_special_tokens_are_ids_of_their_own_and_stand_for_nothing() -> None:
    tokenizer = CharacterTokenizer(["A", "B"])
    assert len(set(SpecialToken)) == 5
    assert not set(tokenizer.encode("ABBA")) & set(SpecialToken)
    assert tokenizer.decode([*SpecialToken, *tokenizer.encode("AB"), SpecialToken.EOS]) == "AB"
    assert tokenizer.vocabulary_size == 7


def test_an_unknown_character_is_one_unknown_token() -> None:
    assert CharacterTokenizer(["A"]).encode("AxA") == [5, SpecialToken.UNKNOWN, 5]


def test_the_alphabet_is_in_code_point_order_whatever_the_order_of_texts() -> None:
    one, other = CharacterTokenizer.of(["CAB", "Ä A"]), CharacterTokenizer.of(["Ä", "ABC "])
    assert one.alphabet == other.alphabet == (" ", "A", "B", "C", "Ä")
    assert one.digest == other.digest
    assert one.digest != CharacterTokenizer.of(["CAB"]).digest


def test_a_vocabulary_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    CharacterTokenizer(["Ä", "'", '"']).write(path)
    assert cast(CharacterTokenizer, read_tokenizer(path)).alphabet == ("Ä", "'", '"')
    assert "Ä" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("alphabet", [["A", "A"], ["AB"], [""]])
def test_an_alphabet_that_is_none_is_refused(alphabet: list[str]) -> None:
    with pytest.raises(UserError, match="single characters, each once"):
        CharacterTokenizer(alphabet)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "{", '{"alphabet": ["A"]}', '{"tokenizer": "letters"}'),
        '{"tokenizer": "characters", "alphabet": 3}',
        '{"tokenizer": "word_pieces", "pieces": ["A"], "scores": []}',
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"vocabulary\.json: not a vocabulary"):
        read_tokenizer(path)


def test_a_missing_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such vocabulary"):
        read_tokenizer(tmp_path / "vocabulary.json")
