"""From an object to its document: one walk through everything that it was made of."""

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from enum import Enum, Flag
from typing import Any

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.documents import DEEPEST, encode_scalar, is_text, order_of
from sonosco_mlflow.serialization.names import importable_name
from sonosco_mlflow.serialization.parameters import constructor_parameters, remembered_parameters


def external_objects(objects: Mapping[str, object]) -> dict[int, tuple[str, object]]:
    """Return ``objects`` by id, save the plain values: they cannot be told from others that are equal."""
    return {
        id(value): (name, value)
        for name, value in objects.items()
        if value is not None and not isinstance(value, bool | int | float | str)
    }


class Description:
    """One document in the making: which objects have been met, and which names stand for objects given anew.

    Args:
        external: names of the objects that are given anew, by id (:func:`external_objects`).
    """

    def __init__(self, external: Mapping[int, tuple[str, object]]) -> None:
        self._external = dict(external)
        # By id: the object, so that its id stays its own, and its document; None while that is being made.
        self._met: dict[int, tuple[object, dict[str, Any] | None]] = {}
        self._shared = 0
        self._depth = 0

    def document(self, value: Any, path: str) -> Any:
        """Return the document of ``value``, which lies at ``path``.

        Raises:
            UserError: something cannot be written down; the message gives its path and a remedy.
        """
        if id(value) in self._external:
            return _external_document(*self._external[id(value)])
        try:
            scalar = None if value is None else encode_scalar(value)
            if value is None or scalar is not None:
                return scalar
            if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
                return {"$name": importable_name(value)}
        except UserError as error:
            raise _refused(path, error) from error
        if self._depth == DEEPEST:
            raise UserError(f"{path[:200]}...: is nested more than {DEEPEST} deep, or contains itself")
        self._depth += 1
        try:
            return self._compound(value, path)
        finally:
            self._depth -= 1

    def _compound(self, value: Any, path: str) -> Any:
        kind = type(value)
        if isinstance(value, Enum):
            # A combination of flags need not have a name.
            key, content = ("value", value.value) if isinstance(value, Flag) else ("name", value.name)
            return {"$enum": _name(kind, path), key: self.document(content, path)}
        if kind is list:
            return self._each(value, path)
        if kind is tuple:
            return {"$tuple": self._each(value, path)}
        if kind in (set, frozenset):
            # In an order that does not depend on this process, and before anything is counted as met.
            texts = {id(item): order_of(Description(self._external).document(item, path)) for item in value}
            return {f"${kind.__name__}": self._each(sorted(value, key=lambda item: texts[id(item)]), path)}
        if kind is dict:
            keys = list(value)
            if all(type(key) is str and is_text(key) and not key.startswith("$") for key in keys) and keys == sorted(
                keys
            ):
                return {key: self.document(item, f"{path}.{key}" if path else key) for key, item in value.items()}
            return {"$pairs": self._pairs(value, path)}
        if kind is OrderedDict:
            return {"$ordered": self._pairs(value, path)}
        if kind is functools.partial:
            return {
                "$partial": self.document(value.func, f"{path}.func"),
                "arguments": self._each(value.args, f"{path}.args"),
                "keywords": self._pairs(value.keywords, path),
            }
        return self._object(value, path)

    def _each(self, values: Iterable[Any], path: str) -> list[Any]:
        return [self.document(item, f"{path}[{i}]") for i, item in enumerate(values)]

    def _pairs(self, value: Mapping[Any, Any], path: str) -> list[Any]:
        return [[self.document(key, path), self.document(item, f"{path}[{key!r}]")] for key, item in value.items()]

    def _object(self, value: Any, path: str) -> Any:
        if id(value) in self._met:
            _, document = self._met[id(value)]
            if document is None:
                raise UserError(f"{path or 'the object'}: contains itself")
            if "shared" not in document:
                self._shared += 1
                document["shared"] = self._shared
            return {"$same": document["shared"]}
        self._met[id(value)] = (value, None)
        try:
            name = importable_name(type(value))
            parameters = _parameters(value)
        except (UserError, ValueError) as error:
            raise _refused(path, error) from error
        before = self._external
        anew = {key: parameters[key] for key in getattr(value, "external_parameters", ())}
        self._external = {**external_objects(anew), **before}
        # By name, as the file has them: the numbers of shared objects must not depend on the order of keywords.
        described = {
            key: self.document(parameters[key], f"{path}.{key}" if path else key) for key in sorted(parameters)
        }
        self._external = before
        document = {"$object": name, "parameters": described}
        self._met[id(value)] = (value, document)
        return document


def _external_document(name: str, value: object) -> dict[str, str]:
    digest = getattr(value, "digest", None)
    return {"$external": name, "digest": digest} if isinstance(digest, str) else {"$external": name}


def _parameters(value: Any) -> dict[str, Any]:
    parameters = remembered_parameters(value)
    if parameters is None and "torch" in sys.modules:
        # Imported here: without torch there are no objects of torch's.
        from sonosco_mlflow.serialization.torch_parameters import torch_parameters

        parameters = torch_parameters(value)
    parameters = constructor_parameters(value) if parameters is None else parameters
    if not all(isinstance(key, str) and is_text(key) for key in parameters):
        raise UserError(f"serialized_parameters() gave {list(parameters)}, expected names")
    return parameters


def _name(target: Any, path: str) -> str:
    try:
        return importable_name(target)
    except UserError as error:
        raise _refused(path, error) from error


def _refused(path: str, error: Exception) -> UserError:
    # Some messages are sentences about the place, others stand for themselves.
    text = str(error)
    joint = " " if text.startswith("is ") else ": "
    return UserError(f"{path or 'the object'}{joint}{text}")
