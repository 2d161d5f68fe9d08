"""Word pieces: frequent strings of letters as tokens, by SentencePiece's unigram model (Kudo 2018, arXiv 1804.10959).

SentencePiece finds the pieces and their scores. Spelling with them is done here: its own sampler draws from a generator
that cannot be keyed, and a trained model needs no other library to write its texts.

>>> tokenizer = WordPieceTokenizer(["▁", "A", "B", "AB", "▁AB"], [-3.0, -2.0, -2.0, -2.5, -4.0])
>>> [[tokenizer.pieces[token - 5] for token in tokens] for tokens in tokenizer.segmentations("▁AB", 3)]
[['▁AB'], ['▁', 'AB'], ['▁', 'A', 'B']]
"""

import io
import re
from collections.abc import Iterable, Sequence

import numpy as np

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.text import SpecialToken, Vocabulary

SPACE = "▁"
"""What a space is in a piece: each word begins with one, the first too."""
BEST = 10
"""Of so many likeliest segmentations of a word one is drawn."""

# Its space, its unknown piece, and the end of a text.
_RESERVED = {SPACE, "▅", "\0"}
# Below the least likely piece, as in SentencePiece.
_UNKNOWN_PENALTY = 10.0


@serializable
class WordPieceTokenizer(Vocabulary):
    """One token a word piece.

    Args:
        pieces: the pieces in the order of their ids, each once.
        scores: log-probability of each.
    """

    def __init__(self, pieces: Sequence[str], scores: Sequence[float]) -> None:
        if len(set(pieces)) != len(pieces) or not all(pieces) or len(scores) != len(pieces):
            raise UserError(f"{len(pieces)} pieces with {len(scores)} scores: expected as many, each piece once")
        self.pieces = tuple(pieces)
        self.scores = tuple(scores)
        first = len(SpecialToken)
        self._known = {piece: (first + i, score) for i, (piece, score) in enumerate(zip(pieces, scores, strict=True))}
        self._longest = max(map(len, pieces), default=1)
        self._unknown = (int(SpecialToken.UNKNOWN), min(scores, default=0.0) - _UNKNOWN_PENALTY)
        self._spelled: dict[tuple[str, int], list[list[int]]] = {}

    @classmethod
    def of(cls, texts: Iterable[str], size: int) -> "WordPieceTokenizer":
        """Find about ``size`` pieces of ``texts``, the same whatever the order of the texts.

        Every character that occurs is among them; of a small text there are fewer.

        Raises:
            UserError: the characters alone are more, or one is none that SentencePiece has pieces of.
        """
        import sentencepiece

        texts = sorted(texts)
        characters = set().union(*texts) - {" "}
        if reserved := sorted(characters & _RESERVED):
            raise UserError(
                f"the training transcripts hold {', '.join(map(repr, reserved))}, which SentencePiece has for itself; "
                "take it out, or set tokenizer.kind to characters"
            )
        characters.add(SPACE)
        if size <= len(characters):
            raise UserError(
                f"tokenizer.size: found {size}, expected more than {len(characters)}, the number of characters in the "
                "training transcripts"
            )
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            # One more: SentencePiece counts its unknown token.
            vocab_size=size + 1,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1_000_000,
            # Sums of several threads would depend on which is first.
            num_threads=1,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
        found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        ids = range(1, found.get_piece_size())
        return cls([found.id_to_piece(i) for i in ids], [found.get_score(i) for i in ids])

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(SpecialToken) + len(self.pieces)

    @property
    def characters(self) -> frozenset[str]:
        """Those that are pieces by themselves, which any text can be spelled by."""
        return frozenset(" " if piece == SPACE else piece for piece in self.pieces if len(piece) == 1)

    def encode(self, text: str) -> list[int]:
        """Return the likeliest spelling; a character outside all pieces becomes ``SpecialToken.UNKNOWN``."""
        return [token for word in _words(text) for token in self.segmentations(word, 1)[0]]

    def sampled(self, text: str, probability: float, stream: np.random.Generator) -> list[int]:
        """Return a spelling in which each word is, with ``probability``, one of its likeliest :data:`BEST`.

        Each of these is drawn alike (word-piece sampling of Hannun et al. 2019, arXiv 1904.02619); the likeliest is one
        of them.
        """
        tokens: list[int] = []
        for word in _words(text):
            found = self.segmentations(word, BEST if stream.random() < probability else 1)
            tokens += found[int(stream.random() * len(found))]
        return tokens

    def segmentations(self, word: str, count: int) -> list[list[int]]:
        """Return the likeliest ``count`` segmentations of ``word``, the best first; of a short word there are fewer."""
        if (word, count) not in self._spelled:
            self._spelled[word, count] = self._segmentations(word, count)
        return self._spelled[word, count]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; special tokens stand for nothing."""
        first = len(SpecialToken)
        text = "".join(self.pieces[token - first] for token in tokens if token >= first)
        return text.removeprefix(SPACE).replace(SPACE, " ")

    def document(self) -> dict[str, object]:
        """Return the vocabulary as JSON has it."""
        return {"tokenizer": "word_pieces", "pieces": list(self.pieces), "scores": list(self.scores)}

    def _segmentations(self, word: str, count: int) -> list[list[int]]:
        # The best of each prefix are among the best of a shorter prefix, with one piece more.
        best: list[list[tuple[float, list[int]]]] = [[(0.0, [])]]
        for end in range(1, len(word) + 1):
            found = []
            for start in range(max(0, end - self._longest), end):
                piece = self._known.get(word[start:end], self._unknown if start + 1 == end else None)
                if piece is not None:
                    found += [(score + piece[1], [*tokens, piece[0]]) for score, tokens in best[start]]
            best.append(sorted(found, key=lambda item: -item[0])[:count])
        return [tokens for _, tokens in best[-1]]


def _words(text: str) -> list[str]:
    return re.findall(f"{SPACE}[^{SPACE}]*", SPACE + text.replace(" ", SPACE)) if text else []
