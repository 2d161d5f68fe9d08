"""In what the recorded inputs of two runs differ: recipe, code, data, environment, arithmetic."""

import difflib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.settings import flatten
from sonosco_mlflow.tracking.code_archive import archived_contents, archived_files
from sonosco_mlflow.tracking.code_snapshot import is_code
from sonosco_mlflow.tracking.environment import Environment
from sonosco_mlflow.tracking.kept_data import KeptData, kept_data_changes
from sonosco_mlflow.tracking.segments import Segment
from sonosco_mlflow.tracking.tags import (
    CANARY,
    CODE_DIGEST,
    CONFIG_DIGEST,
    DATA_DIGEST,
    ENVIRONMENT_DIGEST,
    IMPORTED_DIGEST,
    LANGUAGE_MODEL_DIGEST,
)

# A longer list hides what it should show.
MOST_NAMES = 6
# What no training reads: tests, documents, and what says how they are made. All else a program may import or open.
_BESIDE = ("tests", "docs", ".github", ".ci")
_DOCUMENTS = (".md", ".rst", ".ipynb", ".gitignore", ".gitattributes")
_DECODING = "decoding."


@dataclass(frozen=True)
class Change:
    """An input in which two runs differ.

    Attributes:
        name: ``config``, ``decoding`` (of the test set), ``code``, ``data``, ``environment`` or ``numerics``.
        what: a line for each thing that differs.
        matters: whether it can have changed what came out; of ``decoding``, what came out of the training.
    """

    name: str
    what: tuple[str, ...]
    matters: bool = True

    @property
    def summary(self) -> str:
        """What differs, in one line."""
        return listed(self.what)


def input_changes(
    one: Segment, its_tags: Mapping[str, str], other: Segment, others_tags: Mapping[str, str], project: Path
) -> list[Change]:
    """Return in which recorded inputs two runs differ.

    Args:
        one: a segment of a run.
        its_tags: the tags of that run, which have the digests.
        other: a segment of another.
        others_tags: the tags of that one.
        project: a project whose DVC cache or remotes may have the data of both.
    """
    find: dict[tuple[str, ...], tuple[str, Callable[[], Change]]] = {
        (CONFIG_DIGEST,): ("config", lambda: _config(one, other)),
        (CONFIG_DIGEST, LANGUAGE_MODEL_DIGEST): (
            "decoding",
            lambda: Change("decoding", tuple(_decoding(one, its_tags, other, others_tags)), matters=False),
        ),
        (DATA_DIGEST,): ("data", lambda: Change("data", tuple(_data(one, other, project)))),
        (CODE_DIGEST, IMPORTED_DIGEST): ("code", lambda: _code(one, other)),
        (ENVIRONMENT_DIGEST,): (
            "environment",
            lambda: Change("environment", tuple(environment_changes(one.environment(), other.environment()))),
        ),
        (CANARY,): ("numerics", lambda: Change("numerics", tuple(_numerics(one.environment(), other.environment())))),
    }
    changes = []
    for tags, (name, make) in find.items():
        if all(its_tags.get(tag) == others_tags.get(tag) for tag in tags):
            continue
        try:
            found = make()
            # Two digests also differ by a distribution that stands beside in one of the two only: that is no change.
            changes += [found] if found.what else []
        except UserError as error:
            # A run that was killed as it began has not kept what it would be compared with.
            changes.append(Change(name, (f"it is another one; how it differs is not known ({error})",)))
    return changes


def listed(names: tuple[str, ...] | list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def config_changes(recorded: Mapping[str, object], present: Mapping[str, object]) -> list[str]:
    """Say which keys of two flat recipes differ."""
    keys = [key for key in {**recorded, **present} if recorded.get(key) != present.get(key)]
    return [f"{key} was {recorded.get(key)!r}, is {present.get(key)!r}" for key in keys]


def code_changes(recorded: bytes, present: bytes) -> list[str]:
    """Return the names of the files of code that differ between two snapshots."""
    was, now = archived_files(recorded), archived_files(present)
    return [name for name in _unequal(was, now) if is_code(name, {**was, **now})]


def unified_code_diff(recorded: bytes, present: bytes) -> str:
    """Return how the code of two snapshots differs, as a unified diff."""
    was, now = archived_contents(recorded), archived_contents(present)
    return "".join(_file_difference(name, was.get(name), now.get(name)) for name in code_changes(recorded, present))


def data_changes(recorded: str, present: str) -> list[str]:
    """Say which parts differ between two lineages (:meth:`DataLineage.to_json`)."""
    before, here = json.loads(recorded), json.loads(present)
    was, now = before["manifests"], here["manifests"]
    parts = [
        f"the {split} manifest ({now.get(split, 'none')[:12]}, was {was.get(split, 'none')[:12]})"
        for split in _unequal(was, now)
    ]
    parts += [f"{path} of DVC" for path in _unequal(before["dvc"], here["dvc"])]
    own, others = before.get("contents", {}), here.get("contents", {})
    # Where DVC versions one of the two, there is nothing to compare.
    return parts + [f"the {split} recordings" for split in _unequal(own, others) if split in own and split in others]


def lineage_changes(recorded: tuple[str, str | None], present: tuple[str, str | None], project: Path) -> list[str]:
    """Say what differs between the data of two lineages, down to utterances where DVC has both.

    Args:
        recorded: JSON of a lineage, and its ``dvc.lock`` or None.
        present: the same of another.
        project: a project whose DVC cache or remotes may have the data of both.
    """
    parts = data_changes(recorded[0], present[0]) or ["the data differs in its vocabulary"]
    if recorded[1] is None or present[1] is None:
        return parts
    with tempfile.TemporaryDirectory() as scratch:
        was = KeptData(recorded[1], project, Path(scratch) / "was")
        now = KeptData(present[1], project, Path(scratch) / "now")
        return kept_data_changes(was, now) or parts


def environment_changes(recorded: Environment, present: Environment) -> list[str]:
    """Say which distributions and settings differ."""
    pins, here = recorded.pins, present.pins
    # What no requirements name is known where it was imported; a program that did not, may have it all the same.
    beside = {*recorded.beside, *present.beside}
    names = [
        f"{name} {pins.get(name, 'none')} -> {here.get(name, 'none')}"
        for name in _unequal(pins, here)
        if name not in beside or (name in pins and name in here)
    ]
    was, now = ({**system, **_variables(system)} for system in (recorded.system, present.system))
    decisive_names = [name for name in present.decisive_system if name != "variables"]
    variables = sorted({**_variables(was), **_variables(now)})
    return names + [
        f"{name} {was.get(name)} -> {now.get(name)}"
        for name in (*decisive_names, *variables)
        if was.get(name) != now.get(name)
    ]


def _variables(system: Mapping[str, object]) -> dict[str, object]:
    variables = system.get("variables", {})
    return dict(variables) if isinstance(variables, dict) else {}


def machine_changes(recorded: Environment, present: Environment) -> list[str]:
    """Say what differs between two machines, or in their use, that makes other bits of the same operations."""
    was, now = recorded.system, present.system
    decisive_names = ("processor", "capability", "threads", "devices", "driver", "cuda")
    names = [name for name in decisive_names if was.get(name) != now.get(name)]
    return [f"{name} was {was.get(name)}, is {now.get(name)}" for name in names]


def _config(one: Segment, other: Segment) -> Change:
    changed = config_changes(one.decisive(), other.decisive())
    if changed:
        return Change("config", tuple(changed))
    idle = config_changes(dict(flatten(one.settings())), dict(flatten(other.settings())))
    if idle:
        return Change("config", tuple(line for line in idle if not line.startswith(_DECODING)), matters=False)
    return Change("config", ("the recipe that the run kept is not the one whose digest it recorded",))


def _decoding(
    one: Segment, its_tags: Mapping[str, str], other: Segment, others_tags: Mapping[str, str]
) -> Iterator[str]:
    """Yield what differs in how the test set is decoded; of settings that are no recipe, all are the config's."""
    was, now = (tags.get(LANGUAGE_MODEL_DIGEST, "none") for tags in (its_tags, others_tags))
    if one.trains_recipe() and other.trains_recipe():
        flat = (dict(flatten(segment.settings())) for segment in (one, other))
        recorded, present = ({key: side[key] for key in side if key.startswith(_DECODING)} for side in flat)
        yield from config_changes(recorded, present)
    if was != now:
        yield f"the language model ({now[:12]}, was {was[:12]})"


def _code(one: Segment, other: Segment) -> Change:
    too_large = [json.loads(segment.git())["left_out"] for segment in (one, other)]
    names = sorted({*code_changes(one.archive(), other.archive()), *_unequal(*too_large)})
    return Change("code", tuple(names), any(map(_may_run, names)))


def _may_run(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parts[0] not in _BESIDE and (path.suffix or path.name) not in _DOCUMENTS


def _data(one: Segment, other: Segment, project: Path) -> list[str]:
    recorded, present = ((segment.lineage(), segment.data_lock()) for segment in (one, other))
    return lineage_changes(recorded, present, project)


def _numerics(recorded: Environment, present: Environment) -> list[str]:
    reasons = machine_changes(recorded, present)
    return reasons or ["the same operations give other bits, on the same processor and with as many threads"]


def _file_difference(name: str, was: tuple[int, bytes] | None, now: tuple[int, bytes] | None) -> str:
    before, after = (b"" if side is None else side[1] for side in (was, now))
    labels = [f"a/{name}" if was else "/dev/null", f"b/{name}" if now else "/dev/null"]
    head = "" if was is None or now is None or was[0] == now[0] else f"mode of {name}: {was[0]:o} -> {now[0]:o}\n"
    try:
        sides = [content.decode().splitlines(keepends=True) for content in (before, after)]
    except UnicodeDecodeError:
        return f"{head}{name}: no text; {len(before)} bytes before, {len(after)} now\n"
    lines = difflib.unified_diff(sides[0], sides[1], labels[0], labels[1])
    return head + "".join(line if line.endswith("\n") else f"{line}\n\\ no newline at its end\n" for line in lines)


def _unequal(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))
