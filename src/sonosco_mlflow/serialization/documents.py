"""Values as JSON: what a document's tags mean, for every kind of value that is neither an object nor a name.

==================  =====================================================================
``$float``          ``"nan"``, ``"inf"`` or ``"-inf"``
``$bytes``          base64
``$path``           a path as text, with slashes
``$range``          start, stop and step
``$numpy``          a numpy number: its type, with ``value``
``$device``         a torch device
``$dtype``          a torch dtype
``$tuple``          a list; so ``$set`` and ``$frozenset``, in the order of their documents
``$pairs``          a dict whose keys are not plain strings in sorted order
``$ordered``        the pairs of an OrderedDict
==================  =====================================================================

The serializer adds ``$enum``, ``$name``, ``$partial``, ``$object``, ``$same`` and ``$external``. A type that is not
among them is refused: a subclass would come back as its base, which is another value.
"""

import base64
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sonosco_mlflow.errors import UserError

# Containers within containers; further in, what can be written could not be read again.
DEEPEST = 100
# Python reads no more than 4,300 digits.
_MOST_BITS = 14_000
_NUMPY = frozenset(
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
)


def is_text(value: str) -> bool:
    """Return whether ``value`` can be written as UTF-8: half a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_readable(value: int) -> bool:
    """Return whether Python reads ``value`` again from text."""
    return value.bit_length() <= _MOST_BITS


def encode_scalar(value: Any) -> Any:
    """Return the document of a value that holds no other values, or None where it is no such value.

    Raises:
        UserError: it cannot be written; the message is the end of a sentence about it.
    """
    kind = type(value)
    if kind is bool:
        return value
    if kind is str:
        if not is_text(value):
            raise UserError(f"is {value!r}, which is not valid Unicode")
        return value
    if kind is int:
        if not is_readable(value):
            raise UserError(f"is a number of {value.bit_length()} bits, expected at most {_MOST_BITS}")
        return value
    if kind is float:
        return value if value - value == 0 else {"$float": repr(value)}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is range:
        return {"$range": [encode_scalar(number) for number in (value.start, value.stop, value.step)]}
    if kind is type(Path()):
        return {"$path": encode_scalar(value.as_posix())}
    return _encode_number_of_numpy(value) or _encode_value_of_torch(value)


def _encode_number_of_numpy(value: Any) -> Any:
    # Without importing numpy: where it has not been imported, no value can be numpy's.
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic) or value.dtype.name not in _NUMPY:
        return None
    return {"$numpy": value.dtype.name, "value": encode_scalar(value.item())}


def _encode_value_of_torch(value: Any) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.device):
        return {"$device": str(value)}
    if torch is not None and isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    return None


def decode_scalar(tag: str, document: dict[str, Any]) -> Any:
    """Return the value of a tagged ``document`` that holds no other values.

    Raises:
        UserError: ``tag`` is unknown, or what stands with it does not fit.
    """
    decode = _DECODERS.get(tag)
    if decode is None:
        raise UserError(f"'{tag}' is not a tag of this version; use the version that wrote it")
    try:
        if document.keys() != ({tag, "value"} if tag == "$numpy" else {tag}):
            raise ValueError(f"there are {sorted(document)}")
        return decode(document[tag], document.get("value"))
    except (ValueError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        shown = repr(document[tag])
        raise UserError(f"'{tag}' does not fit its value {shown[:100]}: {error}") from error


def _float(content: Any, _: Any) -> float:
    if content not in ("nan", "inf", "-inf"):
        raise ValueError("expected nan, inf or -inf")
    return float(content)


def _range(content: Any, _: Any) -> range:
    if not isinstance(content, list) or len(content) != 3:
        raise ValueError("expected start, stop and step")
    return range(*content)


def _numpy_number(content: Any, value: Any) -> Any:
    if content not in _NUMPY:
        raise ValueError(f"expected one of {sorted(_NUMPY)}")
    number = decode_scalar("$float", value) if isinstance(value, dict) else value
    if not isinstance(number, bool | int | float):
        raise TypeError("expected a number")
    numpy = importlib.import_module("numpy")
    decoded = numpy.dtype(content).type(number)
    if decoded.item() != number and number == number:
        raise ValueError(f"{number} is no {content}")
    return decoded


def _dtype(content: Any, _: Any) -> Any:
    torch = importlib.import_module("torch")
    dtype = vars(torch).get(_text(content))
    if not isinstance(dtype, torch.dtype):
        raise ValueError("is not a torch dtype")
    return dtype


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise TypeError("expected text")
    return content


_DECODERS: dict[str, Callable[[Any, Any], Any]] = {
    "$float": _float,
    "$bytes": lambda content, _: base64.b64decode(_text(content), validate=True),
    "$path": lambda content, _: Path(_text(content)),
    "$range": _range,
    "$numpy": _numpy_number,
    "$device": lambda content, _: importlib.import_module("torch").device(_text(content)),
    "$dtype": _dtype,
}


def order_of(document: Any) -> str:
    """Return what documents of unordered values are sorted by: their canonical text."""
    return json.dumps(document, sort_keys=True)
