"""What two runs came to, bit for bit: rows of metrics, checkpoints, hypotheses.

>>> found = compare_runs(original, reproduction)          # doctest: +SKIP
>>> found.first                                           # doctest: +SKIP
Parting(step=12, what='train_loss was 1.5, is 1.25')
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from sonosco_mlflow.serialization.checkpoint import CHECKPOINTS, MANIFEST, position_of, verify_checkpoint
from sonosco_mlflow.serialization.state import tensor_bytes
from sonosco_mlflow.tracking.journal import storable
from sonosco_mlflow.tracking.mlflow_run import metric_records
from sonosco_mlflow.tracking.store import artifact_bytes, artifact_names, download
from sonosco_mlflow.training.callbacks.base import is_timing

# Behind the rows of its step.
_TENSORS = ("model.safetensors", "optimizer.safetensors", "trainer.safetensors")
_HYPOTHESES = "_hypotheses.json"
_EVALUATION = "evaluation"


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
        hypotheses: artifacts that both runs have.
        partings: what differs, the earliest step first.
    """

    rows: int
    checkpoints: tuple[str, ...]
    hypotheses: tuple[str, ...]
    partings: tuple[Parting, ...]

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
    rows, partings = _compare_rows(original, other, until)
    checkpoints = sorted(
        (position, name)
        for name in _common(original, other, CHECKPOINTS)
        if (position := position_of(name)) is not None and (until is None or position[0] <= until)
    )
    for (step, _), name in checkpoints:
        difference = _compare_checkpoints(original, other, name)
        if difference:
            partings.append(Parting(step, difference))
            # Those that follow differ by it.
            break
    hypotheses = [name for name in _common(original, other, _EVALUATION) if name.endswith(_HYPOTHESES)]
    hypotheses = hypotheses if until is None else []
    last = max((parting.step for parting in partings), default=0)
    for name in hypotheses:
        difference = _compare_hypotheses(original, other, f"{_EVALUATION}/{name}")
        partings += [Parting(last, difference)] if difference else []
    partings.sort(key=lambda parting: parting.step)
    return Comparison(rows, tuple(name for _, name in checkpoints), tuple(hypotheses), tuple(partings))


def _compare_rows(original: str, other: str, until: int | None) -> tuple[int, list[Parting]]:
    one, two = (
        {
            key: storable(recorded.value)
            for key, recorded in metric_records(run_id).items()
            if not is_timing(key[0]) and (until is None or key[1] <= until)
        }
        for run_id in (original, other)
    )
    partings = []
    for name, step in sorted({**one, **two}, key=lambda key: (key[1], key[0])):
        was, now = one.get((name, step)), two.get((name, step))
        if was is None or now is None:
            has = "the original" if now is None else "the other"
            partings.append(Parting(step, f"only {has} has {name}"))
        elif was.hex() != now.hex():
            partings.append(Parting(step, f"{name} was {was!r}, is {now!r}"))
    return len({**one, **two}), partings


def _common(original: str, other: str, folder: str) -> list[str]:
    return sorted(set(artifact_names(original, folder)) & set(artifact_names(other, folder)))


def _compare_checkpoints(original: str, other: str, name: str) -> str:
    """Return the first tensor in which two checkpoints differ, or else the files, or an empty text."""
    folder = f"{CHECKPOINTS}/{name}"
    files = [json.loads(artifact_bytes(run_id, f"{folder}/{MANIFEST}"))["files"] for run_id in (original, other)]
    if files[0] == files[1]:
        return ""
    with tempfile.TemporaryDirectory() as scratch:
        places = [download(run_id, folder, Path(scratch) / run_id) for run_id in (original, other)]
        for place in places:
            verify_checkpoint(place)
        for file in _TENSORS:
            was, now = (safetensors.torch.load((place / file).read_bytes()) for place in places)
            for key in sorted({**was, **now}):
                if key not in was or key not in now or was[key].shape != now[key].shape:
                    return f"{name}/{file}: {key} is not in both, or has another shape"
                if tensor_bytes({key: was[key]}) != tensor_bytes({key: now[key]}):
                    largest = (was[key].double() - now[key].double()).abs().max().item()
                    return f"{name}/{file}: {key}, largest difference {largest:.3g}"
    return f"{name}: {', '.join(file for file in files[0] if files[0][file] != files[1].get(file))}"


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
