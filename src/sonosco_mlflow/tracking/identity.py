"""What a run's state belongs to, as digests; and whether what is here is still that.

A state continued with other code, other data or on another kind of processor would end in other bits, and nothing
would show it. So each checkpoint names what it belongs to, and a difference is refused with a message that says what
differs, unless it was allowed by name; then the run records it.
"""

import json
from collections.abc import Callable, Mapping

from sonosco_mlflow.config import decisive
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.code_snapshot import archived_files
from sonosco_mlflow.tracking.environment import Environment
from sonosco_mlflow.tracking.segments import Segment
from sonosco_mlflow.tracking.tags import CANARY, CODE_DIGEST, CONFIG_DIGEST, DATA_DIGEST, ENVIRONMENT_DIGEST

# The digests in a checkpoint, each with the change that allows another.
CHANGE_OF = {
    "config": "config",
    "code": "code",
    "data": "data",
    "vocabulary": "vocabulary",
    "batches": "data",
    "environment": "environment",
    "threads": "numerics",
    "canary": "numerics",
}
CHANGES = tuple(dict.fromkeys(CHANGE_OF.values()))
# A longer list hides what it should show.
MOST_NAMES = 6


def check_identity(
    run_id: str,
    recorded: Mapping[str, str],
    present: Mapping[str, str],
    allowed: frozenset[str],
    explain: Mapping[str, Callable[[], str]],
) -> dict[str, tuple[str, str]]:
    """Return the digests that differ (recorded, present), all of them allowed.

    Args:
        run_id: for the message.
        recorded: digests by name; a name that is missing on either side is not compared.
        present: digests by name, of what is here.
        allowed: names of changes (:data:`CHANGES`).
        explain: by name, what says how the two differ.

    Raises:
        UserError: something differs and is not allowed; the message says how, and what allows it.
    """
    differ = {
        name: (recorded[name], present[name])
        for name in recorded
        if present.get(name, recorded[name]) != recorded[name]
    }
    refused = [name for name in differ if CHANGE_OF.get(name, name) not in allowed]
    if refused:
        lines = [f"  {name}: {_explained(explain[name])}" for name in refused]
        flags = dict.fromkeys(f"--allow-{CHANGE_OF.get(name, name)}-change" for name in refused)
        raise UserError(
            f"run {run_id} would not continue as it began:\n"
            + "\n".join(lines)
            + f"\nPut it back as it was, or pass {' '.join(flags)}: then the run goes on otherwise and records that"
        )
    return differ


def _explained(explain: Callable[[], str]) -> str:
    try:
        return explain()
    except UserError as error:
        # A segment that was killed as it began has not kept what it would be compared with.
        return f"it is another one; how it differs is not known ({error})"


def inputs_difference(
    one: Segment, its_tags: Mapping[str, str], other: Segment, others_tags: Mapping[str, str]
) -> dict[str, str]:
    """Return which recorded inputs of two runs differ, by name, and how.

    Args:
        one: a segment of a run.
        its_tags: the digests of that run, as tags.
        other: a segment of another.
        others_tags: the digests of that one.
    """
    explain: dict[str, Callable[[], str]] = {
        "code": lambda: code_difference(one.archive(), other.archive()),
        "config": lambda: config_difference(decisive(one.settings()), decisive(other.settings())),
        "data": lambda: data_difference(one.lineage(), other.lineage()),
        "environment": lambda: environment_difference(one.environment(), other.environment()),
        "canary": lambda: numerics_difference(one.environment(), other.environment()),
    }
    tags = dict(zip(explain, (CODE_DIGEST, CONFIG_DIGEST, DATA_DIGEST, ENVIRONMENT_DIGEST, CANARY), strict=True))
    return {name: _explained(explain[name]) for name, tag in tags.items() if its_tags.get(tag) != others_tags.get(tag)}


def config_difference(recorded: Mapping[str, object], present: Mapping[str, object]) -> str:
    """Say which keys of two flat recipes differ."""
    keys = [key for key in {**recorded, **present} if recorded.get(key) != present.get(key)]
    return _listed([f"{key} was {recorded.get(key)!r}, is {present.get(key)!r}" for key in keys]) or (
        "the recipe that the run kept is not the one whose digest it recorded"
    )


def code_difference(recorded: bytes, present: bytes) -> str:
    """Say which files differ between two snapshots."""
    names = _unequal(archived_files(recorded), archived_files(present))
    return f"{len(names)} files differ: {_listed(names)}"


def data_difference(recorded: str, present: str) -> str:
    """Say which parts differ between two lineages (:meth:`DataLineage.to_json`)."""
    before, here = json.loads(recorded), json.loads(present)
    was, now = before["manifests"], here["manifests"]
    parts = [
        f"the {split} manifest ({now.get(split, 'none')[:12]}, was {was.get(split, 'none')[:12]})"
        for split in _unequal(was, now)
    ]
    parts += [f"{path} of DVC" for path in _unequal(before["dvc"], here["dvc"])]
    return _listed(parts) or "the data differs in its vocabulary"


def environment_difference(recorded: Environment, present: Environment) -> str:
    """Say which distributions and settings differ."""
    pins, here = recorded.pins, present.pins
    names = [f"{name} {pins.get(name, 'none')} -> {here.get(name, 'none')}" for name in _unequal(pins, here)]
    names += [
        f"{name} {recorded.system.get(name)} -> {present.system.get(name)}"
        for name in present.decisive_system
        if recorded.system.get(name) != present.system.get(name)
    ]
    return _listed(names)


def numerics_difference(recorded: Environment, present: Environment) -> str:
    """Say what may have changed the results of the same operations."""
    was, now = recorded.system, present.system
    names = [name for name in ("processor", "capability", "threads") if was.get(name) != now.get(name)]
    reasons = [f"{name} was {was.get(name)}, is {now.get(name)}" for name in names]
    return "the same operations give other bits here; " + (_listed(reasons) or "the processor and threads are the same")


def _unequal(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
