"""Several corpora as one: their utterances in one manifest, their features read as from one store.

Where there are several, the ids of each corpus, and the names of its speakers, begin with the corpus's name and a
hyphen, so that what is named alike in two of them stays apart.

>>> prefixes(["an4"]), prefixes(["an4", "tedlium"])
({'an4': ''}, {'an4': 'an4-', 'tedlium': 'tedlium-'})
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sonosco_mlflow.data.features import FeatureStore
from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER, Manifest


def prefixes(names: Sequence[str]) -> dict[str, str]:
    """Return what the ids of each corpus begin with, by its name."""
    return {name: f"{name}-" if len(names) > 1 else "" for name in names}


def joined_manifest(manifests: Mapping[str, Manifest], folder: Path) -> Manifest:
    """Return the utterances of all ``manifests``, which are given by prefix, with audio paths from ``folder``.

    Raises:
        UserError: an id stands twice all the same: one corpus's name begins with another's.
    """
    return Manifest(
        (
            replace(
                utterance,
                id=prefix + utterance.id,
                speaker=utterance.speaker if utterance.speaker == UNKNOWN_SPEAKER else prefix + utterance.speaker,
            )
            for prefix, manifest in manifests.items()
            for utterance in manifest.seen_from(folder)
        ),
        folder,
    )


class JoinedFeatures:
    """Read access to the features of several corpora by the ids of their :func:`joined_manifest`.

    Args:
        stores: by the prefix of their ids.
    """

    def __init__(self, stores: Mapping[str, FeatureStore]) -> None:
        self._stores = dict(stores)

    def __contains__(self, utterance_id: str) -> bool:
        return any(True for _ in self._found(utterance_id))

    def __len__(self) -> int:
        return sum(map(len, self._stores.values()))

    @property
    def n_mels(self) -> int:
        """Number of mel bands."""
        return next(store.n_mels for store in self._stores.values() if len(store))

    @property
    def place(self) -> str:
        """Where they lie."""
        return " and ".join(store.place for store in self._stores.values())

    def frames(self, utterance_id: str) -> int:
        """Return the number of frames of an utterance."""
        store, name = next(self._found(utterance_id))
        return store.frames(name)

    def read(self, utterance_id: str) -> npt.NDArray[np.floating[Any]]:
        """Return the features ``[frames, n_mels]`` of an utterance as a view of the mapped file."""
        store, name = next(self._found(utterance_id))
        return store.read(name)

    def shards(self) -> Iterator[npt.NDArray[np.floating[Any]]]:
        """Yield each shard ``[frames, n_mels]``, corpus by corpus."""
        for store in self._stores.values():
            yield from store.shards()

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 over all files; of one corpus, that of its store."""
        digests = {prefix: store.digest for prefix, store in self._stores.items()}
        if len(digests) == 1:
            return next(iter(digests.values()))
        return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()

    def _found(self, utterance_id: str) -> Iterator[tuple[FeatureStore, str]]:
        for prefix, store in self._stores.items():
            name = utterance_id.removeprefix(prefix)
            if utterance_id.startswith(prefix) and name in store:
                yield store, name
