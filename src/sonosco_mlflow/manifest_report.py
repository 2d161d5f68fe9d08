"""What there is in manifests, what is wrong with it, what to listen to: one page of HTML that needs nothing else."""

import heapq
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import soundfile

from sonosco_mlflow.data.manifest_tools.findings import CHECKS, Finding
from sonosco_mlflow.data.manifest_tools.rows import numbered_rows
from sonosco_mlflow.data.manifest_tools.statistics import statistics_of
from sonosco_mlflow.data.utterances import Utterance
from sonosco_mlflow.pages import data_address, page
from sonosco_mlflow.pictures import histograms

# Findings of one check, and rows of one kind, that the page shows.
_EXAMPLES = 20
_WORST = 5
# Checks whose findings are worth hearing.
_HEARD = {"clipping": "clipped", "silence": "silent", "duration": "of another duration than the manifest says"}


@dataclass(frozen=True)
class _Row:
    """A row, and what to hear of it: the address of its sound, or in words why there is none."""

    manifest: Path
    line: int
    utterance: Utterance
    sound: str = ""
    silence: str = ""

    @property
    def rate(self) -> float:
        """Characters a second."""
        return len(self.utterance.text) / self.utterance.duration


def report(paths: Sequence[Path], findings: Iterable[Finding], most_bytes: int) -> str:
    """Return the page.

    Args:
        paths: the manifests.
        findings: what was found in them.
        most_bytes: of the page. Where all sounds would make it larger, some are left out, which it says.

    Raises:
        UserError: there is no such manifest.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, list[Finding]] = {check: [] for check in CHECKS}
    for finding in findings:
        counts[finding.check] += 1
        if counts[finding.check] <= _EXAMPLES:
            examples[finding.check].append(finding)
    together = statistics_of(row.utterance for row in _rows(paths))
    content = {
        "paths": [str(path) for path in paths],
        "together": together,
        "each": [(path, statistics_of(row.utterance for row in _rows([path]))) for path in paths],
        "picture": data_address(histograms(together.histograms), "image/png"),
        "counts": counts,
        "examples": examples,
        "checks": CHECKS,
        "most_megabytes": most_bytes / 1e6,
    }
    worst = _worst_rows(paths, examples)
    plain = page("manifest.html", worst=worst, **content)
    return page("manifest.html", worst=_with_sounds(worst, most_bytes - len(plain.encode())), **content)


def _rows(paths: Sequence[Path]) -> Iterator[_Row]:
    for path in paths:
        for line, row in numbered_rows(path):
            if isinstance(row, Utterance):
                yield _Row(path, line, row)


def _worst_rows(paths: Sequence[Path], examples: dict[str, list[Finding]]) -> dict[str, list[_Row]]:
    def most(key: Callable[[_Row], float]) -> list[_Row]:
        return heapq.nlargest(_WORST, _rows(paths), key)

    worst = {
        "most characters a second": most(lambda row: row.rate),
        "fewest characters a second": most(lambda row: -row.rate),
        "longest": most(lambda row: row.utterance.duration),
        "shortest": most(lambda row: -row.utterance.duration),
    }
    places = {check: {(found.manifest, found.line) for found in examples[check][:_WORST]} for check in _HEARD}
    if any(places.values()):
        for row in _rows(paths):
            for check, title in _HEARD.items():
                if (str(row.manifest), row.line) in places[check]:
                    worst.setdefault(title, []).append(row)
    return worst


def _with_sounds(worst: dict[str, list[_Row]], room: int) -> dict[str, list[_Row]]:
    """Return the rows with their sounds, as long as there are bytes left of ``room``."""
    found: dict[str, list[_Row]] = {}
    for kind, rows in worst.items():
        found[kind] = []
        for row in rows:
            heard = _with_sound(row, room)
            room -= len(heard.sound)
            found[kind].append(heard)
    return found


def _with_sound(row: _Row, room: int) -> _Row:
    path = row.manifest.parent / row.utterance.audio_filepath
    try:
        header = soundfile.info(path)
        # Three bytes are four characters in a page. What FLAC saves of it is not known before.
        if header.frames * header.channels * 2 * 4 / 3 > room:
            return replace(row, silence=f"left out: {header.duration:.0f} s would make the page too large")
        samples, rate = soundfile.read(path, dtype="int16", always_2d=True)
        packed = io.BytesIO()
        soundfile.write(packed, samples, rate, format="FLAC", subtype="PCM_16")
    except (soundfile.LibsndfileError, OSError):
        return replace(row, silence="cannot be read")
    return replace(row, sound=data_address(packed.getvalue(), "audio/flac"))
