"""LibriSpeech: English audio books, read by volunteers; also Mini LibriSpeech, whose parts are small.

Read from the original layout, ``<part>/<speaker>/<chapter>/<id>.flac`` with ``<speaker>-<chapter>.trans.txt`` beside
it. The parts are those of the two releases, or any others in this layout that lie on the disk. Texts are upper-case.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sonosco_mlflow.data.corpora.archives import archives_in, members
from sonosco_mlflow.data.corpora.base import Brought, Progress, Request, make_audio_folder, some
from sonosco_mlflow.data.corpora.download import download, download_all
from sonosco_mlflow.data.corpora.recordings import audio_filepath, read_durations
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class _Release:
    """Where a part is published: the folder, the archive's digest as the server states it, and its utterances."""

    folder: str
    digest: str
    utterances: int


_LARGE, _MINI = "http://www.openslr.org/resources/12/", "http://www.openslr.org/resources/31/"
_RELEASES = {
    "train-clean-100": _Release(
        _LARGE, "sha256=d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2", 28539
    ),
    "train-clean-360": _Release(
        _LARGE, "sha256=146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf", 104014
    ),
    "train-other-500": _Release(
        _LARGE, "sha256=ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2", 148688
    ),
    "dev-clean": _Release(_LARGE, "sha256=76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3", 2703),
    "dev-other": _Release(_LARGE, "sha256=12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365", 2864),
    "test-clean": _Release(_LARGE, "sha256=39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23", 2620),
    "test-other": _Release(_LARGE, "sha256=d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29", 2939),
    "train-clean-5": _Release(_MINI, "md5=5df7d4e78065366204ca6845bb08f490", 1519),
    "dev-clean-2": _Release(_MINI, "md5=6d7ab67ac6a1d2c993d050e16d61080d", 1089),
}
_OWN_CHOICE = {"train": ["train-clean-100"], "dev": ["dev-clean"], "test": ["test-clean"]}
_FILE = re.compile(
    r"(?:^|/)(?P<part>[\w-]+)/(?P<speaker>\d+)/(?P<chapter>\d+)/"
    r"(?P<id>(?P=speaker)-(?P=chapter)(?:-\d+)?)\.(?P<kind>flac|trans\.txt)$"
)


@dataclass(slots=True)
class _Part:
    """What was found of a part, by id."""

    recordings: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def bring(request: Request) -> Brought:
    """Bring parts of LibriSpeech, by default the clean ones with 100 hours for training; see ``Corpus.bring``.

    ``source`` is the folder of a mirror, an address that ends in "/" and has ``<part>.tar.gz``; an archive or its
    address; or a folder with the archives of the parts, or with the parts themselves. Without one the archives come
    from where they are published, by their digests. From an archive, flac files go to ``directory/wav/<speaker>/`` as
    they are. Of a part that was published, the number of utterances is checked.

    Raises:
        UserError: a part cannot be had, has recordings without texts or the reverse, or is incomplete.
    """
    chosen = request.parts or _OWN_CHOICE
    names = [name for split in chosen.values() for name in split]
    found = {name: _Part() for name in names}
    places = _places(request.source, names, request.progress)
    if any(not place.is_dir() for place in places):
        make_audio_folder(request.directory)
    for place, wanted in places.items():
        _read(place, {name: found[name] for name in wanted}, request)
    for name, part in found.items():
        _require_whole(name, part, ", ".join(str(place) for place, wanted in places.items() if name in wanted))
    durations = read_durations(
        (path for part in found.values() for path in part.recordings.values()), request.processes, request.progress
    )
    given: dict[str, list[Utterance]] = {split: [] for split in chosen}
    for split, parts_of_split in chosen.items():
        for name in parts_of_split:
            texts = found[name].texts
            for identifier, path in found[name].recordings.items():
                audio, speaker = audio_filepath(path, request.directory), identifier.partition("-")[0]
                given[split].append(Utterance(identifier, audio, durations[path], texts[identifier], speaker))
    return Brought(given)


def _places(source: str | None, names: list[str], progress: Progress) -> dict[Path, list[str]]:
    """Return archives and folders, fetched if need be, with the parts that are to be read from each."""
    if source is None or ("://" in source and source.endswith("/")):
        archives = download_all([_address(name, source) for name in names], progress)
        return {archive: [name] for archive, name in zip(archives, names, strict=True)}
    if "://" in source:
        return {download(source, progress): names}
    root = Path(source).expanduser()
    if not root.is_dir():
        return {root: names}
    places = {path: [path.name.partition(".")[0]] for path in archives_in(root) if path.name.partition(".")[0] in names}
    packed = {name for wanted in places.values() for name in wanted}
    unpacked = [name for name in names if name not in packed]
    return places | ({root: unpacked} if unpacked else {})


def _address(name: str, mirror: str | None) -> str:
    release = _RELEASES.get(name)
    if release is None:
        if mirror is None:
            raise UserError(f"data.parts: found {name!r}, which is no part of LibriSpeech: {nearest(name, _RELEASES)}")
        return f"{mirror}{name}.tar.gz"
    return f"{mirror or release.folder}{name}.tar.gz#{release.digest}"


def _read(place: Path, found: Mapping[str, _Part], request: Request) -> None:
    total = sum(_RELEASES[name].utterances for name in found if name in _RELEASES)
    done = 0
    for member in members(place, _FILE, "LibriSpeech in its original layout"):
        match = member.match
        part = found.get(match["part"])
        if part is None:
            continue
        if match["kind"] == "flac":
            if match["id"] in part.recordings:
                raise UserError(f"{member.place}: is the second recording of {match['id']!r}. Expected one.")
            path = request.directory / "wav" / match["speaker"] / f"{match['id']}.flac"
            part.recordings[match["id"]] = member.lay(path)
            done += 1
            if total:
                request.progress(done, max(done, total))
        else:
            part.texts |= _read_transcripts(member.text(), member.place)


def _read_transcripts(table: str, place: str) -> dict[str, str]:
    texts = {}
    for number, line in enumerate(table.split("\n"), start=1):
        identifier, *words = line.split() or [""]
        if identifier and not words:
            raise UserError(f"{place}:{number}: found {line.strip()[:80]!r}. Expected an id and what is said.")
        texts[identifier] = " ".join(words)
    texts.pop("", None)
    return texts


def _require_whole(name: str, part: _Part, where: str) -> None:
    if not part.recordings and not part.texts:
        raise UserError(
            f"data.parts: {where} has no part {name!r}. Expected {name}/<speaker>/<chapter>/*.flac; give the folder "
            "or archive that has it, or name the parts that are there: data.parts.train=[NAME]"
        )
    without_text = sorted(part.recordings.keys() - part.texts.keys())
    without_audio = sorted(part.texts.keys() - part.recordings.keys())
    for what, missing in {"a text": without_text, "a recording": without_audio}.items():
        if missing:
            raise UserError(f"{where}: these utterances of {name} are without {what}: {some(missing)}. Fetch it anew.")
    expected = _RELEASES[name].utterances if name in _RELEASES else len(part.recordings)
    if len(part.recordings) != expected:
        raise UserError(
            f"{where}: {name} has {len(part.recordings)} utterances. Expected {expected}: this is not the whole part. "
            "Fetch it anew, or give a part of your own another name."
        )
