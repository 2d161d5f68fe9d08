"""The three models the way that comes to mind first, with the same weights from the same seed.

A loop over the decoder's steps; masks by a loop over the utterances; packed sequences for layers of both directions;
torch's own layers for everything else.
"""

import random

import torch
from torch import Tensor, nn

from sonosco_mlflow.models import attention, deepspeech2, las, layers, tds
from sonosco_mlflow.models.attention import Memory
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.models.las import LAS
from sonosco_mlflow.models.tds import TDS


def valid_frames(lengths: Tensor, frames: int) -> Tensor:
    mask = torch.zeros(len(lengths), frames, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, : int(length)] = True
    return mask


class Packed(nn.Module):
    """A recurrent layer over packed sequences."""

    def __init__(self, cell: str, input_size: int, hidden_size: int, merge: str) -> None:
        super().__init__()
        self.merge = merge
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "clipped": nn.RNN}[cell]
        nonlinearity = {"nonlinearity": "relu"} if cell == "clipped" else {}
        self.layer = kind(input_size, hidden_size, batch_first=True, bidirectional=merge != "forward", **nonlinearity)
        self.output_size = 2 * hidden_size if merge == "concatenation" else hidden_size

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        if self.merge != "sum":
            return outputs
        return outputs.view(*outputs.shape[:2], 2, -1).sum(dim=2)


def attend(queries: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    scores = queries @ memory.keys.transpose(1, 2) / memory.keys.shape[-1] ** 0.5
    for row, length in enumerate(memory.lengths):
        scores[row, :, int(length) :] = float("-inf")
    weights = scores.softmax(dim=-1)
    return weights @ memory.values, weights


class ObviousTDS(TDS):
    def spell(self, previous: Tensor, memory: Memory, state=None, bias=None):
        hidden, logits, weights = None, [], []
        for step in range(previous.shape[1]):
            query, hidden = self.recurrent(self.embedding(previous[:, step : step + 1]), hidden)
            context, attended = attend(query, memory)
            logits.append(self.output(torch.cat([context, query], dim=-1)))
            weights.append(attended)
        return torch.cat(logits, dim=1), torch.cat(weights, dim=1), ()


class ObviousLAS(LAS):
    def spell(self, previous: Tensor, memory: Memory, state=None, bias=None):
        context = memory.values.new_zeros(len(previous), 1, memory.values.shape[-1])
        logits, weights = [], []
        for step in range(previous.shape[1]):
            token = previous[:, step : step + 1]
            if self.training and logits and random.random() < self.scheduled_sampling:
                token = torch.multinomial(logits[-1][:, 0].softmax(dim=-1), 1)
            embedded = self.embedding(token)
            value = torch.cat([embedded, context], dim=-1) if self.input_feeding else embedded
            hidden, state = self.speller(value, state)
            context, attended = attend(self.queries(hidden), memory)
            logits.append(self.output(torch.cat([hidden, context], dim=-1)))
            weights.append(attended)
        return torch.cat(logits, dim=1), torch.cat(weights, dim=1), ()

    def spell_in_training(self, previous: Tensor, memory: Memory, bias=None):
        return self.spell(previous, memory)


def model_class(name: str) -> type[SpeechModel]:
    """Return a class that is built like the package's own, after replacing what it is made of."""
    for module in (attention, deepspeech2, las, layers, tds):
        for plain in (valid_frames, nn.Dropout):
            if hasattr(module, plain.__name__):
                setattr(module, plain.__name__, plain)
        if hasattr(module, "Recurrent"):
            module.Recurrent = Packed
    return {"tds": ObviousTDS, "las": ObviousLAS, "deepspeech2": deepspeech2.DeepSpeech2}[name]
