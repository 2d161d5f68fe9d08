"""Making a :class:`~sonosco_mlflow.data.features.FeatureStore`: the features of one manifest, computed side by side.

Which utterance lies in which shard follows from the durations in the manifest alone, so that the bytes do not depend on
who computed them. A shard that is finished stays finished: an extraction that was killed goes on with the next one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
import torchaudio

from sonosco_mlflow.data.corpora.base import some
from sonosco_mlflow.data.executors import Executor, Processes
from sonosco_mlflow.data.features import INDEX, FeatureStore, shard_name
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.data.processor import AudioDataProcessor
from sonosco_mlflow.digests import file_digest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.serializer import Serializer

SHARD_BYTES = 64 * 1024 * 1024
UTTERANCES_PER_TASK = 8
Progress = Callable[[int, int], None]


def extract_features(
    manifest: Manifest,
    processor: AudioDataProcessor,
    directory: Path,
    *,
    dtype: str = "float32",
    executor: Executor | None = None,
    unfinished: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> FeatureStore:
    """Extract the features of ``manifest`` into ``directory``, in place of what lies there, and return the store.

    One utterance at a time on one thread, which on a CPU is faster than a batch. The store appears under its name when
    it is whole. What is finished before that lies in ``unfinished``; called again, it is taken from there if its
    recordings, and all that its features depend on, are the same.

    Args:
        manifest: the utterances.
        processor: turns a recording into features.
        directory: where the store goes.
        dtype: "float32" or "float16".
        executor: does the work; one process by default.
        unfinished: a folder on the same file system, by default ``.<name>.unfinished`` beside ``directory``.
        progress: called with (done, all), in utterances.

    Raises:
        UserError: utterances are shorter than a window or cannot be read, and the message names them; or ``directory``
            holds what is no store's.
    """
    _require_no_others(directory)
    _require_windows(manifest, processor)
    executor = Processes() if executor is None else executor
    work = _Work(directory.with_name(f".{directory.name}.unfinished") if unfinished is None else unfinished)
    shards = assign_shards(manifest, processor, np.dtype(dtype).itemsize)
    settings = json.dumps(
        [Serializer().describe(processor), dtype, torch.__version__, torchaudio.__version__], sort_keys=True
    )
    finished = _finished(work, settings, manifest, shards, executor)
    tasks = [task for number, shard in enumerate(shards) if number not in finished for task in _tasks(manifest, shard)]
    computed = chain.from_iterable(executor.map(_Extraction(processor), tasks))
    rows: list[dict[str, object]] = []
    for number, utterances in enumerate(shards):
        lengths = finished.get(number, [])
        if not lengths:
            arrays, digests = [], []
            for features, digest in islice(computed, len(utterances)):
                arrays.append(features)
                digests.append(digest)
                progress(len(rows) + len(arrays), len(manifest))
            lengths = [len(array) for array in arrays]
            work.keep(number, np.concatenate(arrays).astype(dtype), _key(settings, utterances, digests), lengths)
        first = 0
        for utterance, frames in zip(utterances, lengths, strict=True):
            rows.append({"id": utterance.id, "shard": number, "first": first, "frames": frames})
            first += frames
        if number in finished:
            progress(len(rows), len(manifest))
    return work.become(directory, rows, len(shards))


def assign_shards(manifest: Manifest, processor: AudioDataProcessor, bytes_per_value: int) -> list[list[Utterance]]:
    """Cut ``manifest`` into shards of at most ``SHARD_BYTES`` each, by the durations it states."""
    shards: list[list[Utterance]] = []
    filled = 0
    for utterance in manifest:
        frames = processor.frames(round(utterance.duration * processor.sample_rate))
        size = frames * processor.size * bytes_per_value
        if not shards or filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(utterance)
        filled += size
    return shards


def _require_no_others(directory: Path) -> None:
    """Return if nothing in ``directory`` is anybody else's: it is about to be replaced."""
    others = sorted(
        path.name
        for path in (directory.iterdir() if directory.exists() else ())
        if path.name != INDEX and not path.match("shard-*.npy")
    )
    if others:
        raise UserError(
            f"{directory}: holds {some(others)}, which is no part of a feature store and would be lost; give a "
            "folder of its own"
        )


def _require_windows(manifest: Manifest, processor: AudioDataProcessor) -> None:
    """Return if every utterance is long enough for a frame: before hours of work, and of all at once."""
    short = [
        f"{manifest.audio_path(utterance)} ({utterance.duration:g} s)"
        for utterance in manifest
        if not processor.frames(round(utterance.duration * processor.sample_rate))
    ]
    if short:
        raise UserError(
            f"these recordings are shorter than one analysis window of {processor.window_length} samples: "
            f"{some(short)}. Take them out, or leave them out with data.skip: [short]"
        )


@dataclass(frozen=True)
class _Extraction:
    """What is done with the recordings of a task."""

    processor: AudioDataProcessor

    def __call__(self, paths: Sequence[Path]) -> list[tuple[npt.NDArray[np.float32], str]]:
        return [(self.processor(path).numpy(), file_digest(path)) for path in paths]


class _Work:
    """An extraction that is under way: the shards so far, and a note of each that is whole."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._store, self._notes = folder, folder / "store", folder / "notes"
        self._store.mkdir(parents=True, exist_ok=True)
        self._notes.mkdir(exist_ok=True)

    def notes(self) -> dict[int, dict[str, Any]]:
        """Return what is noted of each shard that is whole."""
        names = {int(path.stem): path for path in self._notes.glob("*.json")}
        return {
            number: json.loads(path.read_text(encoding="utf-8"))
            for number, path in sorted(names.items())
            if (self._store / shard_name(number)).exists()
        }

    def keep(self, number: int, features: npt.NDArray[np.floating], key: str, lengths: Sequence[int]) -> None:
        """Write a shard, and then the note that it is whole."""
        note = self._notes / f"{number}.json"
        note.unlink(missing_ok=True)
        _write(self._store / shard_name(number), lambda file: np.save(file, features))
        _write(note, lambda file: file.write(json.dumps({"key": key, "frames": list(lengths)}).encode()))

    def become(self, directory: Path, rows: Sequence[Mapping[str, object]], shards: int) -> FeatureStore:
        """Write the index and put the store, with so many shards, under its name."""
        wanted = {shard_name(number) for number in range(shards)}
        for path in self._store.iterdir():
            if path.name not in wanted:
                path.unlink()
        index = "".join(json.dumps(row) + "\n" for row in rows)
        _write(self._store / INDEX, lambda file: file.write(index.encode()))
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._store.rename(directory)
        shutil.rmtree(self._folder)
        return FeatureStore(directory)


def _finished(
    work: _Work, settings: str, manifest: Manifest, shards: Sequence[Sequence[Utterance]], executor: Executor
) -> dict[int, list[int]]:
    """Return the frames of each utterance in those of ``shards`` that an earlier extraction has finished."""
    notes = {number: note for number, note in work.notes().items() if number < len(shards)}
    tasks = [task for number in notes for task in _tasks(manifest, shards[number])]
    digests = chain.from_iterable(executor.map(_digests, tasks) if tasks else ())
    keys = {number: _key(settings, shards[number], list(islice(digests, len(shards[number])))) for number in notes}
    return {number: note["frames"] for number, note in notes.items() if note["key"] == keys[number]}


def _tasks(manifest: Manifest, utterances: Sequence[Utterance]) -> list[list[Path]]:
    paths = [manifest.audio_path(utterance) for utterance in utterances]
    return [paths[first : first + UTTERANCES_PER_TASK] for first in range(0, len(paths), UTTERANCES_PER_TASK)]


def _key(settings: str, utterances: Sequence[Utterance], digests: Sequence[str]) -> str:
    """Return the hexadecimal sha256 of all that a shard's bytes depend on."""
    contents = [[utterance.id, digest] for utterance, digest in zip(utterances, digests, strict=True)]
    return hashlib.sha256((settings + json.dumps(contents)).encode()).hexdigest()


def _digests(paths: Sequence[Path]) -> list[str]:
    return [file_digest(path) if path.exists() else "" for path in paths]


def _write(path: Path, content: Callable[[BinaryIO], object]) -> None:
    """Write a file, which has its name only when all of it is on the disk."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        content(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
