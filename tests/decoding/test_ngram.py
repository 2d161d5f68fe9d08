"""The n-gram as tensors, against ARPA's definition written down plainly, and KenLM."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from plain_ngram import PlainModel, plain_kneser_ney

from sonosco_mlflow.decoding.arpa import read_arpa, write_arpa
from sonosco_mlflow.decoding.kneser_ney import train_ngrams
from sonosco_mlflow.decoding.ngram import TokenLanguageModel
from sonosco_mlflow.decoding.symbols import token_symbols
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import CharacterTokenizer, SpecialToken

TOKENIZER = CharacterTokenizer([" ", "A", "B", "C"])
FIRST, EOS, UNKNOWN = len(SpecialToken), int(SpecialToken.EOS), int(SpecialToken.UNKNOWN)
texts = st.lists(st.text("ABC ", max_size=8), min_size=1, max_size=12)


def trained(folder: Path, texts: Sequence[str], order: int) -> Path:
    path = folder / "trained.arpa"
    sentences = [[token - FIRST for token in TOKENIZER.encode(text)] for text in texts]
    write_arpa(train_ngrams(sentences, token_symbols(TOKENIZER), order), path)
    return path


def spelled(said: Sequence[int]) -> list[str]:
    names = dict(enumerate(token_symbols(TOKENIZER), FIRST)) | {EOS: "</s>", UNKNOWN: "<unk>"}
    return [names[token] for token in said]


def assert_agrees(model: TokenLanguageModel, plain: PlainModel, said: Sequence[int]) -> None:
    """Behind each beginning of ``said``, all next tokens; several histories at once."""
    states = model.start(2)
    for place in range(len(said) + 1):
        found = model.log_probs(states)
        assert torch.equal(found[0], found[1])
        for token in (EOS, UNKNOWN, *range(FIRST, TOKENIZER.vocabulary_size)):
            expected = plain.log_prob(["<s>", *spelled(said[:place])], spelled([token])[0])
            assert found[0, token].item() == pytest.approx(expected, abs=1e-10)
        assert found[0, [SpecialToken.PAD, SpecialToken.BLANK, SpecialToken.SOS]].tolist() == [-math.inf] * 3
        if place < len(said):
            states = model.advance(states, torch.tensor([said[place]] * 2))


@given(texts, st.text("ABC ", max_size=8), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_the_file_by_definition(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], said: str, order: int
) -> None:
    assume(order <= 2 + max(map(len, texts)))
    path = trained(tmp_path_factory.getbasetemp(), texts, order)
    assert_agrees(TokenLanguageModel.read(path, TOKENIZER), PlainModel(path), TOKENIZER.encode(said))


# A pruned one, as other programs write them: the longest end of a history may be missing.
PRUNED = """a comment of SRILM's

\\data\\
ngram 1=6
ngram 2=4
ngram 3=3

\\1-grams:
-1.2\t</s>
-99\t<s>\t-0.3
-0.9\tA\t-0.21
-0.7\tB\t-0.13
-0.8\t▁\t-0.4
-2\t<unk>

\\2-grams:
-0.4 <s> A -0.11
-0.3 A B -0.25
-0.6 B A
-0.2 ▁ B -0.31

\\3-grams:
-0.15 <s> A B
-0.12 A B A
-0.07 ▁ B </s>

\\end\\
"""


@given(st.text("ABC ", max_size=9))
@settings(max_examples=100, deadline=None)
def test_a_pruned_file_of_another_program_is_scored_by_definition(
    tmp_path_factory: pytest.TempPathFactory, said: str
) -> None:
    """C is no word of it: it is heard as <unk>, and nothing is remembered across it."""
    path = tmp_path_factory.getbasetemp() / "pruned.arpa"
    path.write_text(PRUNED, encoding="utf-8")
    tokens = TOKENIZER.encode(said)
    plain = PlainModel(path)
    model = TokenLanguageModel.read(path, TOKENIZER)
    heard = [UNKNOWN if token == TOKENIZER.encode("C")[0] else token for token in tokens]
    states = model.start(1)
    for place in range(len(tokens) + 1):
        found = model.log_probs(states)[0]
        for token in (EOS, UNKNOWN, *TOKENIZER.encode(" AB")):
            expected = plain.log_prob(["<s>", *spelled(heard[:place])], spelled([token])[0])
            assert found[token].item() == pytest.approx(expected, abs=1e-10)
        assert found[TOKENIZER.encode("C")[0]] == found[UNKNOWN]
        if place < len(tokens):
            states = model.advance(states, torch.tensor([tokens[place]]))


def test_different_histories_are_asked_at_once(tmp_path: Path) -> None:
    model = TokenLanguageModel.read(trained(tmp_path, ["ABC A", "CAB", "BB ", "ACCA"], 4), TOKENIZER)
    stream = random.Random(3)
    histories = [[stream.choice(TOKENIZER.encode("ABC ")) for _ in range(6)] for _ in range(50)]
    together = model.start(50)
    for step in range(6):
        together = model.advance(together, torch.tensor([history[step] for history in histories]))
    for row, history in enumerate(histories):
        alone = model.start(1)
        for token in history:
            alone = model.advance(alone, torch.tensor([token]))
        assert torch.equal(model.log_probs(alone)[0], model.log_probs(together)[row])
    assert model.log_probs(together[:0]).shape == (0, TOKENIZER.vocabulary_size)


@given(texts, st.integers(1, 4))
# Counts that would leave a discount of 0, and by it nothing for what was never seen.
@example(["AA", "AA", "AA", "AB", "AB", "AC", "BA", "BA", "ACA", "A AAAAAA"], 3)
@settings(max_examples=80, deadline=None)
def test_training_is_modified_kneser_ney(texts: list[str], order: int) -> None:
    sentences = [[token - FIRST for token in TOKENIZER.encode(text)] for text in texts]
    names = token_symbols(TOKENIZER)
    if order > 2 + max(map(len, texts)):
        with pytest.raises(UserError, match=f"no sentence has an n-gram of {3 + max(map(len, texts))} words"):
            train_ngrams(sentences, names, order)
        return
    ngrams = train_ngrams(sentences, names, order)
    expected = plain_kneser_ney([[names[word] for word in sentence] for sentence in sentences], names, order)
    keys: list[tuple[str, ...]] = [()]
    for found in ngrams.orders:
        keys = [(*keys[parent], ngrams.words[word]) for parent, word in zip(found.parents, found.words, strict=True)]
        for key, log_prob, backoff in zip(keys, found.log_probs, found.backoffs, strict=True):
            assert (log_prob, backoff) == pytest.approx(expected.pop(key), abs=1e-10)
    assert not expected


def test_probabilities_behind_any_history_sum_to_one(tmp_path: Path) -> None:
    model = TokenLanguageModel.read(trained(tmp_path, ["ABC A", "CAB", "BB ", "ACCA", "A A A"] * 9, 5), TOKENIZER)
    states = model.start(1)
    for token in TOKENIZER.encode("ABCCCA A"):
        assert model.log_probs(states).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        states = model.advance(states, torch.tensor([token]))


def test_the_same_texts_give_the_same_bytes_and_reading_and_writing_changes_nothing(tmp_path: Path) -> None:
    texts = ["ABC A", "CAB", "", "BB "]
    first = trained(tmp_path, texts, 3).read_bytes()
    assert trained(tmp_path, texts, 3).read_bytes() == first
    write_arpa(read_arpa(tmp_path / "trained.arpa"), tmp_path / "again.arpa")
    assert (tmp_path / "again.arpa").read_bytes() == first


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("ngram 2=4", "ngram 2=5", r"pruned.arpa:22: found '\\3-grams:', expected 5 2-grams, found 4"),
        ("ngram 2=4", "ngram 2=3", r"pruned.arpa:20: found '-0.2 ▁ B -0.31', expected '\\3-grams:'"),
        ("ngram 2=4", "ngram 3=4", r"pruned.arpa:5: found 'ngram 3=4', expected 'ngram 2=' and a number"),
        ("-0.3 A B", "-0.3 A D", r"pruned.arpa:18: .*'D' is none of them"),
        ("-0.3 A B", "x A B", r"pruned.arpa:18: found 'x A B -0.25', expected a number where 'x' stands"),
        ("-0.3 A B", "0.3 A B", r"pruned.arpa:18: .*expected the logarithm of a probability"),
        ("-0.3 A B -0.25", "-0.3 A", r"pruned.arpa:18: .*expected a number, 2 words, and maybe a number"),
        ("-0.15 <s> A B", "-0.15 ▁ A B", r"pruned.arpa:23: .*expected '▁ A' among the 2-grams"),
        ("-0.6 B A", "-0.6 A B", r"pruned.arpa:19: .*expected each n-gram once"),
        ("\n\\end\\\n", "", r"pruned.arpa: it ends at line 26; expected '\\end\\'"),
        ("\\data\\", "\\dato\\", r"pruned.arpa:3: found '\\dato\\', expected \\data\\"),
        ("</s>", "<end>", r"pruned.arpa: there is no </s> among its 1-grams"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, before: str, after: str, expected: str) -> None:
    path = tmp_path / "pruned.arpa"
    path.write_text(PRUNED.replace(before, after), encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        read_arpa(path)


def test_a_file_that_is_missing_packed_or_binary(tmp_path: Path) -> None:
    import gzip

    with pytest.raises(UserError, match=r"absent.arpa: no such language model; `sonosco language-model`"):
        read_arpa(tmp_path / "absent.arpa")
    (tmp_path / "binary.arpa").write_bytes(b"mmap lm\xff\xfe")
    with pytest.raises(UserError, match=r"binary.arpa: .*expected an ARPA file in UTF-8, not a binary"):
        read_arpa(tmp_path / "binary.arpa")
    (tmp_path / "packed.arpa.gz").write_bytes(gzip.compress(PRUNED.encode()))
    assert read_arpa(tmp_path / "packed.arpa.gz").words[2:5] == ("A", "B", "▁")
    (tmp_path / "packed.arpa.gz").write_bytes(gzip.compress(PRUNED.encode())[:-20])
    with pytest.raises(UserError, match=r"packed.arpa.gz: it cannot be unpacked"):
        read_arpa(tmp_path / "packed.arpa.gz")


def test_a_model_over_other_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pruned.arpa"
    path.write_text(PRUNED.replace("A", "HELLO"), encoding="utf-8")
    with pytest.raises(UserError, match="'HELLO' and 0 more of its 1-grams are no tokens of the vocabulary"):
        TokenLanguageModel.read(path, TOKENIZER)
    path.write_text(PRUNED.replace("-2\t<unk>\n", "").replace("ngram 1=6", "ngram 1=5"), encoding="utf-8")
    with pytest.raises(UserError, match="'C' is none of its 1-grams, nor is <unk>"):
        TokenLanguageModel.read(path, TOKENIZER)
    path.write_text(f"# tokens: {'0' * 64}\n{PRUNED}", encoding="utf-8")
    with pytest.raises(UserError, match="made for another vocabulary"):
        TokenLanguageModel.read(path, TOKENIZER)


def test_tokens_that_cannot_stand_in_a_word_are_spelled_out() -> None:
    assert token_symbols(CharacterTokenizer([" ", "A", "\t", "▁", "　"])) == [
        "▁",
        "A",
        "<U+0009>",
        "<U+2581>",
        "<U+3000>",
    ]
