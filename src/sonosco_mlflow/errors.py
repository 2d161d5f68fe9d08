"""The two kinds of failure a reader meets: a mistake that they can mend, and a run that was stopped.

Every message of :class:`UserError` names the file, line or key, says what was found and what was expected, and
what to do next. The command line prints it alone, without a traceback, and ends with status 1.
"""

from collections.abc import Iterable
from difflib import get_close_matches

# A longer list hides the answer that it should give.
MOST_CHOICES = 12
# Digits of 64 bits.
LONGEST_NUMBER = 19


class UserError(Exception):
    """A mistake in the reader's input: a configuration key, a file, a command. The message is for them."""


def describe_failure(error: Exception) -> str:
    """Return the message of ``error`` for a reader, with its class where it is none of ours.

    It can be written anywhere: half characters, as in a file name that is no UTF-8, are spelled out.
    """
    message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return message.encode("utf-8", "backslashreplace").decode("utf-8")


def whole_number(found: object, place: str) -> int:
    """Return the whole number that ``found`` spells, which was read at ``place``.

    Raises:
        UserError: it spells none; the message begins with the place.
    """
    text = str(found)
    if not (text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER):
        raise UserError(f"{place} is {found!r}, expected a whole number")
    return int(text)


def require_positive(owner: str, **numbers: float | None) -> None:
    """Return if each of the named numbers is above 0, or None.

    Raises:
        UserError: one is not; the message names it and its ``owner``.
    """
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise UserError(f"{name} of {owner} is {number}, expected a number above 0")


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the clause that names the nearest valid choice and, where they are few, all of them.

    >>> nearest("tsd", ["tds", "las"])
    "did you mean 'tds'? Valid: las, tds"
    """
    valid = sorted(choices)
    matches = get_close_matches(word, valid, n=1, cutoff=0.5)
    suggestion = f"did you mean '{matches[0]}'? " if matches else ""
    return f"{suggestion}Valid: {', '.join(valid)}" if len(valid) <= MOST_CHOICES else suggestion.strip()
