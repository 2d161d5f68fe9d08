"""Listen, Attend and Spell (Chan et al. 2016, arXiv 1508.01211).

The listener is a pyramid of bidirectional LSTMs, each of which reads neighbouring frames joined into one, so
that the speller attends to few frames. The speller is an LSTM over the previous tokens. In the paper it also
reads the context it attended to before; without that ("input feeding") all steps are one product, and the
decoder costs a ninth.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sonosco_mlflow.decoding.greedy import State
from sonosco_mlflow.models.attention import AttentionModel, Memory, attend
from sonosco_mlflow.models.layers import Recurrent, join_neighbours, subsampled
from sonosco_mlflow.serialization.parameters import serializable


class Listener(nn.Module):
    """Pyramidal bidirectional LSTM (section 3.1), each layer followed by layer norm and dropout.

    Args:
        n_mels: features of a frame.
        hidden_size: units of one direction.
        joined_frames: for each layer, the number of neighbouring frames that it reads as one.
        dropout: probability of dropping a value between layers.
    """

    def __init__(self, n_mels: int, hidden_size: int, joined_frames: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.joined_frames = tuple(joined_frames)
        self.layers = nn.ModuleList()
        self.norms = nn.ModuleList()
        self.output_size = n_mels
        for count in joined_frames:
            layer = Recurrent("lstm", count * self.output_size, hidden_size, "concatenation")
            self.output_size = layer.output_size
            self.layers.append(layer)
            self.norms.append(nn.LayerNorm(self.output_size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[batch, encoder frames, output_size]`` and their lengths of ``[batch, time, mel]``."""
        for count, layer, norm in zip(self.joined_frames, self.layers, self.norms, strict=True):
            frames = join_neighbours(frames, lengths, count)
            lengths = subsampled(lengths, count)
            frames = self.dropout(norm(layer(frames, lengths)))
        return frames, lengths


@serializable
class LAS(AttentionModel):
    """Listen, Attend and Spell.

    Args:
        n_mels: mel bands of the features.
        vocabulary_size: number of token ids.
        listener_size: units of one direction of a listener's layer.
        joined_frames: for each listener layer, the number of neighbouring frames that it reads as one.
        attention_size: size of keys and queries.
        speller_size: units of a speller's layer, and size of the embeddings.
        speller_layers: number of the speller's layers.
        input_feeding: whether the speller reads the context of the step before (section 3.2).
        dropout: probability of dropping a value.
        label_smoothing: share of the target distribution spread evenly in training.
        scheduled_sampling: probability that training replaces a previous token by one drawn from the model
            (section 3.3).
        soft_window_sigma: width of the soft window in encoder frames.
    """

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "small": {
            "listener_size": 128,
            "joined_frames": [2, 2, 2],
            "attention_size": 128,
            "speller_size": 160,
            "speller_layers": 1,
            "input_feeding": False,
            "dropout": 0.1,
            "label_smoothing": 0.05,
            "scheduled_sampling": 0.0,
            "soft_window_sigma": 4.0,
        },
        "paper": {
            "listener_size": 256,
            "joined_frames": [1, 2, 2, 2],
            "attention_size": 512,
            "speller_size": 512,
            "speller_layers": 2,
            "input_feeding": True,
            "dropout": 0.0,
            "label_smoothing": 0.0,
            "scheduled_sampling": 0.1,
            "soft_window_sigma": 4.0,
        },
    }

    def __init__(
        self,
        *,
        n_mels: int,
        vocabulary_size: int,
        listener_size: int,
        joined_frames: Sequence[int],
        attention_size: int,
        speller_size: int,
        speller_layers: int,
        input_feeding: bool,
        dropout: float,
        label_smoothing: float,
        scheduled_sampling: float,
        soft_window_sigma: float,
    ) -> None:
        super().__init__(label_smoothing, soft_window_sigma)
        self.input_feeding = input_feeding
        self.scheduled_sampling = scheduled_sampling
        self.listener = Listener(n_mels, listener_size, joined_frames, dropout)
        context_size = self.listener.output_size
        self.keys = nn.Linear(context_size, attention_size)
        self.queries = nn.Linear(speller_size, attention_size)
        self.embedding = nn.Embedding(vocabulary_size, speller_size)
        self.speller = nn.LSTM(
            speller_size + (context_size if input_feeding else 0),
            speller_size,
            num_layers=speller_layers,
            batch_first=True,
        )
        self.output = nn.Sequential(
            nn.Linear(speller_size + context_size, speller_size),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(speller_size, vocabulary_size),
        )

    def encode(self, features: Tensor, lengths: Tensor) -> Memory:
        """Return keys and values of ``features`` ``[batch, time, mel]``."""
        heard, lengths = self.listener(features, lengths)
        return Memory(self.keys(heard), heard, lengths)

    def spell(
        self, previous: Tensor, memory: Memory, state: State | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Decode the steps of ``previous`` ``[batch, steps]``, at once or, with input feeding, one by one."""
        embedded = self.embedding(previous)
        if not self.input_feeding:
            hidden, state = self.speller(embedded, state)
            contexts, weights = attend(self.queries(hidden), memory, bias)
        else:
            hidden, contexts, weights, state = self._spell_feeding(embedded, memory, state, bias)
        assert state is not None
        return self.output(torch.cat([hidden, contexts], dim=-1)), weights, state

    def perturb(self, previous: Tensor, memory: Memory) -> Tensor:
        """Replace previous tokens by draws from what the model predicts after the reference prefix.

        The paper draws after the model's own prefix; drawing after the reference keeps all steps one product.
        """
        if self.scheduled_sampling == 0.0:
            return previous
        with torch.no_grad():
            probabilities = self.spell(previous[:, :-1], memory)[0].softmax(dim=-1)
            drawn = torch.multinomial(probabilities.flatten(0, 1), 1).view_as(previous[:, 1:])
        replaced = torch.rand(drawn.shape, device=drawn.device) < self.scheduled_sampling
        return torch.cat([previous[:, :1], torch.where(replaced, drawn, previous[:, 1:])], dim=1)

    def _spell_feeding(
        self, embedded: Tensor, memory: Memory, state: State | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        context = memory.values.new_zeros(len(embedded), 1, memory.values.shape[-1])
        if state is not None:
            context, state = state[0].transpose(0, 1), state[1:]
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for position in range(embedded.shape[1]):
            token = embedded[:, position : position + 1]
            hidden, state = self.speller(torch.cat([token, context], dim=-1), state)
            step_bias = None if bias is None else bias[:, position : position + 1]
            context, weights = attend(self.queries(hidden), memory, step_bias)
            steps.append((hidden, context, weights))
        assert state is not None
        hiddens, contexts, all_weights = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
        return hiddens, contexts, all_weights, (context.transpose(0, 1), *state)
