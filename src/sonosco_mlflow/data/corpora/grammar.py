"""What the embedded corpus says, and whose voice says it: the data behind ``embedded.py``.

Every choice is drawn from a sha256 of where it stands (law 2: randomness is keyed), so that one speaker's
sentences do not depend on another's and no generator's version matters.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Choice = TypeVar("Choice")

_KEY = "sonosco embedded corpus, first edition"

DIGITS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
COMMANDS = (
    "TURN THE {room} LIGHT {switch}",
    "TURN THE VOLUME {direction}",
    "{move} THE {room} {opening}",
    "SET THE ALARM FOR {hour}",
    "PLAY THE {which} SONG",
    "WHAT IS THE {question} {day}",
    "CALL MY {person}",
)
CHOICES: dict[str, tuple[str, ...]] = {
    "room": ("KITCHEN", "BEDROOM", "GARDEN"),
    "switch": ("ON", "OFF"),
    "direction": ("UP", "DOWN"),
    "move": ("OPEN", "CLOSE"),
    "opening": ("DOOR", "WINDOW"),
    "hour": DIGITS[1:],
    "which": ("NEXT", "LAST"),
    "question": ("WEATHER", "TIME"),
    "day": ("TODAY", "TOMORROW"),
    "person": ("MOTHER", "BROTHER", "OFFICE"),
}

# Accents of English, by espeak-ng's names, dealt to the voices in turn.
_ACCENTS = (
    "en-us",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-us-nyc",
    "en-gb-x-gbcwmd",
    "en",
    "en-gb-x-gbclan",
    "en-029",
)
# Voice variants by split, none of them in two. Left out: those whose samples differ from process to process
# (Alicia, Demonic, f2, f3, f5, sandro, victor, whisper, whisperf), the robots, and the Klatt synthesiser's.
_VARIANTS = {
    "train": (
        *("Alex", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Jacky", "Mario", "Michael", "Mike"),
        *(
            "anika",
            "aunty",
            "belinda",
            "boris",
            "ed",
            "f1",
            "grandma",
            "gustave",
            "ian",
            "iven",
            "john",
            "linda",
        ),
        *("m1", "m2", "m3", "m5", "m7", "max", "paul", "quincy", "rob"),
    ),
    "dev": ("antonio", "f4", "m6", "norbert"),
    "test": ("m4", "pedro", "shelby", "steph", "travis"),
}
_UTTERANCES_PER_SPEAKER = {"train": 50, "dev": 30, "test": 32}

_WORDS_PER_MINUTE = (95, 155)
_PITCH = (30, 70)  # 50 is the voice's own


@dataclass(frozen=True, slots=True)
class Speaker:
    """A voice variant with an accent, and the split that alone hears it."""

    split: str
    accent: str
    variant: str

    @property
    def name(self) -> str:
        """The name in manifests and paths."""
        return f"{self.variant.lower()}-{self.accent}"


@dataclass(frozen=True, slots=True)
class Line:
    """One utterance to be spoken: id, upper-case text, words a minute, and espeak-ng's pitch (0 to 99)."""

    id: str
    text: str
    words_per_minute: int
    pitch: int


def speakers() -> list[Speaker]:
    """Return all speakers, in the order of the splits."""
    return [
        Speaker(split, _ACCENTS[index % len(_ACCENTS)], variant)
        for split, variants in _VARIANTS.items()
        for index, variant in enumerate(variants)
    ]


def lines(speaker: Speaker) -> list[Line]:
    """Return what ``speaker`` says, in the order in which it is said."""
    return [_line(f"{speaker.name}-{index:02}") for index in range(_UTTERANCES_PER_SPEAKER[speaker.split])]


def _line(identifier: str) -> Line:
    sentence = _digit_string if _draw(identifier, "kind", range(2)) else _command
    return Line(
        id=identifier,
        text=sentence(identifier),
        words_per_minute=_draw(identifier, "speed", range(*_WORDS_PER_MINUTE)),
        pitch=_draw(identifier, "pitch", range(*_PITCH)),
    )


def _digit_string(identifier: str) -> str:
    length = _draw(identifier, "length", range(2, 6))
    return " ".join(_draw(identifier, f"digit {place}", DIGITS) for place in range(length))


def _command(identifier: str) -> str:
    chosen = {slot: _draw(identifier, slot, words) for slot, words in CHOICES.items()}
    return _draw(identifier, "command", COMMANDS).format(**chosen)


def _draw(identifier: str, purpose: str, choices: Sequence[Choice]) -> Choice:
    digest = hashlib.sha256(f"{_KEY}\n{identifier}\n{purpose}".encode()).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]
