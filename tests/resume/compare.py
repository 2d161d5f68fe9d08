"""Whether two finished runs are equal to the last bit in all that they keep, and where not, what differs by name."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness import World
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from sonosco_mlflow.serialization.checkpoint import position_of
from sonosco_mlflow.tracking.journal import read_rows
from sonosco_mlflow.training.callbacks.base import is_timing
from sonosco_mlflow.training.callbacks.model_checkpoint import FAILED

MOST_DIFFERENCES = 8
# Of the machine, and of a resume itself: a run that was never stopped has other ones, or none.
NOT_COMPARED = ("system/", "resume.")
# An epoch that a resume enters in its middle has none.
AT_MOST_ONCE = "epoch_seconds"
HALF_UPLOADED = ".artifact.uploading."
TAGS = ("sonosco.state", "sonosco.weights_digest", "sonosco.checkpoint", "sonosco.data_digest", "sonosco.code_digest")

Facts = dict[str, str]


def compare_runs(expected: World, found: World, *, local: bool = True) -> str:
    """Return the first differences, one a line, or an empty string.

    Args:
        local: whether ``found`` still has, in its run folder, all that it wrote.
    """
    differences = []
    for title, facts in FACTS.items():
        if local or title != "run folder":
            differences += [f"{title}: {line}" for line in _differences(facts(expected), facts(found))]
    more = [f"and {len(differences) - MOST_DIFFERENCES} more"] if len(differences) > MOST_DIFFERENCES else []
    return "\n".join([*differences[:MOST_DIFFERENCES], *more])


def _differences(expected: Facts, found: Facts) -> list[str]:
    names = sorted({*expected, *found})
    pairs = ((name, expected.get(name, "nothing"), found.get(name, "nothing")) for name in names)
    return [f"{name}: {one[:80]!r} and {other[:80]!r}" for name, one, other in pairs if one != other]


def _state(world: World) -> Facts:
    run = world.run
    facts = {"status": run.info.status, "error": run.data.tags.get("sonosco.error", "none")}
    return {**facts, **{tag: run.data.tags.get(tag, "nothing") for tag in TAGS}, **run.data.params}


def _metrics(world: World) -> Facts:
    client, run = world.client, world.run
    facts: Facts = {}
    for name in run.data.metrics:
        if name.startswith(NOT_COMPARED):
            continue
        for item in client.get_metric_history(run.info.run_id, name):
            value = "any" if is_timing(name) else float(item.value).hex()
            key = f"{name} at step {item.step}"
            # More than one row is a difference, even of equal values.
            facts[key] = f"{facts[key]}, {value}" if key in facts else value
    return _without_missing_timings(facts)


def _without_missing_timings(facts: Facts) -> Facts:
    return {key: value for key, value in facts.items() if (key.split()[0], value) != (AT_MOST_ONCE, "any")}


def _stored_checkpoints(world: World) -> Facts:
    files = _files(world.artifacts / "checkpoints", "step-*")
    # What MLflow's own upload leaves when it is killed: MLflow shows it to nobody, and lets nobody delete it.
    return {name: content for name, content in files.items() if f"/{HALF_UPLOADED}" not in name}


def _run_folder(world: World) -> Facts:
    # Everything but what was put aside; what a crash left half-made must be gone.
    folder = world.run_folder / "checkpoints"
    names = [path.name for path in folder.iterdir() if not path.name.startswith("broken-") and path.name != FAILED]
    return {
        **_files(folder, "step-*"),
        **{name: "no checkpoint" for name in names if position_of(name) is None},
    }


def _files(folder: Path, pattern: str) -> Facts:
    found = (path for checkpoint in folder.glob(pattern) for path in checkpoint.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in found}


def _tables(world: World) -> Facts:
    return {path.name: path.read_text() for path in (world.artifacts / "evaluation").glob("*.json")}


def _journal(world: World) -> Facts:
    rows = []
    for row in read_rows(world.artifacts / "journal.jsonl"):
        values = {name: "any" if is_timing(name) else value.hex() for name, value in row.metrics.items()}
        values.pop(AT_MOST_ONCE, None)
        if values or row.texts:
            rows.append(json.dumps([row.micro_step, row.step, values, row.texts]))
    return {f"row {number}": row for number, row in enumerate(rows)}


def _events(folder: Path) -> Iterable[tuple[str, int, str]]:
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                content = repr(tensor_util.make_ndarray(value.tensor).tolist())
                yield value.tag, event.step, "any" if is_timing(value.tag) else content


def _event_facts(folder: Path) -> Facts:
    facts: Facts = {}
    last: Mapping[str, int] = {}
    for tag, step, content in _events(folder):
        key = f"{tag} at step {step}"
        facts[key] = f"{facts[key]}, {content}" if key in facts else content
        if step < last.get(tag, step):
            facts[f"{key}, order"] = f"comes after step {last[tag]}"
        last = {**last, tag: step}
    return _without_missing_timings(facts)


FACTS = {
    "state": _state,
    "metrics": _metrics,
    "checkpoints in MLflow": _stored_checkpoints,
    "run folder": _run_folder,
    "tables": _tables,
    "journal": _journal,
    "events of the run folder": lambda world: _event_facts(world.run_folder / "tensorboard"),
    "events in MLflow": lambda world: _event_facts(world.artifacts / "tensorboard"),
}
