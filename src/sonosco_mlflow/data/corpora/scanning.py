"""Recordings in a folder, and their transcripts: ``wav/x.wav`` with ``txt/x.txt``, or ``x.txt`` beside ``x.flac``."""

import re
from pathlib import Path

from sonosco_mlflow.data.corpora.base import Progress, some
from sonosco_mlflow.data.corpora.recordings import read_durations
from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER, Utterance
from sonosco_mlflow.data.walking import files_below
from sonosco_mlflow.errors import UserError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus")
# Of a name that is no UTF-8, Python makes halves of characters.
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_NOT_TRANSCRIPTS = ("readme", "license", "licence", "copying", "notice")


def scan(folder: Path, prefix: str, processes: int, progress: Progress) -> list[Utterance]:
    """Return the utterances under ``folder``; an id is ``prefix`` and the path, "-" for "/", no suffix.

    Audio paths begin with ``folder``; recordings that cannot be read are of ``UNREADABLE`` seconds. A speaker is the
    name of the folder that a recording lies in, below ``folder``.

    Raises:
        UserError: audio without transcript or the reverse; files are named, the first five and their number. A name
            that cannot be written into a manifest.
    """
    separate = (folder / "wav").is_dir() and (folder / "txt").is_dir()
    audio_root, text_root = (folder / "wav", folder / "txt") if separate else (folder, folder)
    recordings = [path for path in files_below(audio_root) if _is_recording(path)]
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
    if path.suffix.lower() not in AUDIO_SUFFIXES or path.name.startswith("."):
        return False
    if _UNWRITABLE.search(str(path)):
        raise UserError(
            f"{str(path)!r}: its name has bytes that are not UTF-8, or a control character, which no list of files can "
            "hold. Rename it."
        )
    return True


def _refuse_unpaired(transcripts: dict[Path, Path], text_root: Path, separate: bool) -> None:
    without_text = [str(audio) for audio, transcript in transcripts.items() if not transcript.is_file()]
    if without_text:
        raise UserError(f"recordings without a transcript: {some(without_text)}. Expected a .txt of the same name.")
    known = set(transcripts.values())
    with_audio = {transcript.parent for transcript in known}
    without_audio = [
        str(path)
        for path in files_below(text_root)
        if path.suffix == ".txt"
        and not path.name.startswith(".")
        and path not in known
        and (separate or path.parent in with_audio)
        and path.stem.lower() not in _NOT_TRANSCRIPTS
    ]
    if without_audio:
        raise UserError(
            f"transcripts without a recording: {some(without_audio)}. "
            f"Expected audio ({', '.join(AUDIO_SUFFIXES)}) of the same name."
        )


def _read_transcripts(transcripts: dict[Path, Path]) -> dict[Path, str]:
    texts = {}
    for audio, transcript in transcripts.items():
        try:
            texts[audio] = " ".join(transcript.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise UserError(f"{transcript}: found bytes that are not UTF-8. Save it as UTF-8.") from error
    return texts
