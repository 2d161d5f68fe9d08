"""An n-gram over a model's own tokens as tensors: asked for the next tokens of many hypotheses at once.

A state is the longest end of what was said that the model knows as a context. Its n-grams are its arcs, sorted by
(state, token), so that the arcs of a state lie together and one of them is found by bisection. What a state has no arc
for is found at its shorter ends, each step down at the cost of a back-off weight (Katz 1987).

>>> model = TokenLanguageModel.read(Path("data/language_model.arpa"), tokenizer)      # doctest: +SKIP
>>> states = model.start(2)                                                           # doctest: +SKIP
>>> model.log_probs(states).shape                                                     # doctest: +SKIP
torch.Size([2, 33])
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from sonosco_mlflow.decoding.arpa import NGrams, read_arpa
from sonosco_mlflow.decoding.symbols import token_ids
from sonosco_mlflow.serialization.parameters import serializable
from sonosco_mlflow.text import SpecialToken, Tokenizer

NEVER = float("-inf")


@serializable
class TokenLanguageModel(nn.Module):
    """A back-off n-gram over token ids; padding, blank and start of sentence never follow.

    Use :meth:`of` or :meth:`read`. The constructor makes one of the given size, to be filled by ``load_state_dict``.

    Args:
        vocabulary_size: number of token ids.
        order: tokens of the longest n-gram.
        arcs: number of n-grams.
        states: number of contexts.

    Attributes:
        path: the file that it was read from, or None.
    """

    keys: Tensor
    arc_log_probs: Tensor
    targets: Tensor
    first_arcs: Tensor
    shorter: Tensor
    backoffs: Tensor
    unigrams: Tensor
    heard_as: Tensor
    initial: Tensor

    def __init__(self, vocabulary_size: int, order: int, arcs: int, states: int) -> None:
        super().__init__()
        self.order = order
        self.path: Path | None = None
        numbers = {"keys": arcs, "targets": arcs, "first_arcs": states + 1, "shorter": states, "initial": 1}
        for name, size in {**numbers, "heard_as": vocabulary_size}.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))
        for name, size in {"arc_log_probs": arcs, "backoffs": states, "unigrams": vocabulary_size}.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer) -> "TokenLanguageModel":
        """Read an ARPA file over the tokens of ``tokenizer``.

        Raises:
            UserError: it is none, or over something else; the message names the file and the line.
        """
        ngrams = read_arpa(path)
        model = cls.of(ngrams, token_ids(ngrams, tokenizer, path), tokenizer.vocabulary_size)
        model.path = path
        return model

    @classmethod
    def of(cls, ngrams: NGrams, ids: Tensor, vocabulary_size: int) -> "TokenLanguageModel":
        """Return the language model of ``ngrams``, whose words have the token ``ids`` ``[words]``."""
        entries = [ids[torch.from_numpy(order.words)] for order in ngrams.orders]
        # The states: nothing said, then all n-grams but the longest, in their order.
        firsts = [1]
        for order in ngrams.orders[:-1]:
            firsts.append(firsts[-1] + len(order.words))
        contexts = [torch.zeros(len(entries[0]), dtype=torch.int64)]
        contexts += [
            first + torch.from_numpy(order.parents) for first, order in zip(firsts, ngrams.orders[1:], strict=False)
        ]
        keys, sorting = (torch.cat(contexts) * vocabulary_size + torch.cat(entries)).sort()
        states = firsts[-1]
        model = cls(vocabulary_size, len(ngrams.orders), len(keys), states)
        model.keys.copy_(keys)
        model.first_arcs.copy_(torch.searchsorted(keys, torch.arange(states + 1) * vocabulary_size))
        log_probs = torch.cat([torch.from_numpy(order.log_probs) for order in ngrams.orders])
        model.arc_log_probs.copy_(log_probs[sorting])
        backoffs = torch.cat([torch.from_numpy(order.backoffs) for order in ngrams.orders])
        model.backoffs[1:] = backoffs[: states - 1]
        model._set_unigrams(ids)
        targets = torch.zeros_like(keys)
        start = 0
        for length, (context, entry) in enumerate(zip(contexts, entries, strict=True), 1):
            own = slice(start, start + len(entry))
            # Its longest known end is among the shorter n-grams, which are complete by now.
            model.targets.copy_(targets[sorting])
            end = torch.zeros_like(entry) if length == 1 else model.advance(model.shorter[context], entry)
            if length < model.order:
                targets[own] = 1 + torch.arange(own.start, own.stop)
                model.shorter[targets[own]] = end
            else:
                targets[own] = end
            start = own.stop
        model.targets.copy_(targets[sorting])
        model.initial.copy_(model.advance(torch.zeros(1, dtype=torch.int64), torch.tensor([int(SpecialToken.SOS)])))
        return model

    def _set_unigrams(self, ids: Tensor) -> None:
        known = torch.isin(torch.arange(len(self.heard_as)), ids)
        known[: len(SpecialToken)] = True
        self.heard_as.copy_(torch.where(known, torch.arange(len(known)), int(SpecialToken.UNKNOWN)))
        count = int(self.first_arcs[1])
        self.unigrams.fill_(NEVER)
        self.unigrams[self.keys[:count]] = self.arc_log_probs[:count]

    def start(self, count: int) -> Tensor:
        """Return the states ``[count]`` at the start of a sentence."""
        return self.initial.expand(count).clone()

    def log_probs(self, states: Tensor) -> Tensor:
        """Return ``[n, vocabulary]`` float64, the natural log-probability of each token behind ``states`` ``[n]``."""
        states = states.to(self.keys.device)
        found = self.unigrams.repeat(len(states), 1)
        for ends in reversed(self._ends(states)[:-1]):
            found += self.backoffs[ends][:, None]
            counts = (self.first_arcs[ends + 1] - self.first_arcs[ends]).masked_fill(ends == 0, 0)
            rows = torch.repeat_interleave(counts)
            firsts = self.first_arcs[ends] - (counts.cumsum(0) - counts)
            arcs = firsts[rows] + torch.arange(len(rows), device=rows.device)
            found[rows, self.keys[arcs] % found.shape[1]] = self.arc_log_probs[arcs]
        found = found[:, self.heard_as]
        found[:, [SpecialToken.PAD, SpecialToken.BLANK, SpecialToken.SOS]] = NEVER
        return found

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states after ``tokens``, both ``[n]``."""
        states, tokens = states.to(self.keys.device), tokens.to(self.keys.device)
        ends = torch.stack(self._ends(states))
        wanted = ends * len(self.unigrams) + self.heard_as[tokens]
        arcs = torch.searchsorted(self.keys, wanted).clamp_max(len(self.keys) - 1)
        is_known, longest = (self.keys[arcs] == wanted).max(dim=0)
        return self.targets[arcs.gather(0, longest[None])[0]].masked_fill(~is_known, 0)

    def _ends(self, states: Tensor) -> list[Tensor]:
        """Return each state's shorter ends, the state itself first and nothing said last."""
        ends = [states]
        for _ in range(self.order - 1):
            ends.append(self.shorter[ends[-1]])
        return ends
