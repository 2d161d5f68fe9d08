"""Text to token ids and back.

The special tokens are ids of their own, shared by every tokenizer and below all others, so that no letter can ever
stand for the CTC blank, the padding or the start or end of a sentence.

>>> tokenizer = CharacterTokenizer.of(["GO", "STOP"])
>>> tokenizer.decode(tokenizer.encode("GO"))
'GO'
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from sonosco_mlflow.errors import UserError


class SpecialToken(IntEnum):
    """Ids that stand for no piece of text."""

    PAD = 0
    BLANK = 1
    SOS = 2
    EOS = 3
    UNKNOWN = 4


class Tokenizer(Protocol):
    """What models and metrics need of a tokenizer."""

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, the special ones included."""
        ...

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of all that encoding depends on."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without start or end of sentence."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; special tokens stand for nothing."""
        ...


class CharacterTokenizer:
    """One token a character.

    Args:
        alphabet: the characters in the order of their ids, each once.
    """

    def __init__(self, alphabet: Sequence[str]) -> None:
        if len(set(alphabet)) != len(alphabet) or any(len(character) != 1 for character in alphabet):
            raise UserError(f"the alphabet {list(alphabet)!r} must hold single characters, each once")
        self.alphabet = tuple(alphabet)
        self._ids = {character: len(SpecialToken) + i for i, character in enumerate(self.alphabet)}

    @classmethod
    def of(cls, texts: Iterable[str]) -> "CharacterTokenizer":
        """Build the tokenizer of all characters that occur in ``texts``, in code point order."""
        return cls(sorted({character for text in texts for character in text}))

    @classmethod
    def read(cls, path: Path) -> "CharacterTokenizer":
        """Read a vocabulary written by :meth:`write`.

        Raises:
            UserError: the file is missing or is no vocabulary.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["alphabet"])
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such vocabulary; `dvc repro manifests` makes it") from error
        except (ValueError, KeyError, TypeError, UserError) as error:
            raise UserError(
                f'{path}: not a vocabulary ({error}); expected {{"tokenizer": "characters", "alphabet": [...]}}'
            ) from error

    def write(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        path.write_text(self._canonical() + "\n", encoding="utf-8")

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(SpecialToken) + len(self.alphabet)

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of the vocabulary."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return one id a character; a character outside the alphabet becomes ``SpecialToken.UNKNOWN``."""
        return [self._ids.get(character, int(SpecialToken.UNKNOWN)) for character in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; special tokens stand for nothing."""
        first = len(SpecialToken)
        return "".join(self.alphabet[token - first] for token in tokens if token >= first)

    def _canonical(self) -> str:
        return json.dumps({"tokenizer": "characters", "alphabet": list(self.alphabet)}, ensure_ascii=False)
