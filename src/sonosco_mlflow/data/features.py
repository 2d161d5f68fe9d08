"""FeatureStore: the features of one manifest in a few big memory-mapped files.

::

    features/train/shard-00000.npy   [frames, mel] of many utterances, one after the other
    features/train/index.jsonl       id, shard, first frame, frames; written last

DVC handles a few big files far better than one file an utterance, and so does the page cache. Which utterance lies
in which shard follows from the durations in the manifest alone, so that the bytes do not depend on the number of
processes that made them.
"""

import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.data.processor import AudioDataProcessor
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable

INDEX = "index.jsonl"
SHARD_BYTES = 64 * 1024 * 1024
Progress = Callable[[int, int], None]


@serializable
class FeatureStatistics:
    """Mean and standard deviation of each mel band over all frames of the training split.

    Args:
        mean: one number a band.
        standard_deviation: one number a band, above 0.
    """

    def __init__(self, mean: list[float], standard_deviation: list[float]) -> None:
        self.mean = mean
        self.standard_deviation = standard_deviation
        self._mean = torch.tensor(mean, dtype=torch.float32)
        self._deviation = torch.tensor(standard_deviation, dtype=torch.float32)

    @classmethod
    def of(cls, store: "FeatureStore") -> Self:
        """Compute the statistics of every frame in ``store``, in float64 and in the store's order."""
        total = np.zeros(store.n_mels)
        squares = np.zeros(store.n_mels)
        count = 0
        for shard in store.shards():
            values = shard.astype(np.float64)
            total += values.sum(axis=0)
            squares += (values**2).sum(axis=0)
            count += len(values)
        mean = total / count
        # A band that never varies (silence, a filter above the audio's bandwidth) is centred and left unscaled.
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
        deviation[deviation < 1e-5] = 1.0
        return cls(mean.tolist(), deviation.tolist())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``statistics.json``.

        Raises:
            UserError: the file is missing or is something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["mean"], content["standard_deviation"])
        except FileNotFoundError as error:
            raise UserError(f"{path}: no feature statistics; `dvc repro features` makes them") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not feature statistics ({error}); `dvc repro features` makes them") from error

    def write(self, path: Path) -> None:
        """Write ``statistics.json``."""
        content = {"mean": self.mean, "standard_deviation": self.standard_deviation}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def normalise(self, features: Tensor) -> Tensor:
        """Return ``features`` ``[frames, n_mels]`` with each band centred and scaled."""
        return (features - self._mean) / self._deviation


@dataclass(frozen=True, slots=True)
class Location:
    """Where an utterance's features lie: shard number, first frame, number of frames."""

    shard: int
    first: int
    frames: int


class FeatureStore:
    """Read access to features on disk.

    Args:
        directory: what :func:`extract_features` wrote.

    Raises:
        UserError: the directory holds no complete store.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._locations = self._read_index()
        self._open = lru_cache(maxsize=None)(self._open_shard)

    def __contains__(self, utterance_id: str) -> bool:
        return utterance_id in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are spawned map the shards anew.
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])  # type: ignore[misc]

    @property
    def ids(self) -> list[str]:
        """The utterances, in the order in which they were stored."""
        return list(self._locations)

    def shard_of(self, utterance_id: str) -> int:
        """Return the number of the shard that has an utterance."""
        return self._locations[utterance_id].shard

    @property
    def n_mels(self) -> int:
        """Number of mel bands."""
        return int(self._open(0).shape[1])

    def frames(self, utterance_id: str) -> int:
        """Return the number of frames of an utterance."""
        return self._locations[utterance_id].frames

    def read(self, utterance_id: str) -> npt.NDArray[np.floating[Any]]:
        """Return the features ``[frames, n_mels]`` of an utterance as a view of the mapped file."""
        location = self._locations[utterance_id]
        return self._open(location.shard)[location.first : location.first + location.frames]

    def shards(self) -> Iterator[npt.NDArray[np.floating[Any]]]:
        """Yield each shard ``[frames, n_mels]``."""
        for shard in range(1 + max(location.shard for location in self._locations.values())):
            yield self._open(shard)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 over all its files."""
        shards = range(1 + max((location.shard for location in self._locations.values()), default=-1))
        return files_digest(self.directory / name for name in (INDEX, *map(shard_name, shards)))

    def _open_shard(self, shard: int) -> npt.NDArray[np.floating[Any]]:
        mapped: npt.NDArray[np.floating[Any]] = np.load(self.directory / shard_name(shard), mmap_mode="c")
        return mapped

    def _read_index(self) -> dict[str, Location]:
        path = self.directory / INDEX
        locations = {}
        try:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    row = json.loads(line)
                    locations[row["id"]] = Location(row["shard"], row["first"], row["frames"])
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path}:{number}: not a row of a feature index ({error})") from error
        except FileNotFoundError as error:
            raise UserError(f"{path}: no features here; `dvc repro features` makes them") from error
        return locations


def files_digest(paths: Iterable[Path]) -> str:
    """Return the hexadecimal sha256 over the contents of files, in their order; where they lie does not count."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def shard_name(shard: int) -> str:
    """Return the file name of a shard.

    >>> shard_name(7)
    'shard-00007.npy'
    """
    return f"shard-{shard:05d}.npy"


def assign_shards(manifest: Manifest, processor: AudioDataProcessor, bytes_per_value: int) -> list[list[Utterance]]:
    """Cut ``manifest`` into shards of at most ``SHARD_BYTES`` each, by the durations it states."""
    shards: list[list[Utterance]] = [[]]
    filled = 0
    for utterance in manifest:
        frames = processor.frames(round(utterance.duration * processor.sample_rate))
        size = frames * processor.n_mels * bytes_per_value
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(utterance)
        filled += size
    return shards


def extract_features(
    manifest: Manifest,
    processor: AudioDataProcessor,
    directory: Path,
    *,
    dtype: str = "float32",
    processes: int = 1,
    progress: Progress = lambda done, total: None,
) -> FeatureStore:
    """Extract the features of ``manifest`` into ``directory`` and return the store.

    Each process computes one utterance at a time on one thread (batching loses on a CPU). A file appears under its
    name only when it is whole, and the index last, so that an interrupted extraction is never taken for a store.

    Raises:
        UserError: an utterance cannot be read; the message names it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = assign_shards(manifest, processor, np.dtype(dtype).itemsize)
    index = []
    done = 0
    with multiprocessing.get_context("fork").Pool(processes, _start_worker, (manifest, processor)) as pool:
        for number, utterances in enumerate(shards):
            arrays = []
            first = 0
            for utterance, array in zip(utterances, pool.imap(_features, utterances, chunksize=8), strict=True):
                arrays.append(array)
                index.append({"id": utterance.id, "shard": number, "first": first, "frames": len(array)})
                first += len(array)
                done += 1
                progress(done, len(manifest))
            _write_array(directory / shard_name(number), np.concatenate(arrays).astype(dtype))
    _write_text(directory / INDEX, "".join(json.dumps(row) + "\n" for row in index))
    return FeatureStore(directory)


# What every task of a worker needs: handed over once, when the worker is forked, instead of with each task.
_worker: tuple[Manifest, AudioDataProcessor]


def _start_worker(manifest: Manifest, processor: AudioDataProcessor) -> None:
    global _worker
    # The pool ends its workers by it: one that does something else with it may be waited for without end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _worker = (manifest, processor)
    torch.set_num_threads(1)


def _features(utterance: Utterance) -> npt.NDArray[np.float32]:
    manifest, processor = _worker
    array: npt.NDArray[np.float32] = processor(manifest.audio_path(utterance)).numpy()
    return array


def _write_array(path: Path, array: npt.NDArray[np.floating[Any]]) -> None:
    partial_path = path.with_suffix(".partial")
    with partial_path.open("wb") as file:
        np.save(file, array)
    partial_path.replace(path)


def _write_text(path: Path, text: str) -> None:
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(text, encoding="utf-8")
    partial_path.replace(path)
