"""A folder of recordings: ``wav/x.wav`` with ``txt/x.txt``, or any ``x.flac`` with ``x.txt`` beside it.

The audio stays where it is; the manifests point to it by absolute paths. Splits are, in this order of
preference, ``train.jsonl`` (``dev.jsonl``, ``test.jsonl``), folders ``train`` (``dev``, ``test``), or cut
from everything: what is missing is cut from the training part, by speaker where enough are known.
"""

from dataclasses import replace
from pathlib import Path

from sonosco_mlflow.data.corpora.base import Progress, some
from sonosco_mlflow.data.corpora.recordings import read_durations
from sonosco_mlflow.data.corpora.scanning import AUDIO_SUFFIXES, scan
from sonosco_mlflow.data.corpora.splits import SPLITS, Parts, refuse_parts
from sonosco_mlflow.data.corpora.splitting import cut_missing
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.errors import UserError


def bring(
    directory: Path, source: str | None, parts: Parts | None, processes: int, progress: Progress
) -> dict[str, Manifest]:
    """Describe the recordings under ``source``; see ``Corpus.bring``.

    Raises:
        UserError: parts, no source, no recordings, audio without transcript or the reverse, an empty transcript, or
            audio that cannot be read; files are named, the first five and their number.
    """
    refuse_parts(parts, "the folder corpus")
    if source is None:
        raise UserError("data.source: the folder corpus needs one: the folder with your recordings.")
    root = Path(source).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"data.source: {root} is not a folder. Expected the folder with your recordings.")
    if any((root / f"{split}.jsonl").is_file() for split in SPLITS):
        given = {
            split: _read_manifest(root / f"{split}.jsonl", processes, progress)
            for split in SPLITS
            if (root / f"{split}.jsonl").is_file()
        }
    elif (root / "train").is_dir():
        given = {
            split: scan(root / split, f"{split}-", processes, progress) for split in SPLITS if (root / split).is_dir()
        }
    else:
        given = {"train": scan(root, "", processes, progress)}
    if not given.get("train"):
        raise UserError(
            f"data.source: {root} has no training recordings. Expected wav/*.wav with txt/*.txt, audio "
            f"({', '.join(AUDIO_SUFFIXES)}) with a same-named .txt beside it, or train.jsonl."
        )
    return {split: Manifest(utterances, root) for split, utterances in cut_missing(given, root).items()}


def _read_manifest(path: Path, processes: int, progress: Progress) -> list[Utterance]:
    manifest = Manifest.read(path)
    paths = {utterance.id: manifest.audio_path(utterance).resolve() for utterance in manifest}
    missing = [str(place) for place in paths.values() if not place.is_file()]
    if missing:
        raise UserError(f"{path}: names recordings that are not there: {some(missing)}.")
    empty = [utterance.id for utterance in manifest if not utterance.text.strip()]
    if empty:
        raise UserError(f"{path}: these utterances have an empty text: {some(empty)}.")
    durations = read_durations(paths.values(), processes, progress)
    return [
        replace(utterance, audio_filepath=str(place), duration=durations[place])
        for utterance, place in zip(manifest, paths.values(), strict=True)
    ]
