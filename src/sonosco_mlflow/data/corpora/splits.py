"""The three splits: which parts of a corpus make them up, and how one that is lacking is cut from the training split.

>>> check_parts({"train": ["train-clean-5"], "dev": ["dev-clean-2"]})
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER, Utterance
from sonosco_mlflow.errors import UserError, nearest

SPLITS = ("train", "dev", "test")

Parts = Mapping[str, Sequence[str]]
"""For each split, the names of the parts of the corpus that make it up."""

_SPEAKERS_TO_CUT_BY = 10
_CUT_SHARES = {"dev": (0.0, 0.1), "test": (0.1, 0.2)}


def check_parts(parts: Parts) -> None:
    """Return if ``parts`` names splits, something to train on, and no part twice.

    Raises:
        UserError: it does not.
    """
    for split in parts:
        if split not in SPLITS:
            raise UserError(f"data.parts: found the split {split!r}, {nearest(split, SPLITS)}")
    if not parts.get("train"):
        raise UserError("data.parts: names no part for train. Expected one at least: data.parts.train=[NAME]")
    split_of: dict[str, str] = {}
    for split, names in parts.items():
        for name in names:
            if name in split_of:
                raise UserError(
                    f"data.parts: found {name!r} in {split_of[name]} and in {split}. Expected each part once."
                )
            split_of[name] = split


def refuse_parts(parts: Parts | None, corpus: str) -> None:
    """Return if no parts were asked for.

    Raises:
        UserError: some were, and ``corpus`` is not made of any.
    """
    if parts is not None:
        raise UserError(f"data.parts: found {dict(parts)}, but {corpus} is not made of parts. Leave it empty.")


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

    def group(utterance: Utterance) -> str:
        return utterance.speaker if by_speaker and utterance.speaker in named else utterance.id

    positions = {name: _position(name) for name in map(group, train)}
    if missing and len(positions) <= len(missing):
        raise UserError(
            f"data.source: {source} has {len(train)} utterances to train on, too few to cut "
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


def _position(name: str) -> float:
    """Return a fixed place in [0, 1) for ``name``, from its sha256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / (1 << 48)


def _nearest(positions: dict[str, float], low: float) -> str:
    above: Iterable[str] = [name for name, place in positions.items() if place >= low] or positions
    return min(above, key=positions.__getitem__)
