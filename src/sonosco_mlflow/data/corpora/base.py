"""What a corpus is: something that puts audio under a folder and says what is in it, as three manifests.

``bring_corpus`` owns everything that corpora have in common. The manifests are the mark that a corpus is
whole: they go first and are written last, so that what a killed process left is never taken for a corpus.

>>> from sonosco_mlflow.data.corpora import bring_corpus
>>> bring_corpus("default", Path("corpus"))["test"].hours  # doctest: +SKIP
0.08
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from sonosco_mlflow.data.corpora.splits import SPLITS, Parts, check_parts
from sonosco_mlflow.data.corpora.splitting import cut_missing
from sonosco_mlflow.data.corpora.unusable import Unusable, list_of, set_aside, without_unusable
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.digests import file_digest
from sonosco_mlflow.errors import UserError, nearest

_MODULES = {
    "default": "sonosco_mlflow.data.corpora.embedded",
    "an4": "sonosco_mlflow.data.corpora.an4",
    "folder": "sonosco_mlflow.data.corpora.folder",
    "librispeech": "sonosco_mlflow.data.corpora.librispeech",
    "tedlium": "sonosco_mlflow.data.corpora.tedlium",
    "voxforge": "sonosco_mlflow.data.corpora.voxforge",
    "common-voice": "sonosco_mlflow.data.corpora.common_voice",
    "sonosco-csv": "sonosco_mlflow.data.corpora.sonosco_csv",
    "nemo": "sonosco_mlflow.data.corpora.nemo",
    "lhotse": "sonosco_mlflow.data.corpora.lhotse",
    "kaldi": "sonosco_mlflow.data.corpora.kaldi",
}
CORPORA = tuple(_MODULES)
AUDIO_ELSEWHERE = "audio.sha256"
"""Digests of the recordings that a corpus only points to."""
LEFT_OUT = "left-out.txt"
"""What a corpus as it was published has no use for, and why: one line each."""

_MARKER = "MADE-BY-SONOSCO"

Progress = Callable[[int, int], None]
"""Called with (done, all), in utterances, or in bytes while something is downloaded."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a corpus.

    Attributes:
        directory: where its audio goes; it holds nothing of an earlier corpus.
        source: a path or an address, where the corpus takes one.
        parts: what makes up each split, for a corpus that is made of parts; None is its own choice. Any other refuses
            them (:func:`~sonosco_mlflow.data.corpora.splits.refuse_parts`).
        processes: how many may work at once; they change no byte.
        progress: called with (done, all) now and then.
    """

    directory: Path
    source: str | None
    parts: Parts | None
    processes: int
    progress: Progress


@dataclass(frozen=True, slots=True)
class Brought:
    """What a corpus has.

    Attributes:
        splits: the utterances of each split that it has of itself. Audio paths are absolute, or start from the
            directory. Of those that are no use (:mod:`~sonosco_mlflow.data.corpora.unusable`) nothing is expected.
        why: by id, why an utterance is of no use, where more is known than can be seen of it.
        left_out: what was published with the corpus and is no use: one line each.
    """

    splits: dict[str, list[Utterance]]
    why: Mapping[str, str] = field(default_factory=dict)
    left_out: Iterable[str] = ()


class Corpus(Protocol):
    """A module of this package."""

    def bring(self, request: Request) -> Brought:
        """Bring the corpus; write no manifest. The same source gives the same bytes, with any number of processes.

        Raises:
            UserError: the source is missing, wrong or incomplete.
        """
        ...


def bring_corpus(
    name: str,
    directory: Path,
    source: str | None = None,
    parts: Parts | None = None,
    processes: int = 2,
    progress: Progress | None = None,
    hold_out: bool = True,
    set_unusable_aside: bool = False,
) -> dict[str, Manifest]:
    """Bring corpus ``name`` into ``directory``: its audio, if it has any of its own, and three manifests.

    It may be killed at any moment and called again. An earlier corpus in ``directory`` is replaced.

    Args:
        name: One of ``CORPORA``.
        directory: Where ``wav/``, ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl`` go; made if need be.
        source: A path or an address, where the corpus takes one.
        parts: The names of the parts of each split, for a corpus that has parts; None is its own choice.
        processes: How many processes may work at once; it changes no byte.
        progress: Called with (done, all) now and then.
        hold_out: Whether a split that the corpus does not have is cut from its training part. Else it stays empty.
        set_unusable_aside: Whether utterances of no use are named in ``*.unusable.jsonl`` instead of being refused
            (:mod:`~sonosco_mlflow.data.corpora.unusable`).

    Returns:
        The manifests of "train", "dev" and "test", as they were written.

    Raises:
        UserError: an unknown name, parts that there are not, or a source that is missing, wrong or incomplete.
    """
    if name not in _MODULES:
        raise UserError(f"data.corpus: found {name!r}, which is no corpus: {nearest(name, CORPORA)}")
    if parts is not None:
        check_parts(parts, hold_out)
    directory = directory.resolve()
    _refuse_to_overwrite(source, directory)
    corpus = cast(Corpus, import_module(_MODULES[name]))
    directory.mkdir(parents=True, exist_ok=True)
    _clear(directory)
    brought = corpus.bring(Request(directory, source, parts, processes, progress or _show_nothing))
    if not set_unusable_aside:
        for found in brought.splits.values():
            refuse_unusable(without_unusable(found, brought.why, directory)[1])
    # What is set aside is cut with the others: once it is mended, it moves none of them.
    splits = _all_splits(brought.splits, source or name, hold_out)
    divided = {split: without_unusable(found, brought.why, directory) for split, found in splits.items()}
    manifests = {split: Manifest(usable, directory) for split, (usable, _) in divided.items()}
    _refuse_overlap(manifests)
    _note_audio_elsewhere(directory, manifests)
    _note_left_out(directory, brought.left_out)
    for split, (_, unusable) in divided.items():
        set_aside(unusable, directory, split)
    for split in SPLITS:
        manifests[split].write(directory / f"{split}.jsonl")
    return {split: Manifest.read(directory / f"{split}.jsonl") for split in SPLITS}


def make_audio_folder(directory: Path) -> Path:
    """Make and return ``directory/wav``, marked as ours, so that a later call may replace it.

    Raises:
        UserError: somebody else's ``wav`` stands there.
    """
    audio = directory / "wav"
    if audio.exists() and (not audio.is_dir() or any(audio.iterdir())):
        raise UserError(
            f"{audio} is there already and was not made by sonosco, so it is left alone. "
            "Give a folder of its own to the corpus."
        )
    audio.mkdir(exist_ok=True)
    (audio / _MARKER).touch()
    return audio


def some(names: list[str]) -> str:
    """Name the first five and say how many there are: what a message about many files needs."""
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def refuse_unusable(rows: Iterable[Unusable]) -> None:
    """Return if there are none.

    Raises:
        UserError: there are; the first five are named.
    """
    told = [row.found for row in rows]
    if told:
        raise UserError(f"these utterances are of no use: {some(told)}. Mend them, or take them out.")


def _all_splits(found: Mapping[str, list[Utterance]], source: str, hold_out: bool) -> dict[str, list[Utterance]]:
    if not hold_out:
        if not any(found.values()):
            raise UserError(f"data.source: {source} has no utterances.")
        return {split: found.get(split, []) for split in SPLITS}
    if not found.get("train"):
        raise UserError(
            f"data.source: {source} has no utterances to train on, only for {' and '.join(found)}. A corpus that is "
            "there for these alone is one of several, with hold_out: false (docs/corpora.md)."
        )
    return cut_missing(found, source)


def _note_left_out(directory: Path, lines: Iterable[str]) -> None:
    text = "".join(f"{line}\n" for line in sorted(lines))
    if text:
        (directory / LEFT_OUT).write_text(text, encoding="utf-8", errors="surrogateescape")


def _note_audio_elsewhere(directory: Path, manifests: dict[str, Manifest]) -> None:
    """Write the digests of recordings that stay where they are: by these, what is made of them follows a change.

    ``sha256sum --check`` reads the file.
    """
    paths = [manifest.audio_path(utterance) for manifest in manifests.values() for utterance in manifest]
    lines = [
        f"{file_digest(path)}  {path}\n" for path in sorted({*paths}) if not path.resolve().is_relative_to(directory)
    ]
    if lines:
        (directory / AUDIO_ELSEWHERE).write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def changed_audio(directory: Path) -> list[str]:
    """Return the recordings outside of the corpus in ``directory`` that are gone, or not what they were noted as."""
    noted = directory / AUDIO_ELSEWHERE
    if not noted.exists():
        return []
    lines = noted.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    entries = [line.partition("  ") for line in lines if line]
    return [name for digest, _, name in entries if not Path(name).is_file() or file_digest(Path(name)) != digest]


def _clear(directory: Path) -> None:
    for name in (*(f"{split}.jsonl" for split in SPLITS), AUDIO_ELSEWHERE, LEFT_OUT):
        (directory / name).unlink(missing_ok=True)
    for split in SPLITS:
        list_of(directory, split).unlink(missing_ok=True)
    audio = directory / "wav"
    if not (audio / _MARKER).is_file():
        return
    # The marker goes last: a clearing that was killed can still be recognised and finished.
    for child in sorted(audio.iterdir()):
        if child.is_dir():
            shutil.rmtree(child)
        elif child.name != _MARKER:
            child.unlink()
    (audio / _MARKER).unlink()
    audio.rmdir()


def _refuse_to_overwrite(source: str | None, directory: Path) -> None:
    if source is None or "://" in source:
        return
    origin = Path(source).expanduser().resolve()
    if origin == directory or directory in origin.parents:
        raise UserError(
            f"data.source: {source} lies in {directory}, where the corpus is to be written and earlier "
            "manifests are replaced. Give a source elsewhere, or another folder for the corpus."
        )


def _refuse_overlap(manifests: dict[str, Manifest]) -> None:
    split_of: dict[str, str] = {}
    for split, manifest in manifests.items():
        twice = [utterance.id for utterance in manifest if utterance.id in split_of]
        if twice:
            raise UserError(
                f"these ids stand in {split_of[twice[0]]} and in {split}: {some(twice)}. An utterance may be "
                "in one split only: rename or remove them."
            )
        split_of |= dict.fromkeys((utterance.id for utterance in manifest), split)


def _show_nothing(done: int, everything: int) -> None:
    """Stand in for a caller who wants no progress."""
