"""The one small interface between a speech model and everything that trains, decodes and serves it.

``forward`` takes a padded :class:`~sonosco_mlflow.data.loader.Batch` and returns the loss together with what
pictures and comparisons need; ``search`` returns the best token sequences of each utterance, ``decode`` the very best.
All must give an utterance the same result whatever it is padded with, and whichever utterances share its batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.decoding.search import GREEDY, Search


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass under teacher forcing gives.

    Attributes:
        loss: scalar; the mean over utterances of each one's mean negative log-likelihood per token, so that it
            depends neither on padding nor on how utterances are batched.
        logits: ``[batch, steps, vocabulary]``; steps are output tokens (attention models) or encoder frames (CTC).
        lengths: ``[batch]`` int64, the valid steps of each utterance.
        alignment: ``[batch, steps, encoder frames]`` attention weights, or None where the model has none.
    """

    loss: Tensor
    logits: Tensor
    lengths: Tensor
    alignment: Tensor | None = None


@dataclass(frozen=True)
class Hypothesis:
    """One decoded utterance.

    Attributes:
        tokens: ids without special tokens.
        score: natural logarithm of the sequence's probability under the model.
        alignment: ``[steps, encoder frames]`` attention weights, or ``[encoder frames, vocabulary]`` posteriors (CTC).
        total: what it was ranked by: the score, with what language model and length add to it.
    """

    tokens: list[int]
    score: float
    alignment: Tensor
    total: float


class SpeechModel(nn.Module, ABC):
    """A model from features to tokens.

    Subclasses take ``n_mels`` and ``vocabulary_size`` and their own settings, all as keywords, all plain values.
    ``presets`` names complete sets of those settings: ``small`` trains on two CPU cores, ``paper`` is the paper's.
    """

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    @abstractmethod
    def forward(self, batch: Batch) -> ModelOutput:
        """Return loss and logits of ``batch`` under teacher forcing."""

    @abstractmethod
    def search(self, batch: Batch, search: Search) -> list[list[Hypothesis]]:
        """Return up to ``search.n_best`` hypotheses of each utterance of ``batch``, best first.

        Call it in evaluation mode. No two hypotheses of an utterance have the same tokens; there is always one.

        Raises:
            UserError: a setting means nothing to this kind of model.
        """

    def decode(self, batch: Batch, search: Search = GREEDY) -> list[Hypothesis]:
        """Return the best hypothesis of each utterance of ``batch``, in its order. Call it in evaluation mode."""
        return [hypotheses[0] for hypotheses in self.search(batch, search)]

    @abstractmethod
    def teacher_forced(self, output: ModelOutput) -> list[list[int]]:
        """Return the tokens that ``output``'s logits favour at each step, special tokens dropped.

        For attention models that is the best next token after each *reference* prefix; comparing it with
        :meth:`decode` separates errors of the model from errors that accumulate in decoding.
        """

    def parameter_count(self) -> int:
        """Return the number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
