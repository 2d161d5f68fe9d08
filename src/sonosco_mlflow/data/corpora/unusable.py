"""Utterances of no use, since their recording cannot be read or their text is empty: told, or set aside in a list.

Nobody knows how long a recording is that cannot be read: it is of ``UNREADABLE`` seconds.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sonosco_mlflow.data.corpora.splits import SPLITS
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.data.manifest_tools.findings import Finding

UNREADABLE = 0.0
"""Seconds of a recording that is not there, is empty or no audio."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """An utterance of no use: its id, which check of manifests would find it, and what is wrong."""

    id: str
    check: str
    found: str


def without_unusable(
    utterances: Iterable[Utterance], why: Mapping[str, str], directory: Path
) -> tuple[list[Utterance], list[Unusable]]:
    """Return those of the ``utterances`` of the corpus in ``directory`` that are of use, and what the others lack.

    ``why`` has more to say of some of them, by id.
    """
    usable, unusable = [], []
    for utterance in utterances:
        path = directory / utterance.audio_filepath
        if not utterance.text.strip():
            check, found = "text", f"{path} has an empty text"
        elif utterance.duration != UNREADABLE:
            usable.append(utterance)
            continue
        elif path.is_file():
            check, found = "audio", f"{path} is empty or cannot be read as audio"
        else:
            check, found = "file", f"{path} is not there"
        unusable.append(Unusable(utterance.id, check, why.get(utterance.id, found)))
    return usable, unusable


def set_aside(rows: Iterable[Unusable], directory: Path, split: str) -> None:
    """Write what is of no use in a split beside its manifest, if there is any."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in sorted(rows, key=lambda row: row.id)]
    if lines:
        text = "".join(f"{line}\n" for line in lines)
        list_of(directory, split).write_text(text, encoding="utf-8", errors="surrogateescape")


def list_of(directory: Path, split: str) -> Path:
    """Return where the utterances of a split stand that were set aside."""
    return directory / f"{split}.unusable.jsonl"


def were_set_aside(directory: Path) -> list[Finding]:
    """Return what was set aside of the corpus in ``directory``."""
    findings = []
    for path in (list_of(directory, split) for split in SPLITS):
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n") if path.exists() else []
        rows = [Unusable(**json.loads(line)) for line in lines if line]
        findings += [Finding(str(path), line, row.id, row.check, row.found) for line, row in enumerate(rows, start=1)]
    return findings
