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
from collections.abc import Callable
from typing import Any, TypeVar

from sonosco_mlflow.errors import UserError

_PARAMETERS = "_serializable_parameters"
_REGISTRY: dict[str, object] = {}

T = TypeVar("T", bound=Callable[..., Any])


def qualified_name(target: Any) -> str:
    """Return ``module:qualified.name`` of a class or function."""
    return f"{target.__module__}:{target.__qualname__}"


def registered(name: str) -> object | None:
    """Return the class or function that was marked :func:`serializable` under ``name``, or None."""
    return _REGISTRY.get(name)


def serializable(target: T) -> T:
    """Mark a class (or a function that is passed as a parameter) as one that may be written down and built again.

    Constructor parameters are remembered as given, defaults included. A class that is built from something else than
    what it was given may define ``serialized_parameters(self) -> dict[str, object]`` to say what to write instead.
    """
    _REGISTRY[qualified_name(target)] = target
    # A dataclass says itself what it was given, and its defaults may be factories.
    if isinstance(target, type) and "__dataclass_fields__" not in vars(target):
        _capture_parameters(target)
    return target


def _capture_parameters(target: type[Any]) -> None:
    original = target.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # The outermost constructor runs first; a base's constructor must not overwrite what it was given.
        if _PARAMETERS not in self.__dict__:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            object.__setattr__(self, _PARAMETERS, _flat_arguments(signature, bound))
        original(self, *args, **kwargs)

    target.__init__ = __init__


def _flat_arguments(signature: inspect.Signature, bound: inspect.BoundArguments) -> dict[str, Any]:
    arguments = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name))
        elif parameter.kind is parameter.VAR_POSITIONAL and not arguments.pop(name, ()):
            continue
        elif parameter.kind is parameter.VAR_POSITIONAL:
            raise UserError(f"a serializable constructor takes no *{name}; give it a list parameter instead")
    return arguments


def constructor_parameters(value: Any) -> dict[str, Any]:
    """Return the parameters that make ``value`` again.

    A class that is not marked (torch's own, say) is described by its attributes of the parameters' names, where it has
    them all.

    Raises:
        UserError: they cannot be known; the message says what to do.
    """
    if hasattr(value, "serialized_parameters"):
        return dict(value.serialized_parameters())
    if _PARAMETERS in getattr(value, "__dict__", {}):
        return dict(getattr(value, _PARAMETERS))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    parameters = {}
    for name, parameter in inspect.signature(type(value)).parameters.items():
        if hasattr(value, name):
            parameters[name] = getattr(value, name)
        elif parameter.default is inspect.Parameter.empty:
            raise UserError(
                f"{qualified_name(type(value))} cannot be serialised: "
                f"the value of its parameter '{name}' is not known. Mark the class with @serializable"
            )
    return parameters
