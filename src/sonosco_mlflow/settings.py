"""Settings of a program's own, as a run can keep them: what YAML and JSON give back as it was.

>>> plain_settings({"optimizer": {"betas": (0.9, 0.98)}})
{'optimizer': {'betas': [0.9, 0.98]}}
"""

from collections.abc import Iterator, Mapping

from sonosco_mlflow.errors import UserError


def plain_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Return nested settings of a program's own as YAML and JSON can keep them: tuples as lists.

    Raises:
        UserError: a value is none that comes back from there as it was; the message names its key and its type.
    """
    return {name: _plain(name, value) for name, value in _named("the settings", settings)}


def _plain(key: str, value: object) -> object:
    # Not their subclasses: what is more than a number or a text would come back as less.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(f"{key}.{name}", item) for name, item in _named(key, value)}
    if isinstance(value, list | tuple):
        return [_plain(f"{key}.{index}", item) for index, item in enumerate(value)]
    raise UserError(
        f"{key}: found {value!r}, a {_type_name(value)}, expected a text, a number, true, false, none, or lists and "
        "mappings of these; write str(...) of a path, .value of an enum, .item() of a scalar of NumPy or torch"
    )


def _named(key: str, settings: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if type(name) is not str:
            raise UserError(f"{key}: found the key {name!r}, a {_type_name(name)}, expected a text")
        yield name, value


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
