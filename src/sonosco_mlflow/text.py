"""Text to token ids and back.

The special tokens are ids of their own, shared by every tokenizer and below all others, so that no letter can ever
stand for the CTC blank, the padding or the start or end of a sentence.

>>> tokenizer = CharacterTokenizer.of(["GO", "STOP"])
>>> tokenizer.decode(tokenizer.encode("GO"))
'GO'
"""

import hashlib
import json
from abc import ABC, abstractmethod
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


class Vocabulary(ABC):
    """A tokenizer that a file can hold (:mod:`sonosco_mlflow.vocabulary` reads it)."""

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Number of ids, the special ones included."""

    @property
    @abstractmethod
    def characters(self) -> frozenset[str]:
        """What a text may hold: any other character becomes ``SpecialToken.UNKNOWN``."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without start or end of sentence."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; special tokens stand for nothing."""

    @abstractmethod
    def document(self) -> dict[str, object]:
        """Return all that encoding depends on, as JSON has it."""

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of the vocabulary."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        path.write_text(self._canonical() + "\n", encoding="utf-8")

    def _canonical(self) -> str:
        return json.dumps(self.document(), ensure_ascii=False)


class CharacterTokenizer(Vocabulary):
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

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(SpecialToken) + len(self.alphabet)

    @property
    def characters(self) -> frozenset[str]:
        """The alphabet."""
        return frozenset(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Return one id a character; a character outside the alphabet becomes ``SpecialToken.UNKNOWN``."""
        return [self._ids.get(character, int(SpecialToken.UNKNOWN)) for character in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; special tokens stand for nothing."""
        first = len(SpecialToken)
        return "".join(self.alphabet[token - first] for token in tokens if token >= first)

    def document(self) -> dict[str, object]:
        """Return the vocabulary as JSON has it."""
        return {"tokenizer": "characters", "alphabet": list(self.alphabet)}
