"""What an object was made of: the parameters that its constructor was given.

>>> @serializable
... class Smoother:
...     def __init__(self, window: int = 3) -> None:
...         self.width = window
>>> constructor_parameters(Smoother())
{'window': 3}
"""

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

from sonosco_mlflow.errors import UserError

_PARAMETERS = "_serializable_parameters"
_REGISTRY: dict[str, object] = {}
# For objects that cannot carry their parameters themselves, by id.
_ASIDE: dict[int, tuple[weakref.ref[Any], dict[str, Any]]] = {}
# Modules of this package that lie below this one, so that their classes cannot be marked. By the rule of the house each
# keeps every parameter as the attribute of its name.
_KEEPING_ATTRIBUTES = ("sonosco_mlflow.text",)

T = TypeVar("T", bound=Callable[..., Any])


def qualified_name(target: Any) -> str:
    """Return ``module:qualified.name`` of a class or function."""
    return f"{target.__module__}:{target.__qualname__}"


def registered(name: str) -> object | None:
    """Return the class or function that was marked :func:`serializable` under ``name``, or None."""
    return _REGISTRY.get(name)


def serializable(target: T) -> T:
    """Mark a class (or a function that is passed as a parameter) as one that may be written down and built again.

    Constructor parameters are remembered as given, defaults included: lists, tuples, dicts and sets are copied, so that
    what becomes of them later does not show. A class that is built from something else than what it was given may
    define ``serialized_parameters(self) -> dict[str, object]`` to say what to write instead. A subclass with a
    constructor of its own is marked itself.

    A class of somebody else's is marked from outside, before its objects are made: ``serializable(torch.nn.Fold)``.

    Raises:
        UserError: the objects of ``target`` can remember nothing (``__slots__``, or a class written in C).
    """
    says_itself = hasattr(target, "serialized_parameters") or (isinstance(target, type) and _describes_itself(target))
    if isinstance(target, type) and not says_itself:
        _capture_parameters(target)
    _REGISTRY[qualified_name(target)] = target
    return target


def may_be_built(target: type[Any]) -> bool:
    """Return whether objects of ``target`` can have been written down, so that a document may ask for one.

    What its constructor does is then known to be meant for that. The modules of torch have a rule of their own.
    """
    return (
        _REGISTRY.get(qualified_name(target)) is target
        or hasattr(target, "serialized_parameters")
        or _describes_itself(target)
        or target.__module__ in _KEEPING_ATTRIBUTES
    )


def remembered_parameters(value: Any) -> dict[str, Any] | None:
    """Return the parameters that ``value`` itself remembers or says, or None."""
    if hasattr(value, "serialized_parameters"):
        return dict(value.serialized_parameters())
    if _PARAMETERS in getattr(value, "__dict__", {}):
        return dict(value.__dict__[_PARAMETERS])
    return dict(_ASIDE[id(value)][1]) if id(value) in _ASIDE else None


def constructor_parameters(value: Any) -> dict[str, Any]:
    """Return the parameters that make ``value`` again, by name; what a ``*args`` took is a list under its name.

    The fields of a dataclass without ``__post_init__`` are taken as they are now; all other parameters are as given.

    Raises:
        UserError: they cannot be known; the message says what to do.
    """
    target = type(value)
    remembered = remembered_parameters(value)
    if remembered is not None:
        return remembered
    if is_named_tuple(target):
        return {name: tuple.__getitem__(value, i) for i, name in enumerate(target._fields)}
    if _has_no_constructor(target):
        return {}
    if _describes_itself(target):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    if target.__module__ in _KEEPING_ATTRIBUTES:
        return {name: getattr(value, name) for name in inspect.signature(target).parameters}
    name = qualified_name(target)
    if _REGISTRY.get(name) is target:
        raise UserError(
            f"{name} cannot be serialised: this object was made before its class was marked "
            "@serializable, or by another constructor"
        )
    marked = next((base for base in target.__mro__ if _REGISTRY.get(qualified_name(base)) is base), None)
    reason = f"it has a constructor of its own, beside that of {marked.__qualname__}" if marked else "it is not marked"
    raise UserError(
        f"{name} cannot be serialised: {reason}, so the values of its parameters are not known. "
        f"Mark the class with @serializable, or from outside with serializable({target.__name__}) "
        "before its objects are made"
    )


def built_from(target: type[Any], parameters: Mapping[str, Any]) -> Any:
    """Return the object of ``target`` that ``parameters``, as :func:`constructor_parameters` gives them, make.

    Raises:
        TypeError: they do not fit the constructor.
        ValueError: the constructor has no signature.
    """
    if is_named_tuple(target):
        if parameters.keys() != set(target._fields):
            raise TypeError(f"its fields are {list(target._fields)}")
        return tuple.__new__(target, [parameters[name] for name in target._fields])
    named = dict(parameters)
    signature = inspect.signature(target).parameters.values()
    is_starred = any(each.kind is each.VAR_POSITIONAL and named.get(each.name) for each in signature)
    positional: list[Any] = []
    for each in signature:
        if each.kind is each.VAR_POSITIONAL:
            positional.extend(named.pop(each.name, ()))
        elif each.name in named and (
            each.kind is each.POSITIONAL_ONLY or (is_starred and each.kind is each.POSITIONAL_OR_KEYWORD)
        ):
            positional.append(named.pop(each.name))
    return target(*positional, **named)


def is_named_tuple(target: type[Any]) -> bool:
    """Return whether ``target`` is a class of named tuples."""
    return issubclass(target, tuple) and isinstance(getattr(target, "_fields", None), tuple)


def _describes_itself(target: type[Any]) -> bool:
    """Whether all parameters can be read from the object.

    That holds for an Enum, a named tuple, an ordinary dataclass, and a class of Python's whose constructor takes none.
    """
    if is_named_tuple(target) or issubclass(target, Enum) or _has_no_constructor(target):
        return True
    return _is_generated(_owner_of_constructor(target)) and not _takes_more_than_fields(target)


def _has_no_constructor(target: type[Any]) -> bool:
    # A class written in C keeps no attributes, and may have nothing to make it by.
    is_bare = _owner_of_constructor(target) is object and getattr(target, "__new__") is object.__new__  # noqa: B009
    return is_bare and target.__dictoffset__ != 0


def _owner_of_constructor(target: type[Any]) -> type[Any]:
    return next(base for base in target.__mro__ if "__init__" in vars(base))


def _is_generated(owner: type[Any]) -> bool:
    return "__dataclass_fields__" in vars(owner) and vars(owner)["__dataclass_params__"].init


def _takes_more_than_fields(target: type[Any]) -> bool:
    # __post_init__ may change the fields, and an InitVar is in none.
    fields = {field.name for field in dataclasses.fields(target)}
    return hasattr(target, "__post_init__") or not inspect.signature(target).parameters.keys() <= fields


def _capture_parameters(target: type[Any]) -> None:
    if not (target.__dictoffset__ or target.__weakrefoffset__):
        raise UserError(
            f"{qualified_name(target)} cannot be marked @serializable: its objects can remember nothing more. "
            "Add '__weakref__' to its __slots__, define serialized_parameters(self), or mark a subclass"
        )
    original = target.__init__
    if getattr(original, "_captures", False):
        return  # inherited, and it asks for the class anyway
    is_bare = original is object.__init__
    signature = _signature(target)
    factories = {}
    owner = _owner_of_constructor(target)
    if _is_generated(owner):
        factories = {
            field.name: field.default_factory
            for field in dataclasses.fields(owner)
            if field.init and field.default_factory is not dataclasses.MISSING
        }

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # Only the constructor of the object's own class knows what the object was given, not that of a base.
        if type(self).__init__ is __init__:
            bound = signature.bind(self, *args, **kwargs)
            for name, factory in factories.items():
                if name not in bound.arguments:
                    kwargs[name] = bound.arguments[name] = factory()
            bound.apply_defaults()
            _remember(self, _by_name(signature, bound))
        if is_bare:
            original(self)
        else:
            original(self, *args, **kwargs)

    __init__._captures = True  # type: ignore[attr-defined]
    try:
        target.__init__ = __init__
    except TypeError as error:
        raise UserError(f"{qualified_name(target)} cannot be marked from outside; mark a subclass of it") from error


def _signature(target: type[Any]) -> inspect.Signature:
    for name in ("__init__", "__new__"):
        if getattr(target, name) is not getattr(object, name):
            return inspect.signature(getattr(target, name))
    return inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)])


def _by_name(signature: inspect.Signature, bound: inspect.BoundArguments) -> dict[str, Any]:
    arguments = dict(list(bound.arguments.items())[1:])
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            more = arguments.pop(name)
            if more.keys() & arguments.keys():
                raise UserError(
                    f"the keywords {sorted(more.keys() & arguments.keys())} are also names of positional parameters; "
                    "a serializable constructor needs different ones"
                )
            arguments.update(more)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            arguments[name] = list(arguments[name])
            if not arguments[name]:
                del arguments[name]
    try:
        copies: dict[int, Any] = {}
        return {name: _copied(value, copies) for name, value in arguments.items()}
    except RecursionError:
        # Too deep to be written down, which is told then: making the object is no mistake.
        return arguments


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Copy plain containers, which the constructor may change; everything else is the very object that was given.

    Args:
        value: what was given.
        copies: of the lists, dicts and sets that were met before, by id: some contain themselves.
    """
    kind = type(value)
    if id(value) in copies:
        return copies[id(value)]
    if kind in (tuple, frozenset):
        return kind(_copied(item, copies) for item in value)
    if kind in (list, set):
        copies[id(value)] = kind()
        add = copies[id(value)].append if kind is list else copies[id(value)].add
        for item in value:
            add(_copied(item, copies))
        return copies[id(value)]
    if kind is dict:
        copies[id(value)] = {}
        copies[id(value)].update((key, _copied(item, copies)) for key, item in value.items())
        return copies[id(value)]
    return value


def _remember(value: Any, parameters: dict[str, Any]) -> None:
    # A scheduler of torch gives all attributes out as its state.
    tells_all = any(base.__module__ == "torch.optim.lr_scheduler" for base in type(value).__mro__)
    if type(value).__dictoffset__ and not tells_all:
        value.__dict__[_PARAMETERS] = parameters
        return
    key = id(value)
    _ASIDE[key] = (weakref.ref(value, lambda _: _ASIDE.pop(key, None)), parameters)
