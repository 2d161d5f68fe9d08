"""How much there is in manifests: hours, speakers, words, and how durations and rates of speech are spread.

>>> found = statistics_of([Utterance("a", "a.wav", 2.0, "GO ON", "x")])
>>> found.words, found.speakers
(2, 1)
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sonosco_mlflow.data.utterances import UNKNOWN_SPEAKER, Utterance

_MOST_BINS = 16
_WIDTH = 40
# Beyond it are the few that would press all others into one bin.
_SHOWN = 99.5


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges; the last count is of all that lie above the last edge.

    Attributes:
        name: of the values, with their unit.
        edges: from the lowest on, equally far apart.
        counts: as many as edges.
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __str__(self) -> str:
        rows = [
            (f"{low:g} to {high:g}", count)
            for low, high, count in zip(self.edges, self.edges[1:], self.counts, strict=False)
        ]
        if self.counts and self.counts[-1]:
            rows.append((f"above {self.edges[-1]:g}", self.counts[-1]))
        names = max((len(name) for name, _ in rows), default=0)
        digits = max((len(f"{count:,}") for _, count in rows), default=0)
        most = max(self.counts, default=0)
        lines = [f"  {name:>{names}}  {count:>{digits},}  {_bar(count, most)}".rstrip() for name, count in rows]
        return "\n".join([self.name, *lines])


@dataclass(frozen=True)
class Statistics:
    """What :func:`statistics_of` counts.

    Attributes:
        utterances: how many.
        seconds: of all together.
        speakers: how many are known.
        unknown: utterances of unknown speakers.
        words: parted by white space.
        characters: with the spaces between words.
        durations: in seconds, by utterance.
        rates: characters a second, by utterance.
        minutes: of speech, by known speaker.
    """

    utterances: int
    seconds: float
    speakers: int
    unknown: int
    words: int
    characters: int
    durations: Histogram
    rates: Histogram
    minutes: Histogram

    @property
    def hours(self) -> float:
        """The summed duration in hours."""
        return self.seconds / 3600

    @property
    def histograms(self) -> tuple[Histogram, ...]:
        """All three."""
        return self.durations, self.rates, self.minutes

    def __str__(self) -> str:
        unknown = f" (and {self.unknown:,} utterances of unknown ones)" if self.unknown else ""
        rows = {
            "utterances": f"{self.utterances:,}",
            "hours": f"{self.hours:,.2f}",
            "speakers": f"{self.speakers:,}{unknown}",
            "words": f"{self.words:,}",
            "characters": f"{self.characters:,}",
        }
        table = "\n".join(f"{name:<12}{value}" for name, value in rows.items())
        return "\n\n".join([table, *(str(histogram) for histogram in self.histograms if histogram.counts)])


def statistics_of(utterances: Iterable[Utterance]) -> Statistics:
    """Count what there is in ``utterances``."""
    durations, lengths = [], []
    words = unknown = 0
    seconds_of: defaultdict[str, float] = defaultdict(float)
    for utterance in utterances:
        durations.append(utterance.duration)
        lengths.append(len(utterance.text))
        words += len(utterance.text.split())
        if utterance.speaker == UNKNOWN_SPEAKER:
            unknown += 1
        else:
            seconds_of[utterance.speaker] += utterance.duration
    seconds = np.array(durations)
    return Statistics(
        utterances=len(durations),
        seconds=math.fsum(durations),
        speakers=len(seconds_of),
        unknown=unknown,
        words=words,
        characters=sum(lengths),
        durations=histogram("utterances by seconds", seconds),
        rates=histogram("utterances by characters a second", np.array(lengths) / seconds),
        minutes=histogram("speakers by minutes of speech", np.array(list(seconds_of.values())) / 60),
    )


def histogram(name: str, values: npt.NDArray[np.float64]) -> Histogram:
    """Count ``values``, at least 0, between round edges; the few highest of many are counted together."""
    if not len(values):
        return Histogram(name, (), ())
    low, high = float(values.min()), float(np.percentile(values, _SHOWN))
    step = _round_step((high - low) / _MOST_BINS or high / _MOST_BINS or 1.0)
    first = math.floor(low / step)
    bins = max(1, math.floor(high / step) + 1 - first)
    places = np.clip(np.floor(values / step) - first, 0, bins).astype(np.int64)
    counts = np.bincount(places, minlength=bins + 1)
    # By whole numbers of steps: sums of a step would drift.
    digits = max(0, -math.floor(math.log10(step)))
    edges = tuple(round((first + i) * step, digits) for i in range(bins + 1))
    return Histogram(name, edges, tuple(counts.tolist()))


def _round_step(step: float) -> float:
    """Return the next of 1, 2 and 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _bar(count: int, most: int) -> str:
    """Return a bar as long as ``count`` is among ``most``: what is there at all can be seen."""
    return "█" * max(round(_WIDTH * count / most), int(count > 0)) if most else ""
