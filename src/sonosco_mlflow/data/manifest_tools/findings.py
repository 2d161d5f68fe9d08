"""A finding: what is wrong with one row of a manifest, where, and what to do."""

import json
from dataclasses import asdict, dataclass

CHECKS = {
    "row": "mend the line, or take it out",
    "id": "give each utterance an id of its own",
    "text": "write what is said, or take the row out",
    "short": "take the row out: in so short a time nobody says anything",
    "characters": "spell the text by the vocabulary, or make a vocabulary of this text",
    "speaker": "keep each speaker in one split: `sonosco manifest split` does",
    "same-audio": "keep one of the two",
    "file": "put the recording there, or correct 'audio_filepath'",
    "audio": "replace the recording by one that can be read, or take the row out",
    "duration": "correct 'duration', or replace the recording if it was cut off",
    "sample-rate": "resample the recording, or name its rate by --sample-rate",
    "channels": "mix the recording to so many channels, or name its number by --channels",
    "clipping": "record it anew at a lower level, or take the row out",
    "silence": "listen to it; take the row out if nothing is said",
}
"""What to do, by the name of the check that found something."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with the utterance ``id`` in a line of a manifest; of a line that is no row, the id is empty."""

    manifest: str
    line: int
    id: str
    check: str
    found: str

    @property
    def mend(self) -> str:
        """What to do."""
        return CHECKS[self.check]

    def to_json(self) -> str:
        """Return it as one line of JSON, for machines."""
        return json.dumps({**asdict(self), "mend": self.mend}, ensure_ascii=False)

    def __str__(self) -> str:
        return f"{self.manifest}:{self.line}: {self.id + ': ' if self.id else ''}{self.found}; {self.mend}"
