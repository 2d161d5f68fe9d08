"""How hypotheses are searched for: the settings that every model's search takes.

A hypothesis is ranked by its total, ``log p(model) + w log p(language model) + r length``, which
``length_normalisation`` may divide by a power of its length. Of a model with attention and CTC, ``log p(model)`` is
``(1 - c) log p(attention) + c log p(CTC)``. With no setting at all that is greedy decoding.

>>> Search(beam=8, length_reward=0.5).is_greedy
False
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable


class TokenScores(Protocol):
    """A language model over the model's own tokens, asked for many hypotheses at once."""

    def start(self, count: int) -> Tensor:
        """Return the states ``[count]`` of hypotheses that have no token yet."""
        ...

    def log_probs(self, states: Tensor) -> Tensor:
        """Return ``[n, vocabulary]`` float64, the natural log-probability of each next token; never above 0."""
        ...

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states ``[n]`` after ``tokens`` ``[n]``."""
        ...


@serializable
@dataclass(frozen=True)
class Search:
    """Settings of a search; all are optional.

    Attributes:
        beam: hypotheses that are followed at once for each utterance.
        n_best: hypotheses that are wanted of each utterance, at most ``beam``.
        language_model: over tokens (:class:`~sonosco_mlflow.decoding.ngram.TokenLanguageModel`) or, for CTC alone,
            over words (:class:`~sonosco_mlflow.decoding.words.WordLanguageModel`).
        language_model_weight: of its natural log-probability, the end of sentence included.
        length_reward: added for each token (for each word, with a language model over words).
        length_normalisation: attention models rank by total / steps ** this, the end of sentence being a step;
            0 is none. Without a language model, whose part is divided too, 1 is Chan et al. 2016, section 3.4.
        attention_limit: a step is only accepted where the attention's peak lies at most so many encoder frames from
            that of the step before (Hannun et al. 2019, section 3.5).
        end_threshold: the end of sentence is only considered where its log-probability is above this times that of
            the likeliest other token (same section; 1.5 there). Greater is more lenient.
        ctc_weight: CTC's share in the score of an attention model that was trained with it, from 0 to 1
            (:mod:`sonosco_mlflow.decoding.joint`).

    Raises:
        UserError: a setting is out of its range.
    """

    beam: int = 1
    n_best: int = 1
    language_model: nn.Module | None = None
    language_model_weight: float = 0.5
    length_reward: float = 0.0
    length_normalisation: float = 0.0
    attention_limit: int | None = None
    end_threshold: float | None = None
    ctc_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beam", "n_best", "attention_limit", "end_threshold"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"decoding.{name}: found {value}, expected a number above 0")
        for name in ("language_model_weight", "length_normalisation"):
            if getattr(self, name) < 0:
                raise UserError(f"decoding.{name}: found {getattr(self, name)}, expected 0 or more")
        if not 0.0 <= self.ctc_weight <= 1.0:
            raise UserError(f"decoding.ctc_weight: found {self.ctc_weight}, expected a share from 0 to 1")
        if self.n_best > self.beam:
            raise UserError(
                f"{self.n_best} hypotheses are wanted of a beam of {self.beam}; set decoding.beam to {self.n_best}"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether taking the likeliest token at each step is all that is asked for."""
        return self.beam == 1 and not self.is_scored_otherwise and not self.is_limited

    @property
    def is_scored_otherwise(self) -> bool:
        """Whether anything but the model's own next-token probability decides which token comes next."""
        return self.language_model is not None or self.length_reward != 0.0 or self.ctc_weight != 0.0

    @property
    def is_limited(self) -> bool:
        """Whether some steps are ruled out, whatever their probability."""
        return self.attention_limit is not None or self.end_threshold is not None

    def refuse_attention_settings(self, model: str) -> None:
        """Raise a UserError where a setting is used that only attention models know."""
        idle = {"length_normalisation": 0.0, "attention_limit": None, "end_threshold": None, "ctc_weight": 0.0}
        for name, value in idle.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"decoding.{name}: found {getattr(self, name)}, but {model} has no attention; leave it out"
                )


GREEDY = Search()
