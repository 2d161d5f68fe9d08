"""The data of a run as DVC keeps it: listed and read from the cache or a remote, without being brought here.

>>> data = KeptData(segment.data_lock(), project, scratch)           # doctest: +SKIP
>>> data.digests["data/features/train/shard-00000.npy"]              # doctest: +SKIP
'4fa64530f383f16ed3446669f0449b59'
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath

from ruamel.yaml import YAML

from sonosco_mlflow.data.corpora.base import AUDIO_ELSEWHERE
from sonosco_mlflow.data.corpora.splits import SPLITS
from sonosco_mlflow.data.features import INDEX, FeatureStore, shard_name
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.settings import yaml_text
from sonosco_mlflow.tracking.data_lock import private_lock
from sonosco_mlflow.tracking.pipeline import share_settings

DATASET = "data/dataset"
VOCABULARY = f"{DATASET}/vocabulary.json"
# More of them are not read: they may be large, and who changed so many has changed how all are made.
_MOST_SHARDS = 4


class KeptData:
    """The data outputs of one run.

    Args:
        lock: text of the run's ``dvc.lock``.
        project: a project whose DVC cache or remotes have the data; nothing in it is changed.
        scratch: a folder for what is read.
    """

    def __init__(self, lock: str, project: Path, scratch: Path) -> None:
        self._scratch = scratch
        workspace = scratch / "workspace"
        (workspace / ".dvc").mkdir(parents=True)
        share_settings(workspace, project.resolve())
        lock = private_lock(lock)
        stages = YAML(typ="safe").load(lock)["stages"]
        self._outputs = [output["path"] for stage in stages.values() for output in stage["outs"]]
        for name, content in {"dvc.yaml": _without_inputs(stages), "dvc.lock": lock}.items():
            (workspace / name).write_text(content, encoding="utf-8")
        # It takes seconds to import.
        from dvc.api import DVCFileSystem

        self._files = DVCFileSystem(str(workspace))

    @cached_property
    def outputs(self) -> dict[str, dict[str, str]]:
        """The MD5 that DVC has of each file, by output and path; without outputs that are in no cache and no remote."""
        from dvc_data.index import DataIndexDirError

        found = {}
        for output in self._outputs:
            with suppress(FileNotFoundError, DataIndexDirError):
                listed = self._files.find(output, detail=True, dvc_only=True)
                found[output] = {path: str(facts["md5"]) for path, facts in listed.items() if facts.get("md5")}
        return {output: files for output, files in found.items() if files}

    @property
    def digests(self) -> dict[str, str]:
        """The MD5 of each file, by its path."""
        return {path: digest for files in self.outputs.values() for path, digest in files.items()}

    def read(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            UserError: it is in no cache and no remote.
        """
        from dvc_data.index import DataIndexDirError

        try:
            content: bytes = self._files.read_bytes(path)
        except (OSError, DataIndexDirError) as error:
            raise UserError(f"{path} is neither in DVC's cache nor in a remote: {error}") from error
        return content

    def manifest(self, split: str) -> Manifest:
        """Return the manifest of a split."""
        path = self._scratch / f"{split}.jsonl"
        path.write_bytes(self.read(f"{DATASET}/{split}.jsonl"))
        return Manifest.read(path)

    def features(self, place: str, shards: list[str]) -> FeatureStore:
        """Return the features in the folder ``place``, of which only those in ``shards`` can be read."""
        folder = self._scratch / place
        folder.mkdir(parents=True, exist_ok=True)
        for name in (INDEX, *shards):
            (folder / name).write_bytes(self.read(f"{place}/{name}"))
        return FeatureStore(folder)


def _without_inputs(stages: Mapping[str, dict[str, object]]) -> str:
    outputs = {
        name: {"cmd": stage["cmd"], "outs": [output["path"] for output in stage["outs"]]}  # type: ignore[attr-defined]
        for name, stage in stages.items()
    }
    return yaml_text({"stages": outputs})


def kept_data_changes(one: KeptData, other: KeptData) -> list[str]:
    """Say which utterances, features and other files differ, of the outputs that DVC has of both runs."""
    both = one.outputs.keys() & other.outputs.keys()
    changed = {
        path
        for output in both
        for path in {**one.outputs[output], **other.outputs[output]}
        if one.digests.get(path) != other.digests.get(path) and PurePosixPath(path).name != INDEX
    }
    lines: list[str] = []
    for path in sorted(path for path in changed if PurePosixPath(path).name == AUDIO_ELSEWHERE):
        if path in one.digests and path in other.digests:
            lines += _recording_changes(os.fsdecode(one.read(path)), os.fsdecode(other.read(path)))
            changed.discard(path)
    for split in SPLITS:
        path = f"{DATASET}/{split}.jsonl"
        if path in changed and path in one.digests and path in other.digests:
            lines += _manifest_changes(split, one.manifest(split), other.manifest(split))
            # It is made of these.
            changed = {name for name in changed if PurePosixPath(name).name != f"{split}.jsonl"}
    shards: dict[str, list[str]] = {}
    for path in sorted(path for path in changed if PurePosixPath(path).match("data/features/*/*/shard-*")):
        shards.setdefault(str(PurePosixPath(path).parent), []).append(PurePosixPath(path).name)
    for place, names in shards.items():
        lines += _feature_changes(place, names, one, other)
        changed -= {f"{place}/{name}" for name in names}
    return lines + [f"{path}: {_kind(path, one, other)}" for path in sorted(changed)]


def _recording_changes(one: str, other: str) -> list[str]:
    was, now = (
        {path: digest for digest, path in (line.split("  ", 1) for line in text.splitlines())} for text in (one, other)
    )
    # One that came or went, the manifests tell.
    return [f"recording {path}: other bytes" for path in sorted(was.keys() & now.keys()) if was[path] != now[path]]


def _manifest_changes(split: str, one: Manifest, other: Manifest) -> list[str]:
    was = {utterance.id: utterance for utterance in one}
    now = {utterance.id: utterance for utterance in other}
    lines = [f"{split}: utterance {name} was added" for name in sorted(now.keys() - was.keys())]
    lines += [f"{split}: utterance {name} was removed" for name in sorted(was.keys() - now.keys())]
    for name in sorted(was.keys() & now.keys()):
        # Where it lies on a disk is no part of what is learnt from.
        keys = [key for key in ("duration", "text", "speaker") if getattr(was[name], key) != getattr(now[name], key)]
        lines += [
            f"{split}: utterance {name}: {key} was {getattr(was[name], key)!r}, is {getattr(now[name], key)!r}"
            for key in keys
        ]
    return lines


def _feature_changes(place: str, shards: list[str], one: KeptData, other: KeptData) -> list[str]:
    common = [name for name in shards if f"{place}/{name}" in one.digests and f"{place}/{name}" in other.digests]
    lines = [f"{place}/{name}: only one has it" for name in shards if name not in common]
    if len(common) > _MOST_SHARDS:
        return [*lines, f"{place}: {len(common)} shards have other bytes"]
    try:
        was, now = one.features(place, common), other.features(place, common)
        for name in common:
            here = [item for item in was.ids if shard_name(was.shard_of(item)) == name]
            shared = [item for item in here if item in now and shard_name(now.shard_of(item)) in common]
            # Compared as bytes: what is no number differs from itself.
            changed = [item for item in shared if was.read(item).tobytes() != now.read(item).tobytes()]
            if changed and len(changed) == len(here):
                lines.append(f"{place}/{name}: the features of all {len(here)} utterances differ")
            elif changed:
                lines += [f"{place}/{name}: the features of utterance {item} differ" for item in changed]
            elif was.ids == now.ids:
                lines.append(f"{place}/{name}: other bytes, the same features")
    except (UserError, ValueError, OSError, IndexError, KeyError) as error:
        lines += [f"{place}/{name}: other bytes; whose they are cannot be read ({error})" for name in common]
    return lines


def _kind(path: str, one: KeptData, other: KeptData) -> str:
    if path not in one.digests:
        return "was added"
    return "was removed" if path not in other.digests else "other bytes"
