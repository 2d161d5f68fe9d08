r"""N-grams, and the ARPA files that keep them, as KenLM, SRILM and this program write them.

::

    # tokens: 8f14e45f...            lines before \data\ are comments
    \data\
    ngram 1=4
    ngram 2=3

    \1-grams:
    -99	<s>	-0.30103             log10 of probability, words, log10 of back-off weight
    ...
    \end\
"""

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sonosco_mlflow.errors import UserError

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
LN10 = math.log(10.0)
# What is written of a word that never follows another.
_NEVER = -99.0


@dataclass(frozen=True)
class Order:
    """All n-grams of one length, ``[n-grams]`` each; natural logarithms.

    Attributes:
        parents: for each, the number of the n-gram without its last word among those that are one word shorter.
        words: its last word.
        log_probs: of the last word behind the others.
        backoffs: weight of the n-gram as a context; 0 where it is none.
    """

    parents: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float64]
    backoffs: npt.NDArray[np.float64]


@dataclass(frozen=True)
class NGrams:
    """A back-off model.

    Attributes:
        words: the vocabulary.
        orders: n-grams of length 1, 2, and so on; the first of them is the vocabulary.
        comments: lines about the model, without their ``#``.
    """

    words: tuple[str, ...]
    orders: Sequence[Order]
    comments: tuple[str, ...] = ()


def write_arpa(ngrams: NGrams, path: Path) -> None:
    """Write an ARPA file; the same n-grams give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"# {comment}\n" for comment in ngrams.comments)
        file.write("\\data\\\n")
        file.writelines(f"ngram {length}={len(order.words)}\n" for length, order in enumerate(ngrams.orders, 1))
        texts: list[str] = [""]
        for length, order in enumerate(ngrams.orders, 1):
            file.write(f"\n\\{length}-grams:\n")
            ends = [ngrams.words[word] for word in order.words]
            texts = [f"{texts[parent]} {end}" for parent, end in zip(order.parents, ends, strict=True)]
            for text, log_prob, backoff in zip(texts, order.log_probs / LN10, order.backoffs / LN10, strict=True):
                weight = "" if length == len(ngrams.orders) or backoff == 0.0 else f"\t{backoff:.7g}"
                file.write(f"{max(log_prob, _NEVER):.7g}\t{text[1:]}{weight}\n")
        file.write("\n\\end\\\n")
    partial.replace(path)


def read_arpa(path: Path) -> NGrams:
    """Read an ARPA file, also one packed by gzip.

    Raises:
        UserError: naming file and line, what was found and what was expected.
    """
    try:
        lines = unpacked(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}; expected an ARPA file in UTF-8, not a binary one of KenLM's") from error
    return _Reader(path, enumerate((line.strip(" \t\r") for line in lines), 1)).read()


def unpacked(path: Path) -> bytes:
    """Return the content of a file, of one packed by gzip as it was before.

    Raises:
        UserError: there is none, or it is broken.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: no such language model; `sonosco language-model` makes one") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: it cannot be unpacked: {error}") from error


class _Reader:
    """Reads the lines of one file.

    Args:
        path: to name in errors.
        lines: numbered from 1, stripped.
    """

    def __init__(self, path: Path, lines: Iterator[tuple[int, str]]) -> None:
        self.path = path
        self.number = 0
        self._lines = lines

    def read(self) -> NGrams:
        comments = []
        while (line := self._next("\\data\\")) != "\\data\\":
            # Other programs may write anything here.
            comments.append(line.removeprefix("#").strip())
        counts = self._counts()
        words: dict[str, int] = {}
        orders = []
        shorter: dict[tuple[int, ...], int] = {(): 0}
        for length, count in enumerate(counts, 1):
            self._expect(f"\\{length}-grams:", first=length > 1)
            order, shorter = self._order(length, count, length == len(counts), words, shorter)
            orders.append(order)
        self._expect("\\end\\")
        for needed in (START, END):
            if needed not in words:
                raise UserError(f"{self.path}: there is no {needed} among its 1-grams; expected it there")
        return NGrams(tuple(words), orders, tuple(comments))

    def _counts(self) -> list[int]:
        counts: list[int] = []
        while (line := self._line()).startswith("ngram "):
            length, equals, count = line.removeprefix("ngram ").partition("=")
            if not equals or length.strip() != str(len(counts) + 1) or not count.strip().isdigit():
                raise self._error(line, f"'ngram {len(counts) + 1}=' and a number")
            counts.append(int(count))
        if line != "\\1-grams:":
            raise self._error(line, "'ngram N=...' or '\\1-grams:'")
        return counts

    def _order(
        self, length: int, count: int, is_last: bool, words: dict[str, int], shorter: dict[tuple[int, ...], int]
    ) -> tuple[Order, dict[tuple[int, ...], int]]:
        known: dict[tuple[int, ...], int] = {}
        parents, log_probs, backoffs = np.empty(count, np.int64), np.empty(count), np.zeros(count)
        for place in range(count):
            line = self._next(f"{count} {length}-grams, found {place}")
            fields = line.split()
            if not length + 1 <= len(fields) <= length + 2 - is_last:
                raise self._error(line, f"a number, {length} words" + ("" if is_last else ", and maybe a number"))
            names = fields[1 : length + 1]
            if length == 1:
                words.setdefault(names[0], len(words))
            missing = [name for name in names if name not in words]
            if missing:
                raise self._error(line, f"words of the 1-grams; '{missing[0]}' is none of them")
            key = tuple(words[name] for name in names)
            if key in known:
                raise self._error(line, "each n-gram once")
            if key[:-1] not in shorter:
                raise self._error(line, f"'{' '.join(names[:-1])}' among the {length - 1}-grams")
            known[key] = place
            parents[place] = shorter[key[:-1]]
            log_probs[place] = self._number(line, fields[0])
            if log_probs[place] > 0:
                raise self._error(line, "the logarithm of a probability, 0 or less")
            backoffs[place] = self._number(line, fields[length + 1]) if len(fields) == length + 2 else 0.0
        ends = np.fromiter((key[-1] for key in known), np.int64, count)
        return Order(parents, ends, log_probs * LN10, backoffs * LN10), known

    def _expect(self, heading: str, first: bool = True) -> None:
        if first and (line := self._line()) != heading:
            raise self._error(line, f"'{heading}'")

    def _number(self, line: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self._error(line, f"a number where '{text}' stands")
        return value

    def _next(self, expected: str) -> str:
        line = self._line()
        if line.startswith("\\") and line != "\\data\\":
            raise self._error(line, expected)
        return line

    def _line(self) -> str:
        """Return the next line that is not empty."""
        for number, line in self._lines:
            self.number = number
            if line:
                return line
        raise UserError(f"{self.path}: it ends at line {self.number}; expected '\\end\\' at its end")

    def _error(self, line: str, expected: str) -> UserError:
        return UserError(f"{self.path}:{self.number}: found '{line[:80]}', expected {expected}")
