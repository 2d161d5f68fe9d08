"""Serializer and Deserializer: objects as the classes and parameters that make them again.

A class marked ``@serializable`` remembers the parameters that its constructor was given. The Serializer writes
them down, nested, as JSON, and the Deserializer builds the same object from that, without any code of the user's:

>>> @serializable
... class Smoother:
...     def __init__(self, window: int = 3) -> None:
...         self.window = window
>>> document = Serializer().describe(Smoother(5))
>>> Deserializer().build(document).window
5

Nothing is pickled. A class or function is named as ``module:qualified.name``, and only these are ever built or
imported: what is marked ``@serializable`` (callbacks are by themselves), this package,
``torch.nn`` and ``torch.optim``, the script that is running, and modules that the reader trusts by name.
"""

import functools
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, cast

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import constructor_parameters, qualified_name, registered

_TRUSTED = ("sonosco_mlflow", "torch.nn", "torch.optim", "__main__")


class Serializer:
    """Writes objects down as JSON documents.

    A class may name those of its parameters that are given anew when it is read (data loaders), as
    ``external_parameters``; wherever inside the object they occur, their name stands for them.

    Args:
        external: further objects that are given anew, by name.
    """

    def __init__(self, external: Mapping[str, object] | None = None) -> None:
        self._external = {id(value): name for name, value in (external or {}).items() if value is not None}

    def serialize(self, value: Any, path: str | Path, step: int = 0, digests: Mapping[str, str] | None = None) -> Path:
        """Write ``value`` and its state as a checkpoint under ``path``, and return the checkpoint's directory.

        Args:
            value: what is written; its state is what ``value.state_dict()`` returns, if it has one.
            path: folder of checkpoints.
            step: how far the state has come; it names the checkpoint.
            digests: of what the state belongs to.

        Raises:
            UserError: something in ``value`` cannot be written down.
        """
        # Imported here: marking a class as serialisable should not cost torch.
        from sonosco_mlflow.serialization.checkpoint import write_checkpoint

        state = value.state_dict() if hasattr(value, "state_dict") else {}
        return write_checkpoint(Path(path), step, self.describe(value), _parts(state), digests)

    def describe(self, value: Any, path: str = "") -> Any:
        """Return the JSON document of ``value``.

        Raises:
            UserError: ``value``, or something in it, cannot be written down; the message gives its path and a remedy.
        """
        if id(value) in self._external:
            return {"$external": self._external[id(value)]}
        if value is None or isinstance(value, bool | str):
            return value
        match value:
            case Enum():
                return {"$enum": qualified_name(type(value)), "name": value.name}
            case int():
                return int(value)
            case float():
                return value if value - value == 0 else {"$float": repr(value)}
            case Path():
                return {"$path": value.as_posix()}
            case list():
                return self._each(value, path)
            case tuple():
                return {"$tuple": self._each(value, path)}
            case set() | frozenset():
                return {f"${type(value).__name__}": self._each(sorted(value), path)}
            case Mapping():
                return self._describe_mapping(value, path)
            case type() | types.FunctionType() | types.BuiltinFunctionType():
                return {"$name": _importable_name(value, path)}
        torch_value = _torch_value(value)
        if torch_value is not None:
            return torch_value
        name = _importable_name(type(value), path)
        try:
            parameters = constructor_parameters(value)
        except (UserError, ValueError) as error:
            raise UserError(f"{path or 'the object'}: {error}") from error
        anew = {key: parameters[key] for key in getattr(value, "external_parameters", ())}
        inner = self._knowing(anew) if anew else self
        described = {key: inner.describe(item, f"{path}.{key}" if path else key) for key, item in parameters.items()}
        return {"$object": name, "parameters": described}

    def _knowing(self, external: Mapping[str, object]) -> "Serializer":
        serializer = Serializer(external)
        serializer._external |= self._external
        return serializer

    def _each(self, values: Iterable[Any], path: str) -> list[Any]:
        return [self.describe(item, f"{path}[{i}]") for i, item in enumerate(values)]

    def _describe_mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self.describe(item, f"{path}.{key}") for key, item in value.items()}
        pairs = [[self.describe(key, path), self.describe(item, f"{path}[{key!r}]")] for key, item in value.items()]
        return {"$pairs": pairs}


def _parts(state: Mapping[str, object]) -> Mapping[str, object]:
    """Return ``state`` as parts with a file each: its entries where all are trees themselves, else the whole."""
    parted = all(name.isidentifier() and isinstance(entry, Mapping) for name, entry in state.items())
    return state if parted and state.keys() != {"state"} else {"state": state}


def _torch_value(value: Any) -> Any:
    # Without importing torch: where it has not been imported, no value can be torch's.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.device):
        return {"$device": str(value)}
    if torch is not None and isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    return None


def _importable_name(target: Any, path: str) -> str:
    name = qualified_name(target)
    if "<lambda>" in name or "<locals>" in name:
        kind = "lambda" if "<lambda>" in name else "local function or class"
        raise UserError(
            f"{path or 'the object'} is a {kind} ({name}), which cannot be found again by name; "
            "define it at the top level of a module"
        )
    return name


class Deserializer:
    """Builds objects from the documents of a :class:`Serializer`.

    Args:
        trusted: names of further modules (their submodules included) that may be imported.
        fetch: brings what a URI (``runs:/...``) names to this machine and returns its folder.
    """

    def __init__(self, trusted: Iterable[str] = (), fetch: Callable[[str], Path] | None = None) -> None:
        self.trusted = (*_TRUSTED, *trusted)
        self.fetch = fetch

    def deserialize(self, path: str | Path, **external: object) -> Any:
        """Return the object that a :class:`Serializer` wrote, with all its state.

        Args:
            path: a checkpoint, a folder of checkpoints (the newest whole one is read), or a URI.
            external: the objects that are given anew, by name.

        Raises:
            UserError: there is no whole checkpoint, the object cannot be built, or an external object is missing.
        """
        from sonosco_mlflow.serialization.checkpoint import read_newest_checkpoint

        checkpoint = read_newest_checkpoint(self._local(path))
        value = self.build(checkpoint.objects, **external)
        if hasattr(value, "load_state_dict"):
            state = checkpoint.state
            value.load_state_dict(state["state"] if state.keys() == {"state"} else state)
        return value

    def build(self, document: Any, **external: object) -> Any:
        """Return the object of ``document``, with ``external`` objects in their places.

        Raises:
            UserError: the document names something that is not trusted or does not exist, or lacks an external object.
        """
        if isinstance(document, list):
            return [self.build(item, **external) for item in document]
        if not isinstance(document, dict):
            return document
        match document:
            case {"$external": str(name)}:
                if name not in external:
                    raise UserError(f"'{name}' must be given: it is not kept with the object")
                return external[name]
            case {"$float": str(text)}:
                return float(text)
            case {"$path": str(text)}:
                return Path(text)
            case {"$tuple": list(items)}:
                return tuple(self.build(items, **external))
            case {"$set": list(items)}:
                return set(self.build(items, **external))
            case {"$frozenset": list(items)}:
                return frozenset(self.build(items, **external))
            case {"$pairs": list(pairs)}:
                return {self.build(key, **external): self.build(item, **external) for key, item in pairs}
            case {"$enum": str(name), "name": str(member)}:
                return self._class(name, Enum)[member]
            case {"$device": str(text)}:
                return _torch().device(text)
            case {"$dtype": str(text)}:
                return self._dtype(text)
            case {"$name": str(name)}:
                return self.resolve(name)
            case {"$object": str(name), "parameters": dict(parameters)}:
                return self._object(name, parameters, external)
        return {key: self.build(item, **external) for key, item in document.items()}

    def resolve(self, name: str) -> Any:
        """Return the class or function called ``module:qualified.name``.

        Raises:
            UserError: it is neither registered nor in a trusted module, or it does not exist.
        """
        known = registered(name)
        if known is not None:
            return known
        module_name, _, qualified = name.partition(":")
        if not any(module_name == root or module_name.startswith(root + ".") for root in self.trusted):
            raise UserError(
                f"'{name}' is not trusted; if it is yours, import its module and mark it @serializable, "
                f"or pass trusted=['{module_name}'] to the Deserializer"
            )
        try:
            target = functools.reduce(getattr, qualified.split("."), cast(Any, importlib.import_module(module_name)))
        except (ImportError, AttributeError) as error:
            raise UserError(f"'{name}' does not exist: {error}") from error
        # A module also holds what it imported; only what it defines is its own.
        if getattr(target, "__module__", None) != module_name or not isinstance(
            target, type | types.FunctionType | types.BuiltinFunctionType
        ):
            raise UserError(f"'{name}' is not a class or function that {module_name} defines")
        return target

    def _local(self, path: str | Path) -> Path:
        if isinstance(path, Path) or not re.match(r"[a-z][a-z0-9+.-]+:/", path):
            return Path(path)
        if self.fetch is None:
            raise UserError(f"'{path}' is not on this machine; give the Deserializer a way to fetch it, or a folder")
        return self.fetch(path)

    def _class(self, name: str, base: type[Any]) -> Any:
        target = self.resolve(name)
        if not (isinstance(target, type) and issubclass(target, base)):
            raise UserError(f"'{name}' is not a {base.__name__}")
        return target

    def _object(self, name: str, parameters: dict[str, Any], external: dict[str, object]) -> Any:
        target = self._class(name, object)
        built = {key: self.build(item, **external) for key, item in parameters.items()}
        try:
            return target(**built)
        except TypeError as error:
            raise UserError(f"{name} cannot be built from {sorted(built)}: {error}") from error

    @staticmethod
    def _dtype(text: str) -> Any:
        dtype = getattr(_torch(), text, None)
        if not isinstance(dtype, _torch().dtype):
            raise UserError(f"'{text}' is not a torch dtype")
        return dtype


def _torch() -> Any:
    return importlib.import_module("torch")
