"""From a document to its object: every tag checked, every name trusted, and nothing called but classes."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from enum import Enum
from typing import Any

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.documents import decode_scalar
from sonosco_mlflow.serialization.parameters import built_from, may_be_built

_TAGS = frozenset(
    [
        *("$external", "$tuple", "$set", "$frozenset", "$pairs", "$ordered"),
        *("$enum", "$name", "$partial", "$same", "$object"),
    ]
)


class Construction:
    """One document being built: which objects stand, and what is given anew.

    Args:
        document: the whole document.
        external: the objects that are given anew, by name.
        resolve: returns what a name stands for, if it is trusted.
        allow_changed: names of external objects that may have another digest.
    """

    def __init__(
        self,
        document: Any,
        external: Mapping[str, object],
        *,
        resolve: Callable[[str], Any],
        allow_changed: Set[str] = frozenset(),
    ) -> None:
        self._external = external
        self._resolve = resolve
        self._allow_changed = allow_changed
        self._definitions = _shared_documents(document)
        self._standing: dict[int, Any] = {}
        self._begun: set[int] = set()

    def value(self, document: Any) -> Any:
        """Return what ``document``, the whole or a part of it, describes.

        Raises:
            UserError: it is malformed, names what it may not, or an object given anew is missing or has changed.
            RecursionError: it is nested too deeply.
        """
        if isinstance(document, list):
            return [self.value(item) for item in document]
        if not isinstance(document, dict):
            return document
        tag = next((key for key in document if isinstance(key, str) and key.startswith("$")), None)
        if tag is None:
            if not all(isinstance(key, str) for key in document):
                raise UserError(f"the document has the keys {list(document)[:5]}, expected text")
            return {key: self.value(item) for key, item in document.items()}
        try:
            return self._tagged(tag, document)
        except TypeError as error:
            # What cannot be hashed, in a set or as a key.
            raise UserError(f"'{tag}' does not fit its value: {error}") from error

    def _tagged(self, tag: str, document: dict[str, Any]) -> Any:
        names = document.keys()
        match document:
            case {"$external": str(name)} if names <= {tag, "digest"}:
                return self._given_anew(name, document.get("digest"))
            case {"$tuple": list(items)} if len(names) == 1:
                return tuple(self.value(items))
            case {"$set": list(items)} if len(names) == 1:
                return set(self.value(items))
            case {"$frozenset": list(items)} if len(names) == 1:
                return frozenset(self.value(items))
            case {"$pairs": list(pairs)} if len(names) == 1:
                return self._mapping(tag, pairs)
            case {"$ordered": list(pairs)} if len(names) == 1:
                return OrderedDict(self._mapping(tag, pairs))
            case {"$enum": str(name), "name": str() as member} if len(names) == 2:
                return self._member(name, member, by_name=True)
            case {"$enum": str(name), "value": member} if len(names) == 2:
                return self._member(name, self.value(member), by_name=False)
            case {"$name": str(name)} if len(names) == 1:
                return self._resolve(name)
            case {"$partial": dict(function), "arguments": list(given), "keywords": list(pairs)} if len(names) == 3:
                return self._partial(self.value(function), self.value(given), self._mapping(tag, pairs))
            case {"$same": int(number)} if len(names) == 1 and number in self._definitions:
                return self.value(self._definitions[number])
            case {"$object": str(name), "parameters": dict(parameters)} if names <= {tag, "parameters", "shared"}:
                return (
                    self._shared(document["shared"], name, parameters)
                    if "shared" in names
                    else self._object(name, parameters)
                )
        if tag in _TAGS:
            raise UserError(f"'{tag}' does not fit what stands with it: {repr(document)[:200]}")
        return decode_scalar(tag, document)

    def _mapping(self, tag: str, pairs: list[Any]) -> dict[Any, Any]:
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise UserError(f"'{tag}' does not fit its value: expected pairs of key and value")
        built = {self.value(key): self.value(item) for key, item in pairs}
        if len(built) != len(pairs):
            raise UserError(f"'{tag}' does not fit its value: a key occurs twice")
        return built

    def _given_anew(self, name: str, digest: Any) -> Any:
        if name not in self._external:
            raise UserError(f"'{name}' must be given: it is not kept with the object")
        value = self._external[name]
        found = getattr(value, "digest", None)
        if digest is not None and found != digest and name not in self._allow_changed:
            raise UserError(
                f"'{name}' is not the one that was written: its digest is {str(found)[:12]}, expected "
                f"{str(digest)[:12]}. Give the same data, or pass allow_changed=['{name}'] to the Deserializer"
            )
        return value

    def _member(self, name: str, member: Any, *, by_name: bool) -> Any:
        target = self._class(name)
        if not issubclass(target, Enum):
            raise UserError(f"'{name}' is not an Enum")
        try:
            return target[member] if by_name else target(member)
        except (KeyError, ValueError) as error:
            raise UserError(f"'{name}' has no member {member!r}") from error

    @staticmethod
    def _partial(function: Any, arguments: list[Any], keywords: dict[Any, Any]) -> Any:
        if not callable(function) or not all(isinstance(key, str) for key in keywords):
            raise UserError("'$partial' does not fit its value: expected a function and keywords")
        return functools.partial(function, *arguments, **keywords)

    def _class(self, name: str) -> type[Any]:
        target = self._resolve(name)
        if not isinstance(target, type):
            raise UserError(f"'{name}' is not a class")
        return target

    def _shared(self, number: Any, name: str, parameters: dict[str, Any]) -> Any:
        if number not in self._standing:
            if number in self._begun:
                raise UserError(f"'$same': object {number} contains itself")
            self._begun.add(number)
            self._standing[number] = self._object(name, parameters)
        return self._standing[number]

    def _object(self, name: str, parameters: dict[str, Any]) -> Any:
        target = self._class(name)
        if not _may_be_built(target):
            raise UserError(
                f"'{name}' is not a class that documents may build; if it is yours, mark it @serializable and import it"
            )
        refused = sorted(parameters.keys() & getattr(target, "unwritten_parameters", frozenset()))
        if refused:
            raise UserError(f"{name} is never written with {refused}, which say where it acts: the document is forged")
        built = {key: self.value(item) for key, item in parameters.items()}
        try:
            return built_from(target, built)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{name} cannot be built from {sorted(built)}: {error}") from error


def _may_be_built(target: type[Any]) -> bool:
    if may_be_built(target):
        return True
    if not target.__module__.startswith("torch."):
        return False
    from sonosco_mlflow.serialization.torch_parameters import is_known

    return is_known(target)


def _shared_documents(document: Any) -> dict[int, dict[str, Any]]:
    """Return the documents of objects that are referred to elsewhere, by number. Without recursion: it may be deep."""
    found: dict[int, dict[str, Any]] = {}
    waiting = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            if "$object" in item and "shared" in item:
                number = item["shared"]
                if type(number) is not int or number in found:
                    raise UserError(f"'shared' is {number!r}, expected a number of its own")
                found[number] = item
            waiting.extend(item.values())
    return found
