"""Which utterances are held out: by a place that each name has of itself, so that new recordings move no old one."""

import hashlib
from collections.abc import Iterable, Mapping

from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER, Utterance
from sonosco_mlflow.errors import UserError

_SPEAKERS_TO_CUT_BY = 10
_CUT_SHARES = {"dev": (0.0, 0.1), "test": (0.1, 0.2)}


def cut_missing(given: Mapping[str, list[Utterance]], source: object) -> dict[str, list[Utterance]]:
    """Cut a tenth of "train" for each of "dev" and "test" that is absent or empty.

    Where a group (a speaker, or an utterance where few speakers are known) goes depends on its own name
    alone, so that new recordings move no old one. Only a split that would stay empty takes the nearest group.

    Raises:
        UserError: there are too few groups; ``source`` is named.
    """
    missing = [split for split in _CUT_SHARES if not given.get(split)]
    train = given["train"]
    named = {utterance.speaker for utterance in train} - {UNKNOWN_SPEAKER}
    by_speaker = len(named) >= _SPEAKERS_TO_CUT_BY
    positions = {name: position(name) for name in (group_of(utterance, by_speaker) for utterance in train)}
    if missing and len(positions) <= len(missing):
        raise UserError(
            f"data.source: {source} has {len(train)} utterances to train on, too few to cut "
            f"{' and '.join(missing)} from them. Add recordings, or give these splits."
        )
    splits = dict(given)
    for split in missing:
        low, high = _CUT_SHARES[split]
        chosen = {name for name, place in positions.items() if low <= place < high} or {_nearest(positions, low)}
        splits[split] = [utterance for utterance in train if group_of(utterance, by_speaker) in chosen]
        positions = {name: place for name, place in positions.items() if name not in chosen}
    splits["train"] = [utterance for utterance in train if group_of(utterance, by_speaker) in positions]
    return splits


def group_of(utterance: Utterance, by_speaker: bool) -> str:
    """Return what stays together with ``utterance``: its speaker where that is asked for and known, else itself."""
    return utterance.speaker if by_speaker and utterance.speaker != UNKNOWN_SPEAKER else utterance.id


def position(name: str, seed: int = 0) -> float:
    """Return a fixed place in [0, 1) for ``name``, from its sha256; another one for another seed."""
    digest = hashlib.sha256((f"{seed}:{name}" if seed else name).encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def _nearest(positions: dict[str, float], low: float) -> str:
    above: Iterable[str] = [name for name, place in positions.items() if place >= low] or positions
    return min(above, key=positions.__getitem__)
