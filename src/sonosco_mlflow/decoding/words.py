"""Decoding with an n-gram over words: flashlight's lexicon decoder, which torchaudio wraps, and KenLM inside it.

For CTC alone. Whatever it finds is a sequence of the language model's words, each spelled as the tokenizer does.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sonosco_mlflow.decoding.arpa import END, START, UNKNOWN, read_arpa, unpacked
from sonosco_mlflow.decoding.greedy import Decoded, ctc_log_likelihood
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.text import SpecialToken, Tokenizer


@serializable
class WordLanguageModel(nn.Module):
    """An n-gram over words, as the bytes of its ARPA file.

    Use :meth:`read`. The constructor makes one of the given size, to be filled by ``load_state_dict``.

    Args:
        tokenizer: spells the words.
        size: number of bytes.

    Attributes:
        path: the file that it was read from, or None.
    """

    content: Tensor

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("content", torch.zeros(size, dtype=torch.uint8))
        self.path: Path | None = None
        self._decoders: dict[Search, Any] = {}

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer) -> "WordLanguageModel":
        """Read an ARPA file over words.

        Raises:
            UserError: it is none, or ``tokenizer`` can spell none of its words.
        """
        spelled = _lexicon(path, tokenizer)
        if not spelled:
            raise UserError(
                f"{path}: the vocabulary's tokens spell none of its words; expected words of the transcripts"
            )
        content = unpacked(path)
        model = cls(tokenizer, len(content))
        model.path = path
        model.content.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return model

    def decode(self, log_probs: Tensor, lengths: Tensor, search: Search) -> list[list[Decoded]]:
        """Return up to ``search.n_best`` hypotheses of each utterance, best first, each sequence of words once.

        Args:
            log_probs: ``[batch, frames, vocabulary]``.
            lengths: ``[batch]``, frames of each utterance.
            search: the settings.
        """
        log_probs, lengths = log_probs.detach().cpu().float(), lengths.cpu()
        if self._delimiter != SpecialToken.BLANK:
            # Each word is spelled with the blank behind it, also the last one: as if one more frame were certain of it.
            log_probs = torch.nn.functional.pad(log_probs, (0, 0, 0, 1))
            certain = torch.full((log_probs.shape[-1],), math.log(1e-30))
            certain[self._delimiter] = 0.0
            log_probs[torch.arange(len(lengths)), lengths] = certain
        found = self._decoder(search)(log_probs.contiguous(), lengths + (self._delimiter != SpecialToken.BLANK))
        return [
            self._scored(hypotheses, row[:count], search)
            for hypotheses, row, count in zip(found, log_probs, lengths.tolist(), strict=True)
        ]

    @property
    def _delimiter(self) -> int:
        return _delimiter(self.tokenizer)

    def _scored(self, hypotheses: list[Any], log_probs: Tensor, search: Search) -> list[Decoded]:
        texts: dict[str, float] = {}
        for hypothesis in hypotheses:
            texts.setdefault(" ".join(hypothesis.words), float(hypothesis.score))
        # Where no path through the lexicon has any probability, nothing was said.
        texts = texts or {"": -math.inf}
        rows = [torch.tensor(self.tokenizer.encode(text), dtype=torch.int64) for text in texts]
        counts = torch.tensor([len(row) for row in rows])
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        frames = torch.full_like(counts, len(log_probs))
        scores = ctc_log_likelihood(log_probs.expand(len(rows), -1, -1), frames, tokens, counts).tolist()
        parts = zip(rows, scores, texts.values(), strict=True)
        return [Decoded(row.tolist(), score, torch.empty(0), total) for row, score, total in parts][: search.n_best]

    def _decoder(self, search: Search) -> Any:
        if search not in self._decoders:
            # It takes files. They are read at once.
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "words.arpa")
                path.write_bytes(self.content.cpu().numpy().tobytes())
                self._decoders[search] = _flashlight_decoder(
                    path, _lexicon(path, self.tokenizer), self.tokenizer, search
                )
        return self._decoders[search]


def _delimiter(tokenizer: Tokenizer) -> int:
    """Return the token between words; the CTC blank for a tokenizer whose tokens hold the space themselves."""
    tokens = tokenizer.encode("a b")[1:-1]
    return tokens[0] if len(tokens) == 1 and tokenizer.decode(tokens) == " " else int(SpecialToken.BLANK)


def _lexicon(path: Path, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Return the tokens of each word of an ARPA file that the tokenizer can spell."""
    words = [word for word in read_arpa(path).words if word not in (START, END, UNKNOWN)]
    spelled = {word: tokenizer.encode(word) for word in words}
    return {word: tokens for word, tokens in spelled.items() if int(SpecialToken.UNKNOWN) not in tokens}


def _flashlight_decoder(path: Path, lexicon: dict[str, list[int]], tokenizer: Tokenizer, search: Search) -> Any:
    # It loads a library that nothing else needs.
    from torchaudio.models.decoder import ctc_decoder

    delimiter = _delimiter(tokenizer)
    behind = [] if delimiter == SpecialToken.BLANK else [delimiter]
    lines = [f"{word} {' '.join(map(str, [*tokens, *behind]))}\n" for word, tokens in lexicon.items()]
    (path.parent / "lexicon.txt").write_text("".join(lines), encoding="utf-8")
    return ctc_decoder(
        lexicon=str(path.parent / "lexicon.txt"),
        tokens=[str(token) for token in range(tokenizer.vocabulary_size)],
        lm=str(path),
        nbest=search.beam,
        beam_size=search.beam,
        beam_threshold=math.inf,
        # KenLM answers in logarithms to the base of 10.
        lm_weight=search.language_model_weight * math.log(10.0),
        word_score=search.length_reward,
        log_add=True,
        blank_token=str(int(SpecialToken.BLANK)),
        sil_token=str(delimiter),
        unk_word=UNKNOWN,
    )
