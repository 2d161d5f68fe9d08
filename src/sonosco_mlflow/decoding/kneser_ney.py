"""Interpolated modified Kneser-Ney n-grams (Chen & Goodman 1998, section 4), counted by sorting.

A word's probability behind a context is its count there, less a discount, plus what the discounts of the context set
free times its probability behind the context without its first word. Below the highest order an n-gram counts once for
each word that it was seen behind; one that begins a sentence is behind nothing and keeps its count. The shortest
context is empty, and behind it stands the even distribution over all words and ``<unk>``.

>>> ngrams = train_ngrams([[0, 1], [1]], ["A", "B"], order=2)
>>> [len(order.words) for order in ngrams.orders]
[5, 4]
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from sonosco_mlflow.decoding.arpa import END, START, UNKNOWN, NGrams, Order
from sonosco_mlflow.errors import UserError

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# For an n-gram seen once, twice and more often, where the counts give none above 0 and up to that: KenLM's.
_FALLBACK = (0.5, 1.0, 1.5)


def train_ngrams(sentences: Iterable[Sequence[int]], words: Sequence[str], order: int) -> NGrams:
    """Return the n-grams of ``sentences``, all of them: nothing is pruned.

    Args:
        sentences: numbers of words, without start and end.
        words: their names.
        order: length of the longest n-grams.

    Raises:
        UserError: there is no sentence, or no n-gram of that length.
    """
    names = (UNKNOWN, START, END, *words)
    text = [number for sentence in sentences for number in (1, *(word + 3 for word in sentence), 2)]
    counts = _Counts(np.array(text, np.int64), len(names), order)
    orders: list[Order] = []
    lower = np.empty(0)
    for length in range(1, order + 1):
        parents, last, adjusted = counts.of(length)
        groups = 1 if length == 1 else len(orders[-1].words)
        seen, freed = _discounted(parents, adjusted, groups)
        behind = np.full(len(last), 1.0 / (len(names) - 1)) if length == 1 else lower[counts.suffixes(length)]
        lower = seen + freed[parents] * behind
        if length > 1:
            before = orders[-1]
            is_context = np.bincount(parents, minlength=groups) > 0
            backoffs = np.log(freed, where=is_context, out=np.zeros(groups))
            orders[-1] = Order(before.parents, before.words, before.log_probs, backoffs)
        # The start of a sentence follows nothing.
        is_start = (last == 1) & (length == 1)
        log_probs = np.log(lower, where=~is_start, out=np.full(len(last), -np.inf))
        orders.append(Order(parents, last, log_probs, np.zeros(len(last))))
    return NGrams(names, orders)


class _Counts:
    """The distinct n-grams of a text, each order sorted by (n-gram without its last word, last word).

    Args:
        text: words; each sentence begins with 1 and ends with 2, which occur nowhere else.
        size: number of words.
        order: length of the longest n-grams.
    """

    def __init__(self, text: Integers, size: int, order: int) -> None:
        if not len(text):
            raise UserError("there is no sentence to train a language model on")
        self.order = order
        # All words are 1-grams, whether they occur or not.
        self._parents = [np.zeros(size, np.int64)]
        self._words = [np.arange(size)]
        self._raw = [np.bincount(text, minlength=size)]
        self._suffixes = [np.zeros(size, np.int64)]
        starts, ranks = np.arange(len(text)), text
        for length in range(2, order + 1):
            # An n-gram that would go on behind the end of its sentence is none.
            inside = text[starts + length - 2] != 2
            starts, ranks, tails = starts[inside], ranks[inside], _tail_ranks(starts, ranks, starts[inside] + 1)
            if not len(starts):
                raise UserError(
                    f"no sentence has an n-gram of {length} words, start and end included; expected an order below that"
                )
            keys, firsts, ranks, raw = np.unique(
                ranks * size + text[starts + length - 1], return_index=True, return_inverse=True, return_counts=True
            )
            self._parents.append(keys // size)
            self._words.append(keys % size)
            self._raw.append(raw)
            self._suffixes.append(tails[firsts])

    def suffixes(self, length: int) -> Integers:
        """Return, for each n-gram of that length, the number of the n-gram without its first word."""
        return self._suffixes[length - 1]

    def of(self, length: int) -> tuple[Integers, Integers, Integers]:
        """Return parents, last words and adjusted counts of the n-grams of that length."""
        adjusted = self._raw[length - 1]
        if length < self.order:
            behind = np.bincount(self._suffixes[length], minlength=len(adjusted))
            adjusted = np.where(self._begins_sentence(length), adjusted, behind)
        if length == 1:
            adjusted = np.where(self._words[0] == 1, 0, adjusted)
        return self._parents[length - 1], self._words[length - 1], adjusted

    def _begins_sentence(self, length: int) -> npt.NDArray[np.bool_]:
        first: npt.NDArray[np.bool_] = self._words[0] == 1
        for parents in self._parents[1:length]:
            first = first[parents]
        return first


def _tail_ranks(starts: Integers, ranks: Integers, wanted: Integers) -> Integers:
    """Return the ranks of the n-grams that begin at ``wanted``, which are among ``starts``."""
    return ranks[np.searchsorted(starts, wanted)]


def _discounted(parents: Integers, counts: Integers, groups: int) -> tuple[Floats, Floats]:
    """Return each n-gram's discounted share of its context, and what the discounts set free of each context."""
    once, twice, thrice, fourfold = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    discounts = _FALLBACK
    if once and twice and thrice:
        share = once / (once + 2 * twice)
        estimated = (
            1 - 2 * share * twice / once,
            2 - 3 * share * thrice / twice,
            3 - 4 * share * fourfold / thrice,
        )
        if all(0 < discount <= times for times, discount in enumerate(estimated, 1)):
            discounts = estimated
    taken = np.array([0.0, *discounts])[np.minimum(counts, 3)]
    sums = np.bincount(parents, counts, groups)
    seen = sums > 0
    shares = np.divide(counts - taken, sums[parents], out=np.zeros(len(counts)), where=seen[parents])
    freed = np.divide(np.bincount(parents, taken, groups), sums, out=np.ones(groups), where=seen)
    return shares, freed
