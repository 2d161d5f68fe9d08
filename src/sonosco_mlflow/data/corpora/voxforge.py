"""VoxForge: prompts read by volunteers, one archive for each time that somebody recorded some.

Read from archives, or folders, ``<user>-<date>-<code>/{wav,flac}/<id>.*`` with ``etc/PROMPTS``, or
``etc/prompts-original`` where that is absent. VoxForge has no splits: they are cut by speaker.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urljoin

from sonosco_mlflow.data.corpora.archives import PLAIN_NAME, Member, archives_in, members
from sonosco_mlflow.data.corpora.base import Brought, Progress, Request, make_audio_folder
from sonosco_mlflow.data.corpora.download import download, download_all, download_page
from sonosco_mlflow.data.corpora.recordings import audio_filepath, read_durations
from sonosco_mlflow.data.corpora.segments import file_name
from sonosco_mlflow.data.corpora.splits import refuse_parts
from sonosco_mlflow.data.corpora.unusable import UNREADABLE
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.errors import UserError

ADDRESS = "http://www.repository.voxforge1.org/downloads/SpeechCorpus/Trunk/Audio/Main/16kHz_16bit/"

_FILE = re.compile(
    rf"(?:^|/)(?P<visit>{PLAIN_NAME})/(?:(?P<kind>wav|flac)/(?P<id>{PLAIN_NAME})\.(?P=kind)"
    r"|etc/(?P<prompts>PROMPTS|prompts-original))$"
)
_LINK = re.compile(r"href\s*=\s*[\"']?([^\"'>\s]+\.(?:tgz|tar\.gz|zip))", re.IGNORECASE)


@dataclass(slots=True)
class _Visit:
    """What one archive holds: recordings by id, and texts by id from either table."""

    recordings: dict[str, Path] = field(default_factory=dict)
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)

    def texts(self) -> dict[str, str]:
        return {**self.prompts.get("prompts-original", {}), **self.prompts.get("PROMPTS", {})}


def bring(request: Request) -> Brought:
    """Bring VoxForge; see ``Corpus.bring``.

    ``source`` is a folder of archives, or of what they hold; an archive or its address; or the address of a page that
    links to archives, which ends in "/". Without one it is the page of the English recordings at 16 kHz, several
    thousand archives. From archives, recordings go to ``directory/wav/<archive>/`` as they are.

    Users have sent what they had: prompts that nobody read, recordings without a prompt, empty files. These are named
    in ``left-out.txt``. An archive that is damaged is refused. A folder's recording that cannot be read makes an
    utterance of no use.

    Raises:
        UserError: the source cannot be had, has nothing of VoxForge, or is damaged.
    """
    refuse_parts(request.parts, "VoxForge")
    directory, source = request.directory, request.source or ADDRESS
    places = _places(source, request.progress)
    if any(not place.is_dir() for place in places):
        make_audio_folder(directory)
    visits: dict[str, _Visit] = {}
    for done, place in enumerate(places, start=1):
        for member in members(place, _FILE, "VoxForge in its original layout"):
            _take(member, visits.setdefault(member.match["visit"], _Visit()), directory)
        request.progress(done, len(places))
    left_out: list[str] = []
    pairs = list(_pairs(visits, left_out))
    unpacked = {path for visit in visits.values() for path in visit.recordings.values() if directory in path.parents}
    durations = read_durations((path for path, _, _, _ in pairs), request.processes, request.progress)
    train = []
    for path, visit, name, text in pairs:
        duration = durations[path]
        if duration == UNREADABLE and path in unpacked:
            left_out.append(f"{visit}: {name}: is empty, or cannot be read as audio")
        else:
            unpacked.discard(path)
            audio = audio_filepath(path, directory)
            train.append(Utterance(f"{visit}-{name}", audio, duration, text, _speaker(visit)))
    for path in unpacked:
        path.unlink()
    if not train:
        raise UserError(
            f"data.source: found no recordings with texts in {source}. Expected archives or folders "
            "with wav/*.wav or flac/*.flac, and etc/PROMPTS or etc/prompts-original."
        )
    return Brought({"train": train}, left_out=left_out)


def _places(source: str, progress: Progress) -> list[Path]:
    """Return the archives and folders to read, fetched if need be."""
    if "://" in source:
        if not source.endswith("/"):
            return [download(source, progress)]
        links = sorted({urljoin(source, link) for link in _LINK.findall(download_page(source, progress))})
        if not links:
            raise UserError(f"data.source: {source} links to no archives (.tgz, .tar.gz, .zip). Check the address.")
        return download_all(links, progress)
    root = Path(source).expanduser()
    return [root] if not root.is_dir() else [*archives_in(root), root]


def _take(member: Member, visit: _Visit, directory: Path) -> None:
    match = member.match
    if match["prompts"]:
        visit.prompts[match["prompts"]] = _read_prompts(member.read())
        return
    if match["id"] in visit.recordings:
        raise UserError(f"{member.place}: is the second recording of {match['id']!r}. Expected one.")
    path = directory / "wav" / file_name(match["visit"]) / file_name(f"{match['id']}.{match['kind']}")
    visit.recordings[match["id"]] = member.lay(path)


def _read_prompts(content: bytes) -> dict[str, str]:
    """Return the texts by id; of ``*/mfc/a0001 TEXT`` the id is what stands behind the last "/"."""
    try:
        table = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        table = content.decode("latin-1")  # as browsers sent it, some years ago
    lines = [line.split() for line in table.split("\n")]
    return {identifier.rpartition("/")[2]: " ".join(words) for identifier, *words in filter(None, lines)}


def _pairs(visits: dict[str, _Visit], left_out: list[str]) -> Iterator[tuple[Path, str, str, str]]:
    """Yield the recording, archive, id and text of each utterance, and note what is without one of these."""
    for visit, found in sorted(visits.items()):
        texts = found.texts()
        for name, path in sorted(found.recordings.items()):
            if texts.get(name):
                yield path, visit, name, texts[name]
            else:
                left_out.append(f"{visit}: {name}: has no prompt")
        left_out += [f"{visit}: {name}: has no recording" for name in texts.keys() - found.recordings.keys()]


def _speaker(visit: str) -> str:
    """Return who recorded: the name before the date, but of an anonymous one, who may be anybody, the whole."""
    user = unquote(visit).partition("-")[0]
    return visit if user.lower() in ("", "anonymous") else user
