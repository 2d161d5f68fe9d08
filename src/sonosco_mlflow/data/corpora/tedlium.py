"""TED-LIUM: talks, of which each utterance is cut out by the times in its ``.stm`` file.

Release 3 in its original layout, ``data/{stm,sph}`` for training and ``legacy/{dev,test}/{stm,sph}``; releases 1 and 2,
``{train,dev,test}/{stm,sph}``, are read as well. Texts are as they stand there: lower-case, with ``<unk>`` for words
that nobody understood and a space before ``'s``.
"""

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path

from sonosco_mlflow.data.corpora.archives import PLAIN_NAME, members
from sonosco_mlflow.data.corpora.base import Brought, Request, make_audio_folder, some
from sonosco_mlflow.data.corpora.download import download
from sonosco_mlflow.data.corpora.recordings import in_parallel
from sonosco_mlflow.data.corpora.segments import Segment, cut_recording, lay_segments, segment_id
from sonosco_mlflow.data.corpora.splits import refuse_parts
from sonosco_mlflow.data.manifest import Utterance
from sonosco_mlflow.errors import UserError

ADDRESS = (
    "http://www.openslr.org/resources/51/TEDLIUM_release-3.tgz"
    "#sha256=ad1e454d14d1ad550bc2564c462d87c7a7ec83d4dc2b9210f22ab4973b9eccdb"
)

# The third release has another choice of talks, for experiments with adaptation, in folders of the same names.
_FOLDER = r"(?:^|/)(?<!speaker-adaptation/)(?:data|(?P<split>train|dev|test))/"
_FILE = re.compile(rf"{_FOLDER}(?P<kind>stm|sph)/(?P<talk>{PLAIN_NAME})\.(?P=kind)$")
_NOT_SPOKEN = "ignore_time_segment_in_scoring"
_EXPECTED = "TED-LIUM in its original layout"

_Talk = tuple[str, str]
"""The split and the name of a talk."""


def bring(request: Request) -> Brought:
    """Cut TED-LIUM's utterances into ``directory/wav/<talk>/``; see ``Corpus.bring``.

    ``source`` is a folder, an archive, or an address; without one it is that of the third release (50 GB). An archive
    is read twice, first the ``.stm`` files and then the talks, which are cut as they come, so that nothing but the
    utterances is written. Segments that are not spoken (``ignore_time_segment_in_scoring``) are dropped.

    Raises:
        UserError: the source cannot be had or is no TED-LIUM, a line cannot be read, or a talk is missing.
    """
    refuse_parts(request.parts, "TED-LIUM")
    source = request.source or ADDRESS
    place = download(source, request.progress) if "://" in source else Path(source).expanduser()
    talks = _read_talks(place)
    if not talks:
        raise UserError(f"data.source: {place} has no talks. Expected {_EXPECTED}: data/stm/*.stm")
    why: dict[str, str] = {}
    if place.is_dir():
        laid, why = lay_segments([segment for talk in talks.values() for segment in talk], request)
    else:
        make_audio_folder(request.directory)
        cuts = in_parallel(
            lambda talk: cut_recording(*talk, request.directory),
            _recordings(place, talks),
            len(talks),
            request.processes,
            request.progress,
        )
        laid = {utterance.id: utterance for utterances in cuts for utterance in utterances}
    given: dict[str, list[Utterance]] = {}
    for (split, _), segments in talks.items():
        given.setdefault(split, []).extend(laid[segment.id] for segment in segments)
    return Brought(given, why)


def _read_talks(place: Path) -> dict[_Talk, list[Segment]]:
    """Return what is said in each talk of which something is."""
    talks: dict[_Talk, list[Segment]] = {}
    recordings: set[_Talk] = set()
    for member in members(place, _FILE, _EXPECTED):
        talk = _talk(member.match)
        if member.match["kind"] == "sph":
            recordings.add(talk)
        # In the third release, legacy/train is data once more.
        elif talk not in talks:
            recording = Path(f"{talk[1]}.sph") if member.path is None else _beside(member.path)
            talks[talk] = _read_stm(member.text(), recording, member.place)
    silent = sorted(name for _, name in recordings - talks.keys())
    if silent:
        raise UserError(f"{place}: has talks without a transcript (stm/*.stm): {some(silent)}. Fetch it anew.")
    return {talk: segments for talk, segments in talks.items() if segments}


def _talk(match: re.Match[str]) -> _Talk:
    return match["split"] or "train", match["talk"]


def _beside(stm: Path) -> Path:
    return stm.parent.parent / "sph" / f"{stm.stem}.sph"


def _read_stm(table: str, recording: Path, place: str) -> list[Segment]:
    segments = []
    for number, line in enumerate(table.split("\n"), start=1):
        if not line.strip() or line.startswith(";;"):
            continue
        where = f"{place}:{number}"
        try:
            _, _, speaker, first, last, _, *words = line.split()
            start, end = float(first), float(last)
        except ValueError:
            start = end = math.nan
            words = []
        if words == [_NOT_SPOKEN]:
            continue
        if not words or not (0 <= start < end < math.inf):
            raise UserError(
                f"{where}: found {line.strip()[:80]!r}. Expected the talk, its channel, the speaker, where it begins "
                "and ends in seconds, a label, and what is said."
            )
        name = segment_id(recording.stem, start, end)
        segments.append(Segment(name, recording, " ".join(words), speaker, where, start, end))
    return segments


def _recordings(place: Path, talks: dict[_Talk, list[Segment]]) -> Iterator[tuple[io.BytesIO, list[Segment]]]:
    """Yield each talk's recording as bytes, with what is to be cut out of it."""
    missing = dict(talks)
    for member in members(place, _FILE, _EXPECTED):
        segments = missing.pop(_talk(member.match), None) if member.match["kind"] == "sph" else None
        if segments is not None:
            yield io.BytesIO(member.read()), segments
    if missing:
        raise UserError(f"{place}: has no recording (sph/*.sph) of these talks: {some([name for _, name in missing])}.")
