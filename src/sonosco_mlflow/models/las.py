"""Listen, Attend and Spell (Chan et al. 2016, arXiv 1508.01211).

The listener is a pyramid of bidirectional LSTMs, each of which reads neighbouring frames joined into one, so
that the speller attends to few frames. The speller is an LSTM over the previous tokens. In the paper it also
reads the context it attended to before ("input feeding"), and location-aware attention reads its last weights:
then steps are made one by one. Without either, all steps are one product.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sonosco_mlflow.decoding.greedy import State
from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.models.attention import AttentionModel, Memory, attend
from sonosco_mlflow.models.energies import ENERGIES, build_energy, projection
from sonosco_mlflow.models.layers import Dropout, Recurrent, join_neighbours, subsampled, valid_frames
from sonosco_mlflow.models.ranges import require_positive, require_shares
from sonosco_mlflow.models.stepwise import LSTMSteps, RepeatedProduct, repeated
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
        self.dropout = Dropout(dropout)

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
        attention: "dot", "mlp", "additive" or "location": :mod:`sonosco_mlflow.models.energies`.
        location_filters: convolutions over the last step's weights in location-aware attention.
        location_width: encoder frames that they span; odd.
        ctc_weight: share of the training loss that is a CTC loss above the listener, 0 for none.

    Raises:
        UserError: ``ctc_weight`` is none of 0 to 1, the attention is unknown, or ``location_width`` is even.
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
            "attention": "dot",
            "location_filters": 10,
            "location_width": 25,
            "ctc_weight": 0.0,
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
            "attention": "mlp",
            "location_filters": 10,
            "location_width": 25,
            "ctc_weight": 0.0,
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
        attention: str = "dot",
        location_filters: int = 10,
        location_width: int = 25,
        ctc_weight: float = 0.0,
    ) -> None:
        require_shares(dropout=dropout, scheduled_sampling=scheduled_sampling)
        require_positive(listener_size=listener_size, joined_frames=joined_frames, attention_size=attention_size)
        require_positive(speller_size=speller_size, speller_layers=speller_layers)
        require_positive(location_filters=location_filters, location_width=location_width)
        super().__init__(label_smoothing, soft_window_sigma, ctc_weight, 2 * listener_size, vocabulary_size)
        if attention not in ENERGIES:
            raise UserError(f"model.settings.attention is '{attention}': {nearest(attention, ENERGIES)}")
        if location_width % 2 == 0:
            raise UserError(f"model.settings.location_width is {location_width}, expected an odd number")
        self.in_steps = input_feeding or attention == "location"
        self.input_feeding = input_feeding
        self.scheduled_sampling = scheduled_sampling
        self.listener = Listener(n_mels, listener_size, joined_frames, dropout)
        context_size = self.listener.output_size
        hidden = attention == "mlp"
        self.keys = projection(context_size, attention_size, hidden=hidden)
        self.queries = projection(speller_size, attention_size, hidden=hidden)
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
            Dropout(dropout),
            nn.Linear(speller_size, vocabulary_size),
        )
        self.energy = build_energy(attention, attention_size, location_filters, location_width)

    def encode(self, features: Tensor, lengths: Tensor) -> Memory:
        """Return keys and values of ``features`` ``[batch, time, mel]``."""
        heard, lengths = self.listener(features, lengths)
        return Memory(self.keys(heard), heard, lengths)

    def spell(
        self, previous: Tensor, memory: Memory, state: State | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Decode the steps of ``previous`` ``[rows, steps]``, all at once where no step reads the one before."""
        # For a single step, as in decoding, what torch's LSTM prepares costs more than the step.
        if self.in_steps or previous.shape[1] == 1:
            return self._spell_in_steps(previous, memory, state, bias)
        levels = None if state is None else tuple(part.transpose(0, 1).contiguous() for part in state)
        hidden, levels = self.speller(self.embedding(previous), levels)
        contexts, weights = attend(self.queries(hidden), memory, bias, self.energy)
        logits = self.output(torch.cat([hidden, contexts], dim=-1))
        return logits, weights, tuple(part.transpose(0, 1) for part in levels)

    def spell_in_training(
        self, previous: Tensor, memory: Memory, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Decode with scheduled sampling (section 3.3).

        Where steps are made one by one, a token is drawn after the model's own prefix, as in the paper. Where they are
        made at once, it is drawn after the reference prefix, by a first pass (Mihaylova and Martins 2019; Duckworth et
        al. 2019).
        """
        if self.in_steps:
            return self._spell_in_steps(previous, memory, None, bias, self.scheduled_sampling)
        return self.spell(self.perturb(previous, memory), memory, bias=bias)

    def perturb(self, previous: Tensor, memory: Memory) -> Tensor:
        """Replace previous tokens by draws from what the model predicts after the reference prefix."""
        if self.scheduled_sampling == 0.0:
            return previous
        with torch.no_grad():
            drawn = _draw(self.spell(previous[:, :-1], memory)[0])
        replaced = torch.rand(drawn.shape, device=drawn.device) < self.scheduled_sampling
        return torch.cat([previous[:, :1], torch.where(replaced, drawn, previous[:, 1:])], dim=1)

    def _spell_in_steps(
        self,
        previous: Tensor,
        memory: Memory,
        state: State | None,
        bias: Tensor | None,
        sampling: float = 0.0,
    ) -> tuple[Tensor, Tensor, State]:
        """Decode step by step; with the probability ``sampling`` a step reads what the last one predicts."""
        rows, steps = previous.shape
        if state is None:
            levels = memory.values.new_zeros(rows, self.speller.num_layers, self.speller.hidden_size)
            weights = memory.values.new_zeros(rows, 1, memory.values.shape[1])
            context, hidden, cells = memory.values.new_zeros(rows, 1, memory.values.shape[2]), levels, levels
        else:
            context, weights, hidden, cells = state
        speller = LSTMSteps(self.speller, self.embedding.embedding_dim)
        queries, scores = repeated(self.queries), self.energy.in_steps(memory.keys)
        read = RepeatedProduct(memory.values.mT)
        padding = ~valid_frames(memory.lengths, memory.keys.shape[1])[:, None]
        blocked = memory.values.new_zeros(padding.shape).masked_fill(padding, float("-inf"))
        biases = (blocked if bias is None else blocked + bias).expand(-1, steps, -1)
        # Backwards, a slice is a whole of zeros but for itself; the parts of a split are put together once.
        of_tokens = speller.of_tokens(self.embedding(previous)).chunk(steps, dim=1)
        replaced = torch.rand(previous.shape, device=previous.device) < sampling if sampling else None
        draws = [False] * steps if replaced is None else replaced.any(dim=0).tolist()
        made: list[tuple[Tensor, Tensor]] = []
        for step in range(steps):
            of_token = of_tokens[step]
            if replaced is not None and draws[step] and made:
                with torch.no_grad():
                    drawn = _draw(self.output(made[-1][0]))
                of_drawn = speller.of_tokens(self.embedding(drawn))
                of_token = torch.where(replaced[:, step, None, None], of_drawn, of_token)
            fed = context if self.input_feeding else context[..., :0]
            hidden, cells = speller(of_token, fed, hidden, cells)
            top = hidden[:, -1:]
            energies = scores(memory.by_utterance(queries(top)), memory.by_utterance(weights))
            attended = (energies + biases[:, step : step + 1]).softmax(dim=-1)
            context, weights = read(attended).view(rows, 1, -1), attended.view(rows, 1, -1)
            made.append((torch.cat([top, context], dim=-1), weights))
        joined, all_weights = (torch.cat(parts, dim=1) for parts in zip(*made, strict=True))
        return self.output(joined), all_weights, (context, weights, hidden, cells)


def _draw(logits: Tensor) -> Tensor:
    """Return a token for each step of ``logits`` ``[batch, steps, vocabulary]``, by its probability."""
    return torch.multinomial(logits.softmax(dim=-1).flatten(0, 1), 1).view(logits.shape[:2])
