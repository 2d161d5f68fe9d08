"""N-grams the slow way: the definitions, in dictionaries."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

LN10 = math.log(10.0)


class PlainModel:
    """What an ARPA file says, by its definition: the n-gram itself, or the back-off weight of its history times the
    probability behind the shorter one."""

    def __init__(self, path: Path) -> None:
        self.log_probs: dict[tuple[str, ...], float] = {}
        self.backoffs: dict[tuple[str, ...], float] = {}
        length = 0
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("-grams:"):
                length = int(line[1:-7])
            elif length and line and line[0] != "\\":
                fields = line.split()
                key = tuple(fields[1 : length + 1])
                self.log_probs[key] = float(fields[0]) * LN10
                self.backoffs[key] = float(fields[length + 1]) * LN10 if len(fields) > length + 1 else 0.0
        self.order = length

    def log_prob(self, history: Sequence[str], word: str) -> float:
        context = tuple(history[max(len(history) - self.order + 1, 0) :])
        if (*context, word) in self.log_probs:
            return self.log_probs[(*context, word)]
        return self.backoffs.get(context, 0.0) + self.log_prob(context[1:], word)


def plain_kneser_ney(
    sentences: Sequence[Sequence[str]], names: Sequence[str], order: int
) -> dict[tuple[str, ...], tuple[float, float]]:
    """Return logarithm of probability and of back-off weight of each n-gram (Chen & Goodman 1998, section 4)."""
    lists = [["<s>", *sentence, "</s>"] for sentence in sentences]
    raw = {
        length: Counter(tuple(words[i : i + length]) for words in lists for i in range(len(words) - length + 1))
        for length in range(1, order + 1)
    }
    counts: dict[int, dict[tuple[str, ...], int]] = {order: dict(raw[order])}
    for length in range(1, order):
        counts[length] = {
            key: raw[length][key]
            if key[0] == "<s>"
            else len({longer[0] for longer in raw[length + 1] if longer[1:] == key})
            for key in raw[length]
        }
    counts[1] = {(word,): 0 for word in ("<unk>", "<s>", "</s>", *names)} | counts[1] | {("<s>",): 0}

    def discount(length: int, count: int) -> float:
        times = Counter(counts[length].values())
        values = [0.5, 1.0, 1.5]
        if all(times[n] for n in (1, 2, 3)):
            share = times[1] / (times[1] + 2 * times[2])
            estimated = [n - (n + 1) * share * times[n + 1] / times[n] for n in (1, 2, 3)]
            if all(0 < value <= n for n, value in enumerate(estimated, 1)):
                values = estimated
        return 0.0 if count == 0 else values[min(count, 3) - 1]

    def behind(context: tuple[str, ...]) -> dict[str, int]:
        return {key[-1]: count for key, count in counts[len(context) + 1].items() if key[:-1] == context}

    def freed(context: tuple[str, ...]) -> float:
        seen = behind(context)
        total = sum(seen.values())
        return sum(discount(len(context) + 1, count) for count in seen.values()) / total if total else 1.0

    def probability(key: tuple[str, ...]) -> float:
        if not key:
            return 1 / (len(names) + 2)
        seen = behind(key[:-1])
        total = sum(seen.values())
        own = (seen[key[-1]] - discount(len(key), seen[key[-1]])) / total if total else 0.0
        return own + freed(key[:-1]) * probability(key[1:] if len(key) > 1 else ())

    result = {}
    for length in range(1, order + 1):
        for key in counts[length]:
            is_context = length < order and bool(behind(key))
            value = -math.inf if key == ("<s>",) else math.log(probability(key))
            result[key] = (value, math.log(freed(key)) if is_context else 0.0)
    return result
