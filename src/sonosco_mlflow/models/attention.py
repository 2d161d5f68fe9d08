"""What every attention model shares: memory of an utterance, attention, teacher forcing, decoding.

A model of this kind has two parts: an encoder that turns features into keys and values, and a decoder that
reads the previous tokens and attends to them. The decoder is one function for both uses: all steps at once
under teacher forcing, one step at a time in decoding.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.decoding.beam import attention_beam
from sonosco_mlflow.decoding.greedy import State, Steps, attention_greedy, without_special
from sonosco_mlflow.decoding.joint import JointSteps, PrefixScorer
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.decoding.words import WordLanguageModel
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.models.base import Hypothesis, ModelOutput, SpeechModel
from sonosco_mlflow.models.ctc import ctc_loss
from sonosco_mlflow.models.energies import inner_product
from sonosco_mlflow.models.layers import valid_frames
from sonosco_mlflow.models.ranges import require_positive, require_shares
from sonosco_mlflow.text import SpecialToken


@dataclass(frozen=True)
class Memory:
    """An encoded batch.

    Attributes:
        keys: ``[batch, frames, key]``.
        values: ``[batch, frames, value]``.
        lengths: ``[batch]`` int64, encoder frames.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def of(self, utterances: Tensor) -> "Memory":
        """Return the memory of some of the utterances."""
        return Memory(self.keys[utterances], self.values[utterances], self.lengths[utterances])

    def by_utterance(self, rows: Tensor) -> Tensor:
        """Return ``rows`` ``[rows, steps, size]``, an utterance's side by side, as ``[batch, rows * steps, size]``.

        So that a product with an utterance's keys or values reads them once for all of its rows.
        """
        return rows.reshape(len(self.lengths), -1, rows.shape[-1])


def attend(
    queries: Tensor,
    memory: Memory,
    bias: Tensor | None = None,
    energy: Callable[[Tensor, Tensor], Tensor] = inner_product,
) -> tuple[Tensor, Tensor]:
    """Attention of all steps at once.

    Args:
        queries: ``[rows, steps, key]``; a beam has several rows for each utterance, side by side.
        memory: what is attended to.
        bias: ``[batch, steps, frames]``, added to the scores where an utterance has one row.
        energy: scores queries and keys, as :class:`~sonosco_mlflow.models.energies.Energy` does.

    Returns:
        Contexts ``[rows, steps, value]`` and weights ``[rows, steps, frames]``; padding frames weigh
        exactly 0.
    """
    scores = energy(memory.by_utterance(queries), memory.keys)
    if bias is not None:
        scores = scores + bias
    padding = ~valid_frames(memory.lengths, scores.shape[-1])
    weights = scores.masked_fill(padding[:, None, :], float("-inf")).softmax(dim=-1)
    contexts = weights @ memory.values
    return contexts.view(*queries.shape[:2], -1), weights.view(*queries.shape[:2], -1)


def soft_window(memory: Memory, steps: int, step_lengths: Tensor, sigma: float) -> Tensor:
    """Return attention scores ``[batch, steps, frames]`` that favour the diagonal.

    Step j of U prefers frame i of T by ``-(i - j T / U)^2 / (2 sigma^2)`` (Hannun et al. 2019, section 3.2),
    with each utterance's own T and U.

    Args:
        memory: what is attended to; its lengths are T.
        steps: decoder steps, padding included.
        step_lengths: ``[batch]``, decoder steps of each utterance (U).
        sigma: width of the window in frames.
    """
    frame_positions = torch.arange(memory.keys.shape[1], device=step_lengths.device)
    step_positions = torch.arange(steps, device=step_lengths.device)
    centres = step_positions * (memory.lengths.to(memory.keys.dtype) / step_lengths)[:, None]
    return -(frame_positions - centres[..., None]).square() / (2 * sigma**2)


def shifted(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decoder's previous tokens and its targets, both ``[batch, length + 1]``.

    Previous tokens begin with the start of sentence, targets end with the end of sentence; the rest is
    padding.
    """
    previous = functional.pad(tokens, (1, 0), value=int(SpecialToken.SOS))
    ends = torch.arange(tokens.shape[1] + 1, device=tokens.device) == lengths[:, None]
    padded = functional.pad(tokens, (0, 1), value=int(SpecialToken.PAD))
    return previous, padded.masked_fill(ends, int(SpecialToken.EOS))


def sequence_loss(logits: Tensor, targets: Tensor, lengths: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean over utterances of each one's mean cross-entropy per target.

    Args:
        logits: ``[batch, steps, vocabulary]``.
        targets: ``[batch, steps]``.
        lengths: ``[batch]``, targets of each utterance.
        smoothing: share of the target distribution spread evenly over the vocabulary.
    """
    entropies = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing
    ).view_as(targets)
    valid = valid_frames(lengths, targets.shape[1])
    return (entropies.masked_fill(~valid, 0.0).sum(dim=1) / lengths).mean()


class AttentionModel(SpeechModel):
    """A sequence-to-sequence model over :meth:`encode` and :meth:`spell`.

    Args:
        label_smoothing: share of the target distribution spread evenly, in training only, so that a
            validation loss is a likelihood.
        soft_window_sigma: width of the soft window in encoder frames.
        ctc_weight: share of the training loss that is the CTC loss of a linear layer above the values, 0 for none
            (Watanabe et al. 2017, *Hybrid CTC/Attention Architecture for End-to-End Speech Recognition*). It holds
            the encoder to reading from left to right; in decoding, ``Search.ctc_weight`` asks it again.
        value_size: features of a value.
        vocabulary_size: number of token ids.

    Raises:
        UserError: ``ctc_weight`` is none of 0 to 1.

    Attributes:
        soft_window: whether training adds :func:`soft_window` to the attention scores. It teaches a new model
            that speech is read from left to right; a callback sets it for each epoch. Never used in
            evaluation, where the number of steps is not known.
    """

    def __init__(
        self,
        label_smoothing: float,
        soft_window_sigma: float,
        ctc_weight: float,
        value_size: int,
        vocabulary_size: int,
    ) -> None:
        super().__init__()
        require_shares(label_smoothing=label_smoothing, ctc_weight=ctc_weight)
        require_positive(soft_window_sigma=soft_window_sigma)
        self.ctc_weight = ctc_weight
        self.ctc_output = nn.Linear(value_size, vocabulary_size) if ctc_weight else None
        self.label_smoothing = label_smoothing
        self.soft_window_sigma = soft_window_sigma
        self.soft_window = False

    @abstractmethod
    def encode(self, features: Tensor, lengths: Tensor) -> Memory:
        """Return the memory of ``features`` ``[batch, time, mel]``, utterances of ``lengths`` frames."""

    @abstractmethod
    def spell(
        self, previous: Tensor, memory: Memory, state: State | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Decode the steps that follow each of ``previous``.

        Args:
            previous: ``[rows, steps]``, the tokens before each step; a beam has several rows for each utterance,
                side by side.
            memory: the encoded batch.
            state: what the call for the steps before returned; None at the start. The first dimension of each of
                its tensors is that of the rows.
            bias: ``[batch, steps, frames]``, added to the attention scores where an utterance has one row.

        Returns:
            Logits ``[rows, steps, vocabulary]``, attention weights ``[rows, steps, frames]``, and the state
            after the last step.
        """

    @abstractmethod
    def spell_in_training(
        self, previous: Tensor, memory: Memory, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Decode as :meth:`spell`, some previous tokens being replaced by draws from torch's generator.

        So a decoder learns to go on after a mistake of its own.
        """

    def forward(self, batch: Batch) -> ModelOutput:
        """Return loss, logits and alignment of ``batch`` under teacher forcing."""
        memory = self.encode(batch.features, batch.feature_lengths)
        previous, targets = shifted(batch.tokens, batch.token_lengths)
        lengths = batch.token_lengths + 1
        if self.training:
            bias = None
            if self.soft_window:
                bias = soft_window(memory, previous.shape[1], lengths, self.soft_window_sigma)
            logits, weights, _ = self.spell_in_training(previous, memory, bias)
        else:
            logits, weights, _ = self.spell(previous, memory)
        loss = sequence_loss(logits, targets, lengths, self.label_smoothing if self.training else 0.0)
        if self.training and self.ctc_output is not None:
            heard = self.ctc_output(memory.values).log_softmax(dim=-1)
            loss = torch.lerp(loss, ctc_loss(heard, memory.lengths, batch), self.ctc_weight)
        return ModelOutput(loss, logits, lengths, weights)

    @torch.no_grad()
    def search(self, batch: Batch, search: Search) -> list[list[Hypothesis]]:
        """Return the best hypotheses of each utterance, of at most ``2 * encoder frames + 10`` tokens.

        An alignment has a row for each step, the end of sentence included.
        """
        if isinstance(search.language_model, WordLanguageModel):
            raise UserError(
                "decoding.language_model: an attention model asks for the next token, which one over words does not "
                "know; make one by `sonosco language-model --unit tokens`"
            )
        if search.ctc_weight and self.ctc_output is None:
            raise UserError(
                f"decoding.ctc_weight: found {search.ctc_weight}, but this model was trained without CTC; leave it "
                "out, or train with model.settings.ctc_weight"
            )
        memory = self.encode(batch.features, batch.feature_lengths)
        steps: Steps = DecoderSteps(self, memory)
        if search.ctc_weight and self.ctc_output is not None:
            heard = self.ctc_output(memory.values).log_softmax(dim=-1)
            steps = JointSteps(steps, PrefixScorer(heard, memory.lengths), search.ctc_weight)
        limits = 2 * memory.lengths + 10
        if search.is_greedy:
            decoded = [[one] for one in attention_greedy(steps, limits)]
        else:
            decoded = attention_beam(steps, limits, search)
        return [
            [Hypothesis(one.tokens, one.score, one.weights[:, :frames], one.total) for one in hypotheses]
            for hypotheses, frames in zip(decoded, memory.lengths.tolist(), strict=True)
        ]

    def teacher_forced(self, output: ModelOutput) -> list[list[int]]:
        """Return the best next token after each reference prefix, special tokens dropped."""
        best = output.logits.argmax(dim=-1).tolist()
        return [without_special(row[:length]) for row, length in zip(best, output.lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class DecoderSteps:
    """The steps of a model's decoder, one at a time; see :class:`~sonosco_mlflow.decoding.greedy.Steps`."""

    model: AttentionModel
    memory: Memory

    def __call__(self, previous: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        """Make one step of each row."""
        logits, weights, state = self.model.spell(previous[:, None], self.memory, state)
        return logits[:, 0].log_softmax(dim=-1), weights[:, 0], state

    def of(self, utterances: Tensor) -> "DecoderSteps":
        """Return the steps for some of the utterances alone."""
        return DecoderSteps(self.model, self.memory.of(utterances))
