"""In what two runs differ: what went into them, what came out, and which of the one is likely to have made the other.

>>> found = difference_of(first, second, Path())                     # doctest: +SKIP
>>> found.cause                                                      # doctest: +SKIP
'config: optimizer.lr was 0.001, is 0.002'
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.changes import Change, input_changes, unified_code_diff
from sonosco_mlflow.tracking.comparison import AT_END, Comparison, Parting, compare_runs
from sonosco_mlflow.tracking.description import RunLine
from sonosco_mlflow.tracking.metric_rows import metric_records
from sonosco_mlflow.tracking.segments import Segment, newest_segment
from sonosco_mlflow.tracking.store import find_training
from sonosco_mlflow.tracking.tags import WEIGHTS_DIGEST
from sonosco_mlflow.training.callbacks.base import is_timing

Curve = tuple[Sequence[int], Sequence[float]]
# Of two inputs that differ, and both may have done it, the one that more often has.
_ORDER = ("decoding", "config", "data", "code", "environment", "numerics")
_HELD_OUT = ("dev: ", "test: ", "data/features/dev/", "data/features/test/", "the dev ", "the test ")
_EVALUATED = ("val_", AT_END)


@dataclass(frozen=True)
class MetricPair:
    """A metric of two runs: its last value and its lowest in each, or None where a run has none."""

    name: str
    last: tuple[float | None, float | None]
    lowest: tuple[float | None, float | None]


@dataclass(frozen=True)
class Difference:
    """In what two runs differ.

    Attributes:
        runs: the two, as in a list of runs.
        changes: inputs that differ, the likeliest cause first.
        code: unified diff of the files of code that differ.
        comparison: what came out, compared bit for bit.
        same_weights: whether the final weights are the same; None where a run has none.
        metrics: what each run came to.
        curves: steps and values of each run's metrics, by name.
        branches: where one of them went on otherwise than it had begun.
    """

    runs: tuple[RunLine, RunLine]
    changes: tuple[Change, ...]
    code: str
    comparison: Comparison
    same_weights: bool | None
    metrics: tuple[MetricPair, ...]
    curves: tuple[Mapping[str, Curve], Mapping[str, Curve]]
    branches: tuple[str, ...]

    @property
    def cause(self) -> str:
        """The likeliest cause of what differs, in a sentence."""
        first = self.comparison.first
        able = [change for change in self.changes if change.matters]
        shorter = min(self.comparison.reached)
        if first is not None and first.step > shorter:
            reasons = [line for change in self.changes for line in change.what if line.startswith("training.epochs ")]
            reasons += [f"run {run.run_id} is {run.state}" for run in self.runs if run.state != "finished"]
            why = f" ({', '.join(reasons)})" if reasons else ""
            return f"one went further{why}; up to step {shorter} nothing differs, to the last bit"
        if first is None:
            idle = ", ".join(change.name for change in self.changes)
            made = f"; what differs in their inputs ({idle}) made no difference" if idle else ""
            return f"nothing that was compared differs, to the last bit{made}"
        if not able:
            return "no recorded input that could have done it differs: look for a clock, a race, a generator of its own"
        return f"{able[0].name}: {able[0].summary}"


def difference_of(one: str, other: str, project: Path) -> Difference:
    """Compare two trainings of the tracking store, their inputs and their outcomes.

    Args:
        one: id of a run.
        other: id of another.
        project: a project whose DVC cache or remotes may have the data of both.

    Raises:
        UserError: there is no such run, it is no training, or something that it kept cannot be read.
    """
    runs = find_training(one), find_training(other)
    segments = newest_segment(runs[0]), newest_segment(runs[1])
    changes = input_changes(segments[0], runs[0].data.tags, segments[1], runs[1].data.tags, project)
    comparison = compare_runs(one, other)
    differs = any(change.name == "code" for change in changes)
    weights = [run.data.tags.get(WEIGHTS_DIGEST) for run in runs]
    curves = _histories(one), _histories(other)
    return Difference(
        runs=(RunLine.of(runs[0]), RunLine.of(runs[1])),
        changes=tuple(likeliest_first(changes, comparison.first)),
        code=_code(*segments) if differs else "",
        comparison=comparison,
        same_weights=None if None in weights else weights[0] == weights[1],
        metrics=tuple(_metric_pairs(*curves)),
        curves=curves,
        branches=tuple(line for segment in segments for line in _branches(segment)),
    )


def likeliest_first(changes: Sequence[Change], parting: Parting | None) -> list[Change]:
    """Return the changes in the order in which they are likely to have made two runs part.

    How the test set is decoded matters only where they part in what came of that.
    """
    what = "" if parting is None else parting.what.removeprefix("only the original has ")
    what = what.removeprefix("only the other has ")
    evaluated, at_end = what.startswith(_EVALUATED), what.startswith(AT_END)
    changes = [replace(change, matters=True) if change.name == "decoding" and at_end else change for change in changes]

    def rank(change: Change) -> tuple[bool, int]:
        order = _ORDER.index(change.name)
        if change.name == "data" and all(line.startswith(_HELD_OUT) for line in change.what):
            # What is only evaluated on parts the runs there first, and nowhere else.
            order = -1 if evaluated else len(_ORDER)
        return not change.matters, order

    return sorted(changes, key=rank)


def _code(one: Segment, other: Segment) -> str:
    try:
        return unified_code_diff(one.archive(), other.archive())
    except UserError:
        # A run that was killed as it began; its change says so.
        return ""


def _histories(run_id: str) -> dict[str, Curve]:
    """Return steps and values of each metric of a run, timings and single layers aside."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for (name, step), recorded in sorted(metric_records(run_id).items()):
        if not is_timing(name) and "/" not in name:
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(recorded.value)
    return dict(found)


def _metric_pairs(one: Mapping[str, Curve], other: Mapping[str, Curve]) -> list[MetricPair]:
    pairs = []
    for name in sorted({**one, **other}):
        curves = one.get(name), other.get(name)
        last = [None if curve is None else curve[1][-1] for curve in curves]
        # What is no number is not the lowest.
        lowest = [
            None if curve is None else min(curve[1], key=lambda value: (value != value, value)) for curve in curves
        ]
        pairs.append(MetricPair(name, (last[0], last[1]), (lowest[0], lowest[1])))
    return pairs


def _branches(segment: Segment) -> list[str]:
    return [
        f"run {segment.run_id} went on otherwise in segment {branch.segment}, after "
        f"{branch.checkpoint or 'nothing'} ({', '.join(branch.changes)} changed)"
        for branch in segment.branches
    ]
