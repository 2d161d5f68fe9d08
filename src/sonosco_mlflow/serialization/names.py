"""Classes and functions by name: ``module:qualified.name``.

A name is written only where it leads back to the very same object, and followed only to what a document may mean: a
class or function that is marked ``@serializable``, or that a trusted module defines. Nothing is called here.
"""

import importlib
import inspect
import sys
import types
from collections.abc import Iterable
from enum import Enum
from typing import Any

from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.parameters import may_be_built, qualified_name, registered

# Modules that are trusted without being asked for.
PACKAGE = "sonosco_mlflow"
_KERNELS = "torch._C._nn"  # where some functions of torch.nn.functional come from
_TRUSTED = (PACKAGE, "torch.nn", "torch.optim", "__main__", "builtins", _KERNELS)
# All functions of these may be passed as parameters; of the rest of this package only those that are marked.
_FUNCTIONS = (f"{PACKAGE}.metrics", f"{PACKAGE}.training.validation")
_BUILTINS = {bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset}


def importable_name(target: Any) -> str:
    """Return the name by which ``target``, a class, a function or a bound class method, is found again.

    Raises:
        UserError: there is none; the message says what ``target`` is and what to do.
    """
    if isinstance(target, types.MethodType | types.BuiltinMethodType) and not isinstance(
        target.__self__, type | types.ModuleType | None
    ):
        raise UserError(
            f"is a method of an object ({target.__qualname__}), which has no name of its own; give the object itself "
            "with a __call__, or a function at the top level of a module"
        )
    if isinstance(target, types.MethodType):
        name = f"{qualified_name(target.__self__)}.{target.__name__}"
    else:
        name = qualified_name(target)
    if "<lambda>" in name or "<locals>" in name:
        kind = "lambda" if "<lambda>" in name else "local function or class"
        raise UserError(
            f"is a {kind} ({name}), which cannot be found again by name; define it at the top level of a module"
        )
    known = registered(name)
    module_name, _, qualified = name.partition(":")
    found = known if known is not None else _follow(sys.modules.get(module_name), qualified)
    if found != target:
        what = "nothing" if found is None else "something else"
        raise UserError(
            f"is called {name}, but that name leads to {what}; it was replaced or removed since, or is hidden by a "
            "decorator. Use what stands in the module now, or give it a name of its own there"
        )
    if module_name == "builtins" and target not in _BUILTINS:
        raise UserError(f"is {name}, which a document may not name; wrap it in a function of your own module")
    return name


def resolve(name: str, trusted: Iterable[str]) -> Any:
    """Return the class or function called ``name``.

    Args:
        name: ``module:qualified.name``.
        trusted: modules that the reader trusts, their submodules included.

    Raises:
        UserError: it is neither registered nor in a trusted module, it does not exist, or it is nothing that a document
            may name.
    """
    known = registered(name) or _method_of_registered(name)
    if known is not None:
        return known
    module_name, _, qualified = name.partition(":")
    is_trusted_by_reader = _lies_in(module_name, trusted)
    if not is_trusted_by_reader and not _lies_in(module_name, _TRUSTED):
        raise UserError(
            f"'{name}' is not trusted; if it is yours, import its module and mark it @serializable, "
            f"or pass trusted=['{module_name}'] to the Deserializer"
        )
    is_private_of_torch = module_name.startswith("torch.") and any(
        part.startswith("_") for part in name.removeprefix(f"{_KERNELS}:").replace(":", ".").split(".")
    )
    if is_private_of_torch and not is_trusted_by_reader:
        raise UserError(f"'{name}' is private to torch, and may do anything; a document may not name it")
    if any(part.startswith("__") for part in name.replace(":", ".").split(".")[1:]):
        raise UserError(f"'{name}' is not a class or function that a document may name")
    try:
        target = _follow(importlib.import_module(module_name), qualified)
    except (ImportError, ValueError) as error:
        raise UserError(f"'{name}' does not exist: {error}") from error
    if target is None:
        raise UserError(f"'{name}' does not exist: {module_name} has no {qualified or 'name'}")
    # A module also holds what it imported; only what it defines is its own.
    owner = target.__self__ if isinstance(target, types.MethodType) else target
    if not isinstance(target, _KINDS) or owner.__module__ != module_name:
        raise UserError(f"'{name}' is not a class or function that {module_name} defines")
    if not is_trusted_by_reader and not _is_harmless(owner, module_name):
        raise UserError(
            f"'{name}' is not a class or function that {module_name} offers to documents; if you know what it does, "
            f"pass trusted=['{module_name}'] to the Deserializer"
        )
    return target


_KINDS = type | types.FunctionType | types.BuiltinFunctionType | types.MethodType


def _lies_in(module_name: str, roots: Iterable[str]) -> bool:
    return any(module_name == root or module_name.startswith(root + ".") for root in roots)


def _method_of_registered(name: str) -> Any:
    owner_name, _, method = name.rpartition(".")
    owner = registered(owner_name)
    found = _attribute(owner, method) if isinstance(owner, type) else None
    return found if isinstance(found, types.MethodType) else None


def _is_harmless(target: Any, module_name: str) -> bool:
    """Whether ``target`` of a module that nobody asked to trust may be given to an object as a parameter."""
    if module_name == "builtins":
        return target in _BUILTINS
    if not _lies_in(module_name, [PACKAGE]):
        return True
    if isinstance(target, type):
        return may_be_built(target) or issubclass(target, Enum)
    return module_name in _FUNCTIONS or registered(qualified_name(target)) is target


def _follow(module: types.ModuleType | None, qualified: str) -> Any:
    """Return what ``qualified`` names inside ``module``, through classes only and running nobody's code, or None."""
    if module is None:
        return None
    first, *rest = qualified.split(".")
    found = vars(module).get(first)
    for part in rest:
        if not isinstance(found, type):
            return None
        found = _attribute(found, part)
    return found


def _attribute(owner: type[Any], name: str) -> Any:
    attribute = inspect.getattr_static(owner, name, None)
    if isinstance(attribute, staticmethod):
        return attribute.__func__
    if isinstance(attribute, classmethod):
        return types.MethodType(attribute.__func__, owner)
    return attribute
