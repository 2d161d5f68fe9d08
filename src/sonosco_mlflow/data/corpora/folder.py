"""A folder of recordings: ``wav/x.wav`` with ``txt/x.txt``, or any ``x.flac`` with ``x.txt`` beside it.

The audio stays where it is; the manifests point to it by absolute paths. Splits are, in this order of
preference, ``train.jsonl`` (``dev.jsonl``, ``test.jsonl``), folders ``train`` (``dev``, ``test``), or cut
from everything: what is missing is cut from the training part, by speaker where enough are known.
"""

from dataclasses import replace
from pathlib import Path

from sonosco_mlflow.data.corpora.base import Brought, Progress, Request
from sonosco_mlflow.data.corpora.recordings import read_durations
from sonosco_mlflow.data.corpora.scanning import AUDIO_SUFFIXES, scan
from sonosco_mlflow.data.corpora.splits import SPLITS, refuse_parts
from sonosco_mlflow.data.manifest import Manifest, Utterance
from sonosco_mlflow.errors import UserError


def bring(request: Request) -> Brought:
    """Describe the recordings under ``source``; see ``Corpus.bring``.

    Raises:
        UserError: parts, no source, no recordings, or audio without transcript or the reverse; files are named, the
            first five and their number.
    """
    refuse_parts(request.parts, "the folder corpus")
    processes, progress = request.processes, request.progress
    if request.source is None:
        raise UserError("data.source: the folder corpus needs one: the folder with your recordings.")
    root = Path(request.source).expanduser().resolve()
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
    if not any(given.values()):
        raise UserError(
            f"data.source: {root} has no recordings with transcripts. Expected wav/*.wav with txt/*.txt, audio "
            f"({', '.join(AUDIO_SUFFIXES)}) with a same-named .txt beside it, or train.jsonl."
        )
    return Brought(given)


def _read_manifest(path: Path, processes: int, progress: Progress) -> list[Utterance]:
    manifest = Manifest.read(path)
    paths = {utterance.id: manifest.audio_path(utterance).resolve() for utterance in manifest}
    durations = read_durations(paths.values(), processes, progress)
    return [
        replace(utterance, audio_filepath=str(place), duration=durations[place])
        for utterance, place in zip(manifest, paths.values(), strict=True)
    ]
