"""What two runs came to, bit for bit: rows of metrics, checkpoints, hypotheses.

>>> found = compare_runs(original, reproduction)          # doctest: +SKIP
>>> found.first                                           # doctest: +SKIP
Parting(step=12, what='train_loss was 1.5, is 1.25')
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from sonosco_mlflow.serialization.checkpoint import CHECKPOINTS, MANIFEST, position_of, verify_checkpoint
from sonosco_mlflow.serialization.state import tensor_bytes
from sonosco_mlflow.tracking.journal import storable
from sonosco_mlflow.tracking.metric_rows import metric_records
from sonosco_mlflow.tracking.segments import steps_of_ends
from sonosco_mlflow.tracking.store import artifact_bytes, artifact_names, download, find_run
from sonosco_mlflow.training.callbacks.base import is_timing

# Behind the rows of its step.
_TENSORS = ("model.safetensors", "optimizer.safetensors", "trainer.safetensors")
_OBJECTS = "objects.json"
_HYPOTHESES = "_hypotheses.json"
_EVALUATION = "evaluation"
AT_END = "test_"
"""What a run is evaluated on at its end has metrics that begin like this."""

_Rows = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Parting:
    """Something in which two runs differ: at which optimizer step, and how."""

    step: int
    what: str


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what came out otherwise.

    Attributes:
        rows: how many rows of metrics were compared; timings are not.
        checkpoints: names of those that both runs kept.
        hypotheses: artifacts that both runs have of the same end.
        partings: what differs, the earliest step first.
        reached: the last step of each of the two.
        remade: names of checkpoints whose states are equal, and whose objects were made with other parameters: those
            decided nothing by then, as the number of epochs.
    """

    rows: int
    checkpoints: tuple[str, ...]
    hypotheses: tuple[str, ...]
    partings: tuple[Parting, ...]
    reached: tuple[int, int]
    remade: tuple[str, ...] = ()

    @property
    def first(self) -> Parting | None:
        """Where the two part, or None if they are equal."""
        return self.partings[0] if self.partings else None


def compare_runs(original: str, other: str, until: int | None = None) -> Comparison:
    """Compare two runs of the tracking store.

    Args:
        original: id of a run.
        other: id of the one that is to equal it.
        until: last optimizer step to compare; what a run has only at its end, its hypotheses, is then left out.

    Raises:
        UserError: an artifact cannot be read.
        BrokenCheckpointError: a checkpoint is not what its manifest says.
    """
    one, two = _rows(original, until), _rows(other, until)
    reached = _last_step(one), _last_step(two)
    partings = _compare_rows(one, two, _ends(original, reached), _ends(other, reached[::-1]))
    checkpoints = sorted(
        (position, name)
        for name in _common(original, other, CHECKPOINTS)
        if (position := position_of(name)) is not None and (until is None or position[0] <= until)
    )
    remade = []
    for (step, _), name in checkpoints:
        difference, files = _compare_checkpoints(original, other, name)
        if difference:
            partings.append(Parting(step, difference))
            # Those that follow differ by it.
            break
        remade += [name] if files else []
    hypotheses = [name for name in _common(original, other, _EVALUATION) if name.endswith(_HYPOTHESES)]
    hypotheses = hypotheses if until is None and reached[0] == reached[1] else []
    last = max((parting.step for parting in partings), default=0)
    for name in hypotheses:
        difference = _compare_hypotheses(original, other, f"{_EVALUATION}/{name}")
        partings += [Parting(last, difference)] if difference else []
    partings.sort(key=lambda parting: parting.step)
    return Comparison(
        rows=len({**one, **two}),
        checkpoints=tuple(name for _, name in checkpoints),
        hypotheses=tuple(hypotheses),
        partings=tuple(partings),
        reached=reached,
        remade=tuple(remade),
    )


def last_step(run_id: str) -> int:
    """Return the last step of which a run has a metric, or -1."""
    return _last_step(_rows(run_id, None))


def _rows(run_id: str, until: int | None) -> _Rows:
    return {
        key: storable(recorded.value)
        for key, recorded in metric_records(run_id).items()
        if not is_timing(key[0]) and (until is None or key[1] <= until)
    }


def _last_step(rows: _Rows) -> int:
    return max((step for _, step in rows), default=-1)


def _ends(run_id: str, reached: tuple[int, int]) -> frozenset[int]:
    """Return the steps at which a run may have been at an end that the other went beyond, or it itself later did."""
    own, others = reached
    return frozenset(steps_of_ends(find_run(run_id), own)) | ({own} if own < others else set())


def _compare_rows(one: _Rows, two: _Rows, ends: frozenset[int], others_ends: frozenset[int]) -> list[Parting]:
    partings = []
    for name, step in sorted({**one, **two}, key=lambda key: (key[1], key[0])):
        was, now = one.get((name, step)), two.get((name, step))
        if was is None or now is None:
            has, at = ("the original", ends) if now is None else ("the other", others_ends)
            # What a run is evaluated on at its end, the other is not where it goes on.
            if not (name.startswith(AT_END) and step in at):
                partings.append(Parting(step, f"only {has} has {name}"))
        elif was.hex() != now.hex():
            partings.append(Parting(step, f"{name} was {was!r}, is {now!r}"))
    return partings


def _common(original: str, other: str, folder: str) -> list[str]:
    return sorted(set(artifact_names(original, folder)) & set(artifact_names(other, folder)))


def _compare_checkpoints(original: str, other: str, name: str) -> tuple[str, list[str]]:
    """Return the first tensor in which two states differ, or an empty text; and the files in which the two do."""
    folder = f"{CHECKPOINTS}/{name}"
    files = [json.loads(artifact_bytes(run_id, f"{folder}/{MANIFEST}"))["files"] for run_id in (original, other)]
    differing = [file for file in files[0] if files[0][file] != files[1].get(file)]
    if not differing:
        return "", []
    with tempfile.TemporaryDirectory() as scratch:
        places = [download(run_id, folder, Path(scratch) / run_id) for run_id in (original, other)]
        for place in places:
            verify_checkpoint(place)
        for file in _TENSORS:
            was, now = (safetensors.torch.load((place / file).read_bytes()) for place in places)
            for key in sorted({**was, **now}):
                if key not in was or key not in now or was[key].shape != now[key].shape:
                    return f"{name}/{file}: {key} is not in both, or has another shape", differing
                if tensor_bytes({key: was[key]}) != tensor_bytes({key: now[key]}):
                    largest = (was[key].double() - now[key].double()).abs().max().item()
                    return f"{name}/{file}: {key}, largest difference {largest:.3g}", differing
    return "" if differing == [_OBJECTS] else f"{name}: {', '.join(differing)}", differing


def _compare_hypotheses(original: str, other: str, name: str) -> str:
    was, now = (json.loads(artifact_bytes(run_id, name)) for run_id in (original, other))
    if was == now:
        return ""
    rows = [dict(zip(was["columns"], row, strict=True)) for row in was["data"]]
    others = [dict(zip(now["columns"], row, strict=True)) for row in now["data"]]
    for row, changed in zip(rows, others, strict=False):
        if row != changed:
            return f"{name}: {row['id']} was {row['hypothesis']!r}, is {changed['hypothesis']!r}"
    return f"{name}: {len(rows)} utterances, and {len(others)}"
