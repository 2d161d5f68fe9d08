"""A folder of recordings: ``wav/x.wav`` with ``txt/x.txt``, or any ``x.flac`` with ``x.txt`` beside it.

The audio stays where it is; the manifests point to it by absolute paths. Splits are, in this order of
preference, ``train.jsonl`` (``dev.jsonl``, ``test.jsonl``), folders ``train`` (``dev``, ``test``), or cut
from everything: what is missing is cut from the training part, by speaker where enough are known.
"""

from dataclasses import replace
from pathlib import Path

from sonosco_mlflow.data.corpora.base import Progress, some
from sonosco_mlflow.data.corpora.recordings import read_durations
from sonosco_mlflow.data.corpora.splits import SPLITS, Parts, cut_missing, refuse_parts
from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER, Manifest, Utterance
from sonosco_mlflow.errors import UserError

_AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus")
_NOT_TRANSCRIPTS = ("readme", "license", "licence", "copying", "notice")


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
            split: _scan(root / split, f"{split}-", processes, progress) for split in SPLITS if (root / split).is_dir()
        }
    else:
        given = {"train": _scan(root, "", processes, progress)}
    if not given.get("train"):
        raise UserError(
            f"data.source: {root} has no training recordings. Expected wav/*.wav with txt/*.txt, audio "
            f"({', '.join(_AUDIO_SUFFIXES)}) with a same-named .txt beside it, or train.jsonl."
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


def _scan(folder: Path, prefix: str, processes: int, progress: Progress) -> list[Utterance]:
    """Return the utterances under ``folder``; an id is ``prefix`` and the path, "-" for "/", no suffix."""
    separate = (folder / "wav").is_dir() and (folder / "txt").is_dir()
    audio_root, text_root = (folder / "wav", folder / "txt") if separate else (folder, folder)
    recordings = [path for path in sorted(audio_root.rglob("*")) if _is_recording(path)]
    transcripts = {path: text_root / path.relative_to(audio_root).with_suffix(".txt") for path in recordings}
    _refuse_unpaired(transcripts, text_root, separate)
    texts = _read_transcripts(transcripts)
    durations = read_durations(recordings, processes, progress)
    return [
        Utterance(
            id=prefix + "-".join(path.relative_to(audio_root).with_suffix("").parts),
            audio_filepath=str(path),
            duration=durations[path],
            text=texts[path],
            speaker=UNKNOWN_SPEAKER if path.parent == audio_root else path.parent.name,
        )
        for path in recordings
    ]


def _is_recording(path: Path) -> bool:
    return path.suffix.lower() in _AUDIO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _refuse_unpaired(transcripts: dict[Path, Path], text_root: Path, separate: bool) -> None:
    without_text = [str(audio) for audio, transcript in transcripts.items() if not transcript.is_file()]
    if without_text:
        raise UserError(f"recordings without a transcript: {some(without_text)}. Expected a .txt of the same name.")
    known = set(transcripts.values())
    with_audio = {transcript.parent for transcript in known}
    without_audio = [
        str(path)
        for path in sorted(text_root.rglob("*.txt"))
        if path not in known and (separate or path.parent in with_audio) and path.stem.lower() not in _NOT_TRANSCRIPTS
    ]
    if without_audio:
        raise UserError(
            f"transcripts without a recording: {some(without_audio)}. "
            f"Expected audio ({', '.join(_AUDIO_SUFFIXES)}) of the same name."
        )


def _read_transcripts(transcripts: dict[Path, Path]) -> dict[Path, str]:
    texts = {}
    for audio, transcript in transcripts.items():
        try:
            texts[audio] = " ".join(transcript.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise UserError(f"{transcript}: found bytes that are not UTF-8. Save it as UTF-8.") from error
    empty = [str(transcripts[audio]) for audio, text in texts.items() if not text]
    if empty:
        raise UserError(f"empty transcripts: {some(empty)}. Write what is said, or take the recording away too.")
    return texts
