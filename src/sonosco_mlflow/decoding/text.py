"""From a batch to hypothesis texts."""

from collections.abc import Sequence
from typing import Protocol

import torch

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.text import Tokenizer


class Tokens(Protocol):
    """Whatever carries decoded token ids."""

    @property
    def tokens(self) -> list[int]:
        """Ids without special tokens."""
        ...


class DecodingModel(Protocol):
    """A model that can decode a batch by itself."""

    def decode(self, batch: Batch) -> Sequence[Tokens]:
        """Return one hypothesis an utterance."""
        ...


@serializable
class TextDecoder:
    """The model's own decoding, as text.

    Args:
        tokenizer: turns the hypotheses' tokens into text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, model: DecodingModel, batch: Batch) -> list[str]:
        """Return the hypothesis text of each utterance of ``batch``."""
        with torch.inference_mode():
            return [self.tokenizer.decode(hypothesis.tokens) for hypothesis in model.decode(batch)]
