"""FeatureStore: the features of one manifest in a few big memory-mapped files.

::

    features/train/shard-00000.npy   [frames, mel] of many utterances, one after the other
    features/train/index.jsonl       id, shard, first frame, frames; written last

DVC handles a few big files far better than one file an utterance, and so does the page cache.
:mod:`sonosco_mlflow.data.extraction` makes them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import serializable

INDEX = "index.jsonl"


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
    def of(cls, store: "StoredFeatures") -> Self:
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
            raise UserError(f"{path}: no feature statistics; `dvc repro dataset` makes them") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not feature statistics ({error}); `dvc repro dataset` makes them") from error

    def write(self, path: Path) -> None:
        """Write ``statistics.json``."""
        content = {"mean": self.mean, "standard_deviation": self.standard_deviation}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def normalise(self, features: Tensor) -> Tensor:
        """Return ``features`` ``[frames, n_mels]`` with each band centred and scaled."""
        return (features - self._mean) / self._deviation


@serializable
class UtteranceStatistics(FeatureStatistics):
    """As :class:`FeatureStatistics`, and then each utterance's bands are centred and scaled by its own frames.

    What a speaker's voice, a room and a microphone add to every frame goes with the mean. A band that hardly varies in
    an utterance is scaled by less than 10.
    """

    def normalise(self, features: Tensor) -> Tensor:
        """Return ``features`` ``[frames, n_mels]`` with each band centred and scaled."""
        # In NumPy: torch splits sums by its number of threads.
        values = super().normalise(features).numpy().astype(np.float64)
        values = (values - values.mean(axis=0)) / (values.std(axis=0) + 0.1)
        return torch.from_numpy(values.astype(np.float32))


class StoredFeatures(Protocol):
    """Features on disk, by utterance."""

    @property
    def n_mels(self) -> int:
        """Number of mel bands."""

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 over all files."""

    @property
    def place(self) -> str:
        """Where they lie, for messages."""

    def __contains__(self, utterance_id: str) -> bool: ...

    def frames(self, utterance_id: str) -> int:
        """Return the number of frames of an utterance."""

    def read(self, utterance_id: str) -> npt.NDArray[np.floating[Any]]:
        """Return the features ``[frames, n_mels]`` of an utterance as a view of the mapped file."""

    def shards(self) -> Iterator[npt.NDArray[np.floating[Any]]]:
        """Yield all features, many utterances at a time, ``[frames, n_mels]``."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where an utterance's features lie: shard number, first frame, number of frames."""

    shard: int
    first: int
    frames: int


class FeatureStore:
    """Read access to features on disk.

    Args:
        directory: what :func:`~sonosco_mlflow.data.extraction.extract_features` wrote.

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
    def place(self) -> str:
        """Where it lies."""
        return str(self.directory)

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
        for shard in range(self._shards):
            yield self._open(shard)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 over all its files."""
        return files_digest(self.directory / name for name in (INDEX, *map(shard_name, range(self._shards))))

    @property
    def _shards(self) -> int:
        return 1 + max((location.shard for location in self._locations.values()), default=-1)

    def _open_shard(self, shard: int) -> npt.NDArray[np.floating[Any]]:
        path = self.directory / shard_name(shard)
        try:
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                first = file.tell()
            # NumPy's own map keeps the file open, and a thousand hours are more shards than may be open at once.
            mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            return mapped.numpy()[first:].view(dtype).reshape(shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no shard of features ({error}); `dvc repro features` makes it") from error

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
            raise UserError(f"{path}: no features here; `dvc repro dataset` makes them") from error
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
