"""What a run's state belongs to, as digests; and whether what is here is still that.

A state continued with other code, other data or on another kind of processor would end in other bits, and nothing
would show it. So each checkpoint names what it belongs to, and a difference is refused with a message that says what
differs, unless it was allowed by name; then the run records it.
"""

from collections.abc import Callable, Mapping
from functools import partial

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.changes import (
    code_changes,
    config_changes,
    data_changes,
    environment_changes,
    listed,
    machine_changes,
)
from sonosco_mlflow.tracking.environment import BESIDE, Environment

# The digests in a checkpoint, each with the change that allows another.
CHANGE_OF = {
    "config": "config",
    "trainer": "config",
    "code": "code",
    "imported": "code",
    "data": "data",
    "vocabulary": "vocabulary",
    "batches": "data",
    "environment": "environment",
    "threads": "numerics",
    "canary": "numerics",
    "precision": "numerics",
}
CHANGES = tuple(dict.fromkeys(CHANGE_OF.values()))


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
        explain: by name, what says how the two differ; without it they are shown as they are.

    Raises:
        UserError: something differs and is not allowed; the message says how, and what allows it.
    """
    others = differing(recorded, present)
    differ = {name: (recorded[name], present[name]) for name in recorded if name in others}
    refused = [name for name in differ if _change_of(name) not in allowed]
    if refused:
        plain = {name: partial("was {}, is {}".format, *values) for name, values in differ.items()}
        lines = [f"  {name}: {_explained(explain.get(name, plain[name]))}" for name in refused]
        flags = dict.fromkeys(f"--allow-{_change_of(name)}-change" for name in refused)
        raise UserError(
            f"run {run_id} would not continue as it began:\n"
            + "\n".join(lines)
            + f"\nPut it back as it was, or pass {' '.join(flags)}: then the run goes on otherwise and records that"
        )
    return differ


def differing(recorded: Mapping[str, str], present: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the digests that differ; one that is missing on either side is not compared."""
    return frozenset(name for name in recorded.keys() & present.keys() if recorded[name] != present[name])


def _change_of(name: str) -> str:
    return "environment" if name.startswith(BESIDE) else CHANGE_OF.get(name, name)


def _explained(explain: Callable[[], str]) -> str:
    try:
        return explain()
    except UserError as error:
        # A segment that was killed as it began has not kept what it would be compared with.
        return f"it is another one; how it differs is not known ({error})"


def config_difference(recorded: Mapping[str, object], present: Mapping[str, object]) -> str:
    """Say which keys of two flat recipes differ."""
    return listed(config_changes(recorded, present)) or (
        "the recipe that the run kept is not the one whose digest it recorded"
    )


def code_difference(recorded: bytes, present: bytes) -> str:
    """Say which files differ between two snapshots."""
    names = code_changes(recorded, present)
    return f"{len(names)} files differ: {listed(names)}"


def data_difference(recorded: str, present: str) -> str:
    """Say which parts differ between two lineages (:meth:`DataLineage.to_json`)."""
    return listed(data_changes(recorded, present)) or "the data differs in its vocabulary"


def environment_difference(recorded: Environment, present: Environment) -> str:
    """Say which distributions and settings differ."""
    return listed(environment_changes(recorded, present))


def numerics_difference(recorded: Environment, present: Environment) -> str:
    """Say what may have changed the results of the same operations."""
    reasons = listed(machine_changes(recorded, present)) or "the processor and threads are the same"
    return f"the same operations give other bits here; {reasons}"
