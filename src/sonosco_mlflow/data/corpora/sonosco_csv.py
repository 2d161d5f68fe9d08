"""Sonosco's manifests: a line is the path of a recording and the path of its transcript, between commas.

``create_manifest`` wrote absolute paths and, later, the duration in seconds as a third field; it is not used, because
the recording's own header says it. There is no header line. Speakers are not known.
"""

from pathlib import Path

from sonosco_mlflow.data.corpora.base import Brought, Request
from sonosco_mlflow.data.corpora.listed import ListFormat, locate, read_lines
from sonosco_mlflow.data.corpora.segments import Segment
from sonosco_mlflow.data.manifest import UNKNOWN_SPEAKER
from sonosco_mlflow.errors import UserError


def bring(request: Request) -> Brought:
    """Describe what Sonosco's manifests name; see ``Corpus.bring``.

    ``source`` is a ``.csv``, or a folder with ``train.csv``, ``dev.csv``, ``test.csv`` or those that ``parts`` names.

    Raises:
        UserError: no source, a line of another form, or a transcript that is not there.
    """
    return _FORMAT.bring(request)


def _read(path: Path) -> list[Segment]:
    segments = []
    for place, line in read_lines(path):
        fields = [text.strip() for text in line.split(",")]
        if len(fields) not in (2, 3) or not all(fields[:2]):
            raise UserError(
                f"{place}: found {line[:80]!r}. Expected 'recording,transcript' or 'recording,transcript,seconds'; "
                "paths with a comma cannot be told apart."
            )
        recording, transcript = (locate(name, path.parent) for name in fields[:2])
        segments.append(Segment(recording.stem, recording, _read_text(transcript, place), UNKNOWN_SPEAKER, place))
    return segments


def _read_text(transcript: Path, place: str) -> str:
    try:
        return transcript.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{transcript}: found bytes that are not UTF-8. Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{place}: the transcript {transcript} cannot be read ({error.strerror or error}).") from error


_FORMAT = ListFormat(
    name="manifest of Sonosco",
    forms=("{}.csv",),
    is_list=lambda path: path.suffix == ".csv" and path.is_file(),
    read=_read,
)
