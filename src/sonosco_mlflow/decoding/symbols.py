"""How a tokenizer's tokens are spelled as words of an ARPA file, in which blanks separate words.

A blank is written ``▁``, as SentencePiece does; what else cannot stand in a word is written by its code point.
"""

from pathlib import Path

import torch
from torch import Tensor

from sonosco_mlflow.decoding.arpa import END, START, UNKNOWN, NGrams
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import SpecialToken, Tokenizer

BLANK = "▁"
_DIGEST = "tokens: "


def token_symbols(tokenizer: Tokenizer) -> list[str]:
    """Return the word of each token that is not special, in the order of their ids.

    Raises:
        UserError: two tokens stand for the same text.
    """
    tokens = range(len(SpecialToken), tokenizer.vocabulary_size)
    # Behind another one: at the start of a text some tokenizers drop the blank that a token begins with.
    anchor = next((token for token in tokens if tokenizer.decode([token]).strip()), None)
    before = [] if anchor is None else [anchor]
    start = len(tokenizer.decode(before))
    symbols = [symbol(tokenizer.decode([*before, token])[start:]) for token in tokens]
    if len(set(symbols)) != len(symbols):
        twice = next(text for place, text in enumerate(symbols) if text in symbols[:place])
        raise UserError(f"two tokens of the vocabulary stand for '{twice}': a language model cannot tell them apart")
    return symbols


def symbol(text: str) -> str:
    """Return the word for a token's text.

    >>> symbol("A"), symbol(" ")
    ('A', '▁')
    """
    return "".join(
        BLANK if letter == " " else f"<U+{ord(letter):04X}>" if letter == BLANK or letter.isspace() else letter
        for letter in text
    )


def digest_comment(tokenizer: Tokenizer) -> str:
    """Return the line by which a file says whose tokens it is over."""
    return f"{_DIGEST}{tokenizer.digest}"


def token_ids(ngrams: NGrams, tokenizer: Tokenizer, path: Path) -> Tensor:
    """Return ``[words]``, the token id of each word of the file ``path``.

    A token that is no word of it is heard as ``<unk>``.

    Raises:
        UserError: the file is over other tokens.
    """
    digests = [line.removeprefix(_DIGEST) for line in ngrams.comments if line.startswith(_DIGEST)]
    if digests and digests[0] != tokenizer.digest:
        raise UserError(
            f"{path}: it was made for another vocabulary (digest {digests[0][:12]}, here {tokenizer.digest[:12]}); "
            "`sonosco language-model` makes one of the transcripts that are trained on here"
        )
    ids = {START: int(SpecialToken.SOS), END: int(SpecialToken.EOS), UNKNOWN: int(SpecialToken.UNKNOWN)}
    ids |= {text: token for token, text in enumerate(token_symbols(tokenizer), len(SpecialToken))}
    foreign = [word for word in ngrams.words if word not in ids]
    if foreign:
        raise UserError(
            f"{path}: '{foreign[0]}' and {len(foreign) - 1} more of its 1-grams are no tokens of the vocabulary, such "
            f"as {', '.join(list(ids)[3:6])}; a language model over words needs decoding.language_model_unit=words"
        )
    missing = ids.keys() - set(ngrams.words) - {UNKNOWN}
    if missing and UNKNOWN not in ngrams.words:
        raise UserError(f"{path}: '{min(missing)}' is none of its 1-grams, nor is {UNKNOWN}; expected one of them")
    return torch.tensor([ids[word] for word in ngrams.words])
