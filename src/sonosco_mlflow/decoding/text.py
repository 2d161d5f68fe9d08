"""From a batch to hypothesis texts."""

from collections.abc import Sequence
from typing import Protocol

import torch

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.decoding.search import GREEDY, Search
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.text import Tokenizer


class Tokens(Protocol):
    """Whatever carries decoded token ids."""

    @property
    def tokens(self) -> list[int]:
        """Ids without special tokens."""
        ...


class DecodingModel(Protocol):
    """A model that can decode a batch by itself; one that is to be searched otherwise takes the search as well."""

    def decode(self, batch: Batch) -> Sequence[Tokens]:
        """Return one hypothesis an utterance."""
        ...


@serializable
class TextDecoder:
    """The model's own decoding, as text.

    Args:
        tokenizer: turns the hypotheses' tokens into text.
        search: how they are searched for.
    """

    def __init__(self, tokenizer: Tokenizer, search: Search = GREEDY) -> None:
        self.tokenizer = tokenizer
        self.search = search

    def __call__(self, model: DecodingModel, batch: Batch) -> list[str]:
        """Return the hypothesis text of each utterance of ``batch``.

        Raises:
            UserError: the model knows no search but its own.
        """
        settings = () if self.search.is_greedy else (self.search,)
        if settings and not hasattr(model, "search"):
            raise UserError(
                f"{type(model).__name__} decodes in its own way alone, it has no search(batch, search): leave out "
                "what decoding.* asks for"
            )
        with torch.inference_mode():
            return [self.tokenizer.decode(hypothesis.tokens) for hypothesis in model.decode(batch, *settings)]
