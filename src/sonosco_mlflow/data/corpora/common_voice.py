"""Common Voice: sentences read by volunteers in many languages, of one of which the archive or folder is given.

Read from the original layout, ``<language>/{train,dev,test}.tsv`` with ``<language>/clips/*.mp3``. Its parts are the
tables: besides these three ``validated``, ``other`` or any of your own. Sentences are left as they are written, with
capitals and punctuation.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sonosco_mlflow.data.corpora.archives import PLAIN_NAME, members
from sonosco_mlflow.data.corpora.base import Brought, Request, make_audio_folder, some
from sonosco_mlflow.data.corpora.download import download
from sonosco_mlflow.data.corpora.recordings import audio_filepath, read_durations
from sonosco_mlflow.data.corpora.splits import SPLITS, Parts
from sonosco_mlflow.data.corpora.unusable import UNREADABLE
from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER, Utterance
from sonosco_mlflow.errors import UserError

_SUFFIX = r"\.(?:mp3|opus|ogg|wav|flac)"
_TABLE = re.compile(r"^(?P<folder>(?:.*/)?)(?P<part>[\w-]+)\.tsv$")
_CLIP = re.compile(rf"(?:^|/)clips/(?P<clip>{PLAIN_NAME}){_SUFFIX}$")
_COLUMNS = ("client_id", "path", "sentence")
_EXPECTED = "Common Voice of one language"


@dataclass(frozen=True, slots=True)
class _Row:
    clip: str
    text: str
    speaker: str


def bring(request: Request) -> Brought:
    """Bring a language of Common Voice; see ``Corpus.bring``.

    ``source`` is a folder, an archive or its address; there is no address of its own, because Mozilla hands archives
    out by name and licence. An archive is read twice: the tables, then the clips that they name, which go to
    ``directory/wav/`` as they are. A clip of an archive that is empty is named in ``left-out.txt``, since it was
    published so; one in a folder makes an utterance of no use.

    Raises:
        UserError: no source, one that cannot be had or has more than one language, a table or clips that are missing.
    """
    source, directory = request.source, request.directory
    if source is None:
        raise UserError(
            "data.source: Common Voice needs one: the archive of a language, or its folder, from "
            "https://commonvoice.mozilla.org"
        )
    place = download(source, request.progress) if "://" in source else Path(source).expanduser()
    tables = _read_tables(place, request.parts)
    wanted = {row.clip for rows in tables.values() for row in rows}
    if not place.is_dir():
        make_audio_folder(directory)
    clips: dict[str, Path] = {}
    for member in members(place, _CLIP, _EXPECTED):
        clip = member.match["clip"]
        if clip in wanted and clip not in clips:
            clips[clip] = member.lay(directory / "wav" / member.match[0].rpartition("/")[2])
            request.progress(len(clips), len(wanted))
    missing = sorted(wanted - clips.keys())
    if missing:
        raise UserError(f"{place}: these clips of its tables are not in clips/: {some(missing)}. Fetch it anew.")
    durations = read_durations(clips.values(), request.processes, request.progress)
    unusable = {clip for clip, path in clips.items() if durations[path] == UNREADABLE and not place.is_dir()}
    for clip in unusable:
        clips[clip].unlink()
    given: dict[str, list[Utterance]] = {split: [] for split in tables}
    for split, rows in tables.items():
        for row in rows:
            if row.clip not in unusable:
                path = clips[row.clip]
                audio = audio_filepath(path, directory)
                given[split].append(Utterance(row.clip, audio, durations[path], row.text, row.speaker))
    return Brought(given, left_out=[f"{clip}: is empty, or cannot be read as audio" for clip in unusable])


def _read_tables(place: Path, parts: Parts | None) -> dict[str, list[_Row]]:
    """Return the rows of each split; of the corpus's own, dev and test may be absent."""
    chosen = parts or {split: [split] for split in SPLITS}
    names = {name for split in chosen.values() for name in split}
    tables: dict[str, list[_Row]] = {}
    folders: dict[str, str] = {}
    for member in members(place, _TABLE, _EXPECTED):
        name, folder = member.match["part"], member.match["folder"]
        if name not in names:
            continue
        if folders.setdefault(name, folder) != folder:
            raise UserError(
                f"data.source: {place} has {name}.tsv in {folders[name]} and in {folder}. Expected {_EXPECTED}: give "
                "its folder."
            )
        tables[name] = list(_read_table(member.text(), member.place))
    needed = names if parts else {"train"}
    absent = sorted(needed - tables.keys())
    if absent:
        raise UserError(f"data.parts: {place} has no {some([f'{name}.tsv' for name in absent])}. Expected {_EXPECTED}.")
    return {split: [row for name in names_ for row in tables.get(name, [])] for split, names_ in chosen.items()}


def _read_table(table: str, place: str) -> Iterator[_Row]:
    """Yield the rows of a table, in which a quotation mark is nothing but that."""
    header, *lines = table.replace("\r\n", "\n").split("\n")
    columns = header.split("\t")
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise UserError(f"{place}:1: found the columns {columns}. Expected {', '.join(missing)} among them.")
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        fields = line.split("\t")
        entry = dict(zip(columns, fields, strict=False))
        clip = re.sub(rf"{_SUFFIX}$", "", entry.get("path", ""))
        text = " ".join(entry.get("sentence", "").split())
        if len(fields) != len(columns) or not re.fullmatch(PLAIN_NAME, clip):
            raise UserError(
                f"{place}:{number}: found {line.strip()[:80]!r}. Expected {len(columns)} columns, and as path the name "
                "of a clip."
            )
        yield _Row(clip, text, entry["client_id"] or UNKNOWN_SPEAKER)
