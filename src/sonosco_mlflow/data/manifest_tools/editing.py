"""Manifests made of others, or of a folder. Audio paths stay valid wherever the new one lies.

Nothing that stands there is overwritten, unless it would be the same bytes: a command that was killed can be given
again.
"""

import filecmp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

from sonosco_mlflow.data.corpora.base import Progress, refuse_unusable, some
from sonosco_mlflow.data.corpora.scanning import scan
from sonosco_mlflow.data.corpora.splitting import group_of, position
from sonosco_mlflow.data.corpora.unusable import without_unusable
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.manifest_tools.rows import numbered_rows
from sonosco_mlflow.data.utterances import Utterance
from sonosco_mlflow.errors import UserError

RATIOS = {"dev": 0.1, "test": 0.1, "train": 0.8}
"""The shares of `split`; with these it cuts as the folder corpus does."""


def read(path: Path) -> Manifest:
    """Read a manifest that another one is to be made of.

    Raises:
        UserError: naming file, line and key, what was found and what was expected.
    """
    manifest = Manifest.read(path)
    # A path with ".." leads elsewhere from a link to the folder than it seems to.
    manifest.root = manifest.root.resolve()
    return manifest


def write_new(manifest: Manifest, path: Path) -> None:
    """Write ``manifest`` to ``path``.

    Raises:
        UserError: something else stands there.
    """
    path = path.parent.resolve() / path.name
    partial = path.with_name(f".{path.name}.new")
    manifest.write(partial)
    if path.exists() and not (path.is_file() and filecmp.cmp(partial, path, shallow=False)):
        partial.unlink()
        raise UserError(f"{path}: something else stands there already. Move it away, or give another name by --into.")
    partial.replace(path)


def create(folder: Path, into: Path, prefix: str, processes: int, progress: Progress) -> Manifest:
    """Return the manifest of a folder with recordings and transcripts, to be written to ``into``.

    Audio paths are relative where the recordings lie beside or below ``into``, so that both can be moved together, and
    absolute elsewhere.

    Raises:
        UserError: no such folder, no recordings, recordings that are no pairs with transcripts, or that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder. Expected the folder with your recordings.")
    root = folder.resolve()
    utterances = scan(root, prefix, processes, progress)
    refuse_unusable(without_unusable(utterances, {}, root)[1])
    if not utterances:
        raise UserError(f"{folder}: no recordings. Expected wav/x.wav with txt/x.txt, or x.txt beside x.flac.")
    home = into.parent.resolve()
    if root.is_relative_to(home):
        utterances = [
            replace(utterance, audio_filepath=Path(utterance.audio_filepath).relative_to(home).as_posix())
            for utterance in utterances
        ]
    return Manifest(utterances, home)


def merge(paths: Sequence[Path], into: Path) -> Manifest:
    """Return one manifest of several, to be written to ``into``.

    Raises:
        UserError: an id stands in two of them; both lines are named.
    """
    home = into.parent.resolve()
    merged: dict[str, Utterance] = {}
    origin: dict[str, Path] = {}
    twice: list[tuple[str, Path]] = []
    for path in paths:
        for utterance in read(path).seen_from(home):
            if utterance.id in merged:
                twice.append((utterance.id, path))
                continue
            origin[utterance.id] = path
            merged[utterance.id] = utterance
    if twice:
        # Lines are looked up for as many as the message names.
        names = [f"{name!r} in {_place(origin[name], name)} and {_place(path, name)}" for name, path in twice[:5]]
        raise UserError(
            f"these ids stand twice: {some([*names, *(name for name, _ in twice[5:])])}. Rename or remove them."
        )
    return Manifest(merged.values(), home)


def _place(path: Path, name: str) -> str:
    lines = (line for line, row in numbered_rows(path) if isinstance(row, Utterance) and row.id == name)
    return f"{path}:{next(lines)}"


@dataclass(frozen=True)
class Limits:
    """What an utterance must keep to; durations are in seconds, rates in characters a second, None is no limit."""

    min_duration: float | None = None
    max_duration: float | None = None
    min_rate: float | None = None
    max_rate: float | None = None

    def broken_by(self, utterance: Utterance) -> str:
        """Return the first limit that ``utterance`` does not keep to, in words; nothing where it keeps to all."""
        rate = len(utterance.text) / utterance.duration
        for name, value, low, high in (
            ("s", utterance.duration, self.min_duration, self.max_duration),
            ("characters a second", rate, self.min_rate, self.max_rate),
        ):
            if low is not None and value < low:
                return f"below {low:g} {name}"
            if high is not None and value > high:
                return f"above {high:g} {name}"
        return ""


@dataclass
class Dropped:
    """How much of a manifest a limit has cost."""

    rows: int = 0
    seconds: float = 0.0


def keep_within(manifest: Manifest, limits: Limits) -> tuple[Manifest, dict[str, Dropped]]:
    """Return the utterances of ``manifest`` that keep to ``limits``, and what each limit has cost.

    An utterance that breaks several counts for the first of them.

    Raises:
        UserError: none keeps to them.
    """
    kept = []
    dropped: dict[str, Dropped] = {}
    for utterance in manifest:
        reason = limits.broken_by(utterance)
        if not reason:
            kept.append(utterance)
            continue
        entry = dropped.setdefault(reason, Dropped())
        entry.rows += 1
        entry.seconds += utterance.duration
    if not kept:
        raise UserError(f"no utterance is within the limits ({', '.join(dropped) or 'the manifest is empty'}).")
    return Manifest(kept, manifest.root), dropped


def split(
    manifest: Manifest, ratios: Mapping[str, float], by: Literal["speaker", "utterance"], seed: int
) -> dict[str, Manifest]:
    """Return the utterances of ``manifest`` in splits of about these shares.

    Where an utterance goes depends on the seed and on its own id alone, or on its speaker's name: rows that are added
    move none that was there. Utterances of unknown speakers go by their ids.

    Raises:
        UserError: the shares are not above 0 with a sum of 1, or a split would be empty.
    """
    if any(share <= 0 for share in ratios.values()) or abs(sum(ratios.values()) - 1) > 1e-6:
        raise UserError(f"--ratios: found {_spelled(ratios)}, expected shares above 0 that sum to 1.")
    names = list(ratios)
    ends = list(accumulate(ratios.values()))[:-1]
    utterances: dict[str, list[Utterance]] = {name: [] for name in names}
    for utterance in manifest:
        place = position(group_of(utterance, by == "speaker"), seed)
        utterances[names[sum(place >= end for end in ends)]].append(utterance)
    empty = [name for name, found in utterances.items() if not found]
    if empty:
        # Filling it with another's utterances would move them back when others are added.
        raise UserError(
            f"--ratios: nothing falls to {' and '.join(empty)}: {len(manifest)} utterances of "
            f"{len(manifest.speakers)} speakers are too few for {_spelled(ratios)}, by {by} with seed {seed}. Give "
            "larger shares or another --seed, or cut by utterance."
        )
    return {name: Manifest(found, manifest.root) for name, found in utterances.items()}


def parse_ratios(text: str) -> dict[str, float]:
    """Read the shares of splits.

    >>> parse_ratios("dev=0.1,train=0.9")
    {'dev': 0.1, 'train': 0.9}

    Raises:
        UserError: it is not of that form, or a name is no plain file name or stands twice.
    """
    ratios: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not name.replace("-", "").replace("_", "").isalnum() or name in ratios or not 0 < value < 1:
            raise UserError(f"--ratios: found {part.strip()!r} in {text!r}, expected like {_spelled(RATIOS)}.")
        ratios[name] = value
    return ratios


def _spelled(ratios: Mapping[str, float]) -> str:
    return ",".join(f"{name}={share:g}" for name, share in ratios.items())


def dropped_text(dropped: Mapping[str, Dropped]) -> Iterator[str]:
    """Yield a line for each limit: what it has cost."""
    return (f"dropped {entry.rows} utterances, {entry.seconds / 3600:.2f} h: {why}" for why, entry in dropped.items())
