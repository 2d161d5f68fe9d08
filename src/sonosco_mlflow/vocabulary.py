"""``vocabulary.json``: the file of a tokenizer, of whichever kind.

>>> make_tokenizer("characters", 0, ["GO", "STOP"]).vocabulary_size
10
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.text import CharacterTokenizer, Vocabulary
from sonosco_mlflow.word_pieces import WordPieceTokenizer

_KINDS: dict[str, Callable[[Any], Vocabulary]] = {
    "characters": lambda content: CharacterTokenizer(content["alphabet"]),
    "word_pieces": lambda content: WordPieceTokenizer(content["pieces"], content["scores"]),
}


def make_tokenizer(kind: str, size: int, texts: Iterable[str]) -> Vocabulary:
    """Return the tokenizer of ``texts``: their ``characters``, or about ``size`` ``word_pieces`` of them.

    Raises:
        UserError: ``size`` is too small for the texts.
    """
    return CharacterTokenizer.of(texts) if kind == "characters" else WordPieceTokenizer.of(texts, size)


def read_tokenizer(path: Path) -> Vocabulary:
    """Read a vocabulary that a tokenizer wrote.

    Raises:
        UserError: the file is missing or is no vocabulary.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _KINDS[content["tokenizer"]](content)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such vocabulary; `dvc repro manifests` makes it") from error
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(
            f'{path}: not a vocabulary ({error}); expected {{"tokenizer": "characters", "alphabet": [...]}} or '
            '{"tokenizer": "word_pieces", "pieces": [...], "scores": [...]}'
        ) from error
