"""Whether a run still is what it recorded: every byte of its artifacts, every digest in its tags, every metric row.

>>> found = verify_run(run_id)                                      # doctest: +SKIP
>>> found.findings[0]                                               # doctest: +SKIP
Finding(name='checkpoints/step-00000012/model.safetensors', what='altered: sha256 5f0c..., expected 8b0c...')
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlflow.entities import Run

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.checkpoint import CHECKPOINTS, MANIFEST, position_of
from sonosco_mlflow.settings import flatten, settings_digest
from sonosco_mlflow.tracking.code_snapshot import archive_digest
from sonosco_mlflow.tracking.comparison import AT_END
from sonosco_mlflow.tracking.journal import JOURNAL, Recorded, read_rows, storable
from sonosco_mlflow.tracking.lease import condition
from sonosco_mlflow.tracking.ledger import Entry, Ledger, stored_files
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.metric_rows import metric_rows
from sonosco_mlflow.tracking.mlflow_run import LONGEST_PARAMETER, PARAMETER_PREFIX
from sonosco_mlflow.tracking.segments import Segment, newest_segment, steps_of_ends
from sonosco_mlflow.tracking.store import artifact_bytes, download, find_run
from sonosco_mlflow.tracking.tags import (
    CANARY,
    CHECKPOINT,
    CODE_DIGEST,
    COMMIT,
    CONFIG_DIGEST,
    DATA_DIGEST,
    DIRTY,
    ENVIRONMENT_DIGEST,
    IMPORTED_DIGEST,
    KIND,
    LEDGER_DIGEST,
    STATE,
    WEIGHTS_DIGEST,
)


@dataclass(frozen=True)
class Finding:
    """Something that is not what was recorded: an artifact, a tag or a metric, and what is wrong with it."""

    name: str
    what: str


@dataclass(frozen=True)
class Verification:
    """What was read again, and what was found.

    Attributes:
        run_id: the run.
        files: how many artifacts and files of models were read.
        size: their bytes.
        checkpoints: how many were compared with their manifests.
        rows: how many metric values were compared with the journal.
        has_ledger: whether the run closed its ledger; else only what has another digest could be compared.
        findings: what is not as recorded.
    """

    run_id: str
    files: int
    size: int
    checkpoints: int
    rows: int
    has_ledger: bool
    findings: tuple[Finding, ...]


def verify_run(run_id: str) -> Verification:
    """Read everything that the tracking store keeps of a run, and compare it with what the run recorded.

    Raises:
        UserError: there is no such run, or it is being written to.
    """
    run = find_run(run_id)
    tags = run.data.tags
    if condition(run) == "running":
        raise UserError(f"run {run_id} is running: it can be verified when it has ended")
    findings: list[Finding] = []
    stored = {}
    for file in stored_files(run_id):
        try:
            stored[file.name] = file.entry()
        except Exception as error:
            findings.append(Finding(file.name, f"cannot be read ({error})"))
    # The record of a segment, which the launcher made, keeps nothing.
    is_finished = tags.get(STATE) == "finished" and tags.get(KIND) != "segment"
    findings += _against_ledger(run_id, tags.get(LEDGER_DIGEST), stored, is_finished=is_finished)
    checkpoints = _checkpoints(stored)
    for name in checkpoints:
        findings += _against_manifest(run_id, name, stored)
    rows = 0
    if tags.get(KIND) == "train":
        segment = newest_segment(run)
        findings += _against_tags(segment, tags, checkpoints, stored)
        findings += _against_parameters(segment, run.data.params)
        rows, differing = _against_journal(segment, run, complete=tags.get(STATE) == "finished")
        findings += differing
    unique = tuple(dict.fromkeys(findings))
    size = sum(entry.bytes for entry in stored.values())
    return Verification(run_id, len(stored), size, len(checkpoints), rows, LEDGER_DIGEST in tags, unique)


def _against_ledger(
    run_id: str, digest: str | None, stored: Mapping[str, Entry], *, is_finished: bool
) -> Iterator[Finding]:
    if digest is None:
        if is_finished:
            yield Finding(LEDGER_DIGEST, "missing, though the run is finished: what it keeps cannot all be verified")
        return
    try:
        ledger = Ledger.read(run_id, digest)
    except (UserError, ValueError, TypeError) as error:
        yield Finding("ledger.json", str(error))
        return
    for name in sorted({**ledger.entries, **stored}):
        expected, found = ledger.entries.get(name), stored.get(name)
        if found is None:
            yield Finding(name, "missing")
        elif expected is None:
            yield Finding(name, "not recorded: it was added after the run had ended")
        elif found != expected:
            yield Finding(name, _altered(found, expected))


def _altered(found: Entry, expected: Entry) -> str:
    return (
        f"altered: sha256 {found.sha256[:16]}... and {found.bytes} bytes, expected {expected.sha256[:16]}... and "
        f"{expected.bytes} bytes"
    )


def _checkpoints(stored: Mapping[str, Entry]) -> list[str]:
    """Return the names of the checkpoints that have a manifest, oldest first."""
    paths = [PurePosixPath(name) for name in stored if name.startswith(f"{CHECKPOINTS}/")]
    names = {path.parts[1] for path in paths if path.name == MANIFEST and position_of(path.parts[1]) is not None}
    return sorted(names, key=position_of)  # type: ignore[arg-type]


def _against_manifest(run_id: str, checkpoint: str, stored: Mapping[str, Entry]) -> Iterator[Finding]:
    folder = f"{CHECKPOINTS}/{checkpoint}"
    try:
        files = json.loads(artifact_bytes(run_id, f"{folder}/{MANIFEST}"))["files"]
        expected = {name: Entry(str(entry["sha256"]), int(entry["bytes"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding(f"{folder}/{MANIFEST}", f"unreadable ({error!r})")
        return
    for name, entry in expected.items():
        found = stored.get(f"{folder}/{name}")
        if found is None:
            yield Finding(f"{folder}/{name}", "missing")
        elif found != entry:
            yield Finding(f"{folder}/{name}", _altered(found, entry))


def _against_tags(
    segment: Segment, tags: Mapping[str, str], checkpoints: list[str], stored: Mapping[str, Entry]
) -> Iterator[Finding]:
    """Compare the digests that the run shows as tags with those of what it keeps."""
    named = tags.get(CHECKPOINT)
    if named is not None and PurePosixPath(named).name not in checkpoints:
        yield Finding(CHECKPOINT, f"names {named}, which is no checkpoint of the run")
    if WEIGHTS_DIGEST in tags and checkpoints:
        weights = stored.get(f"{CHECKPOINTS}/{checkpoints[-1]}/model.safetensors")
        if weights is not None and weights.sha256 != tags[WEIGHTS_DIGEST]:
            yield Finding(WEIGHTS_DIGEST, f"is not the sha256 of the model in {checkpoints[-1]}")
    for tag, digest in _origin(segment).items():
        try:
            if tag in tags and digest() != tags[tag]:
                yield Finding(tag, f"is not what the run keeps in {segment.folder or 'its folders'} gives")
        except Exception as error:
            yield Finding(tag, f"what gives it cannot be read ({error})")
    if CANARY in tags and checkpoints:
        yield from _against_canary(segment, tags[CANARY], checkpoints[-1])


def _origin(segment: Segment) -> dict[str, Callable[[], str]]:
    def code(*, imported: bool) -> str:
        return archive_digest(segment.archive(), json.loads(segment.git())["left_out"], imported=imported)

    return {
        CODE_DIGEST: lambda: code(imported=False),
        IMPORTED_DIGEST: lambda: code(imported=True),
        COMMIT: lambda: json.loads(segment.git())["commit"] or "none",
        DIRTY: lambda: str(json.loads(segment.git())["dirty"]).lower(),
        CONFIG_DIGEST: lambda: settings_digest(segment.settings()),
        DATA_DIGEST: lambda: DataLineage.read(segment.lineage()).digest,
        ENVIRONMENT_DIGEST: lambda: segment.environment().digest,
    }


def _against_canary(segment: Segment, canary: str, checkpoint: str) -> Iterator[Finding]:
    """Compare the canary with that of the newest checkpoint, which may be of before a change that was allowed."""
    name = f"{CHECKPOINTS}/{checkpoint}/{MANIFEST}"
    try:
        known = {json.loads(artifact_bytes(segment.run_id, name))["digests"].get("canary", canary)}
    except (ValueError, KeyError, TypeError, AttributeError):
        # It was read before, and stands among the findings.
        return
    known |= {branch.changes["canary"][1] for branch in segment.branches if "canary" in branch.changes}
    if canary not in known:
        yield Finding(CANARY, f"is not the one of {checkpoint}")


def _against_parameters(segment: Segment, parameters: Mapping[str, str]) -> Iterator[Finding]:
    """Compare the parameters, which were logged when the run began, with the settings that it has kept since."""
    try:
        if segment.number == 1:
            settings = dict(flatten(segment.settings()))
        elif any("config" in branch.changes for branch in segment.branches):
            # The recipe of then is not kept.
            return
        else:
            # The others may have been changed without a word.
            settings = segment.decisive()
    except UserError as error:
        yield Finding("config/params.yaml", str(error))
        return
    for key, value in settings.items():
        found, expected = parameters.get(PARAMETER_PREFIX + key), str(value)[:LONGEST_PARAMETER]
        if found != expected:
            what = "missing, though the recipe has it" if found is None else f"is {found!r}, was {expected!r}"
            yield Finding(f"parameter {PARAMETER_PREFIX}{key}", what)


def _against_journal(segment: Segment, run: Run, *, complete: bool) -> tuple[int, list[Finding]]:
    """Compare MLflow's metric rows with the journal's; where that is ``complete``, both must have all of them."""
    records = metric_rows(segment.run_id)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            rows = read_rows(download(segment.run_id, JOURNAL, Path(scratch)))
    except UserError as error:
        return 0, [Finding(JOURNAL, str(error))] if complete or records else []
    written = {(name, row.step): storable(value) for row in rows for name, value in row.metrics.items()}
    # Of steps that were made twice, the second time with a change that was allowed, MLflow keeps the first rows.
    left_way = segment.differs_until
    ends = steps_of_ends(run, max((step for _, step in written), default=0))
    names = {name for name, _ in written}
    # What a program logs past the trainer is nobody's but its own.
    records = {key: found for key, found in records.items() if key[0] in names}
    findings = []
    for name, step in sorted({**written, **records}, key=lambda key: (key[1], key[0])):
        expected, found = written.get((name, step)), records.get((name, step), [])
        if not found:
            findings.append(Finding(f"metric {name} at step {step}", "missing, though the journal has it"))
        elif expected is None and name.startswith(AT_END) and step in ends:
            # The run was at its end there, and was given more epochs.
            continue
        elif expected is None and complete and step > left_way:
            findings.append(Finding(f"metric {name} at step {step}", "not recorded: the journal lacks it"))
        elif expected is not None and step > left_way:
            # A row that is sent again is no other, nor is one of a process that was killed while it was sent.
            others = [row.value for row in found if row.value.hex() != expected.hex()]
            findings += [
                Finding(f"metric {name} at step {step}", f"is {other!r}, was {expected!r}") for other in others
            ]
    return len(written), [*findings, *_against_last(run, records)]


def _against_last(run: Run, records: Mapping[tuple[str, int], list[Recorded]]) -> Iterator[Finding]:
    """Compare what lists of runs show as each metric's value, which stores keep apart, with its last row."""
    last = {name: [row.value for row in records[name, step]] for name, step in sorted(records)}
    for name, values in last.items():
        shown = run.data.metrics[name]
        if shown.hex() not in {value.hex() for value in values}:
            yield Finding(f"metric {name}", f"is shown as {shown!r}, its last row is {values[-1]!r}")
