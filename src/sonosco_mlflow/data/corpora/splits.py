"""The three splits, and which parts of a corpus make them up.

>>> check_parts({"train": ["train-clean-5"], "dev": ["dev-clean-2"]})
"""

from collections.abc import Mapping, Sequence

from sonosco_mlflow.errors import UserError, nearest

SPLITS = ("train", "dev", "test")

Parts = Mapping[str, Sequence[str]]
"""For each split, the names of the parts of the corpus that make it up."""


def check_parts(parts: Parts, hold_out: bool = True) -> None:
    """Return if ``parts`` names splits, no part twice, and something to train on if others are cut from that.

    Raises:
        UserError: it does not.
    """
    for split in parts:
        if split not in SPLITS:
            raise UserError(f"data.parts: found the split {split!r}, {nearest(split, SPLITS)}")
    if hold_out and not parts.get("train"):
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
