"""Which utterances are held out: by a place that each name has of itself, so that new recordings move no old one."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER, Utterance
from sonosco_mlflow.errors import UserError

_SPEAKERS_TO_CUT_BY = 10
_CUT_SHARES = {"dev": (0.0, 0.1), "test": (0.1, 0.2)}


def cut_missing(given: dict[str, list[Utterance]], root: Path) -> dict[str, list[Utterance]]:
    """Cut a tenth of "train" for each split that was not given.

    Where a group (a speaker, or an utterance where few speakers are known) goes depends on its own name
    alone, so that new recordings move no old one. Only a split that would stay empty takes the nearest group.
    """
    missing = [split for split in _CUT_SHARES if not given.get(split)]
    train = given["train"]
    named = {utterance.speaker for utterance in train} - {UNKNOWN_SPEAKER}
    by_speaker = len(named) >= _SPEAKERS_TO_CUT_BY

    def group(utterance: Utterance) -> str:
        return utterance.speaker if by_speaker and utterance.speaker in named else utterance.id

    positions = {name: position(name) for name in map(group, train)}
    if missing and len(positions) <= len(missing):
        raise UserError(
            f"data.source: {root} has {len(train)} utterances to train on, too few to cut "
            f"{' and '.join(missing)} from them. Add recordings, or give these splits."
        )
    splits = dict(given)
    for split in missing:
        low, high = _CUT_SHARES[split]
        chosen = {name for name, place in positions.items() if low <= place < high} or {_nearest(positions, low)}
        splits[split] = [utterance for utterance in train if group(utterance) in chosen]
        positions = {name: place for name, place in positions.items() if name not in chosen}
    splits["train"] = [utterance for utterance in train if group(utterance) in positions]
    return splits


def position(name: str) -> float:
    """Return a fixed place in [0, 1) for ``name``, from its sha256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / (1 << 48)


def _nearest(positions: dict[str, float], low: float) -> str:
    above: Iterable[str] = [name for name, place in positions.items() if place >= low] or positions
    return min(above, key=positions.__getitem__)
