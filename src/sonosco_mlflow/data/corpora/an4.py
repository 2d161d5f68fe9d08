"""AN4, the alphanumeric corpus of Carnegie Mellon University: spelt names, numbers and commands.

Read from the original layout, ``an4/etc/an4_{train,test}.{fileids,transcription}`` and ``an4/wav/**``, as an
archive or unpacked, local or downloaded. Nothing is unpacked: members are read one by one, and only names
that the file lists hold, and that are plain names, become paths.

Every ninth training speaker, from the fifth on in sorted order, is held out as the dev split.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import soundfile

from sonosco_mlflow.data.corpora.archives import members
from sonosco_mlflow.data.corpora.audio import SAMPLE_RATE, duration_of, write_wave
from sonosco_mlflow.data.corpora.base import Brought, Request, make_audio_folder, some
from sonosco_mlflow.data.corpora.download import download, has_digest
from sonosco_mlflow.data.corpora.splits import SPLITS, refuse_parts
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.errors import UserError

ADDRESS = "http://www.speech.cs.cmu.edu/databases/an4/an4_sphere.tar.gz"

_COUNTS = {"train": 948, "test": 130}
_TABLE = re.compile(r"(?:^|/)etc/an4_(train|test)\.(fileids|transcription)$")
_AUDIO = re.compile(r"(?:^|/)wav/((?:[\w-]+/)+[\w-]+)\.(wav|sph|raw)$")
_FILE_ID = re.compile(r"(?:[\w-]+/)+[\w-]+")
_TRANSCRIPT = re.compile(r"(?:<s>)?(?P<text>[^<>()]*)(?:</s>)?\s*\((?P<id>[\w-]+)\)")


@dataclass(frozen=True, slots=True)
class _Entry:
    id: str
    split: str
    speaker: str
    text: str


def bring(request: Request) -> Brought:
    """Bring AN4 into ``directory/wav/<speaker>/<id>.wav``; see ``Corpus.bring``.

    ``source`` is a folder, an archive, or an address, which may end in ``#sha256=<hexadecimal digest>`` or ``#md5=``;
    without one it is ``ADDRESS``. The numbers of utterances, 948 and 130, are checked unless a digest vouches
    for the content. Wav files keep their bytes; Sphere and raw ones become 16 bit wav.

    Raises:
        UserError: the source cannot be had, is no AN4, or is incomplete.
    """
    refuse_parts(request.parts, "AN4")
    source = ADDRESS if request.source is None else request.source
    if "://" in source:
        archive = download(source, request.progress)
        return _read(archive, request, None if has_digest(source) else _COUNTS)
    return _read(Path(source).expanduser(), request, _COUNTS)


def _read(source: Path, request: Request, counts: dict[str, int] | None) -> Brought:
    entries = _read_tables(source, counts)
    audio = make_audio_folder(request.directory)
    utterances: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
    missing = dict(entries)
    for member in members(source, _AUDIO, "AN4"):
        entry = missing.pop(member.match[1], None)
        if entry is None:
            continue
        path = audio / entry.speaker / f"{entry.id}.wav"
        _write_recording(path, member.read(), member.match[2], member.place)
        place = path.relative_to(request.directory).as_posix()
        utterances[entry.split].append(Utterance(entry.id, place, duration_of(path), entry.text, entry.speaker))
        request.progress(len(entries) - len(missing), len(entries))
    if missing:
        raise UserError(f"{source}: no recording (.wav, .sph or .raw) under wav/ for {some(sorted(missing))}.")
    return Brought(utterances)


def _read_tables(source: Path, counts: dict[str, int] | None) -> dict[str, _Entry]:
    """Return what the four tables under ``etc`` say, by the path that stands in the ``fileids``."""
    tables = {
        (table.match[1], table.match[2]): table.read().decode("utf-8", errors="replace")
        for table in members(source, _TABLE, "AN4")
    }
    file_ids: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for split in ("train", "test"):
        for kind in ("fileids", "transcription"):
            if (split, kind) not in tables:
                raise UserError(f"{source}: found no etc/an4_{split}.{kind}. Expected AN4 in its original layout.")
        file_ids[split] = tables[split, "fileids"].split()
        texts |= _read_transcription(tables[split, "transcription"], f"{source}: etc/an4_{split}.transcription")
        if counts is not None and len(file_ids[split]) != counts[split]:
            raise UserError(
                f"{source}: etc/an4_{split}.fileids names {len(file_ids[split])} utterances. "
                f"Expected {counts[split]}: this is not the whole AN4."
            )
    held_out = set(sorted({_speaker(file_id, source) for file_id in file_ids["train"]})[4::9])
    entries = {}
    for split, names in file_ids.items():
        for file_id in names:
            speaker, stem = _speaker(file_id, source), file_id.rpartition("/")[2]
            if not texts.get(stem):
                raise UserError(f"{source}: etc/an4_{split}.transcription has no text for {stem!r}.")
            place = "dev" if split == "train" and speaker in held_out else split
            entries[file_id] = _Entry(stem, place, speaker, texts[stem])
    return entries


def _speaker(file_id: str, source: Path) -> str:
    if not _FILE_ID.fullmatch(file_id):
        raise UserError(f"{source}: fileids: found {file_id!r}. Expected <folder>/<speaker>/<name>.")
    return file_id.split("/")[-2]


def _read_transcription(table: str, place: str) -> dict[str, str]:
    texts = {}
    for number, line in enumerate(table.splitlines(), start=1):
        match = _TRANSCRIPT.fullmatch(line.strip())
        if match:
            texts[match["id"]] = " ".join(match["text"].split())
        elif line.strip():
            raise UserError(f"{place}:{number}: found {line.strip()[:80]!r}. Expected '<s> WORDS </s> (id)'.")
    return texts


def _write_recording(path: Path, content: bytes, kind: str, place: str) -> None:
    path.parent.mkdir(exist_ok=True)
    if kind == "wav":
        path.write_bytes(content)
        return
    raw = {"samplerate": SAMPLE_RATE, "channels": 1, "format": "RAW", "subtype": "PCM_16", "endian": "BIG"}
    try:
        samples, sample_rate = soundfile.read(io.BytesIO(content), dtype="int16", **(raw if kind == "raw" else {}))
    except soundfile.SoundFileError as error:
        raise UserError(f"{place}: cannot be read as audio ({error}).") from error
    write_wave(path, samples, sample_rate)
