"""Dataclasses from the plain values that JSON has, by their annotations."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def from_json(kind: type[T], value: Any) -> T:
    """The value as `kind`: a dataclass, a list, tuple or dictionary of what JSON has, a union, or a plain type.

    Strings such as "inf" and "nan" are read as floats where one is wanted.

    Raises:
        TypeError: the value is of another type.
        ValueError: a field is missing that has no default, or there is one that is unknown.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_of(kind, value)
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(arguments, value)
    if origin is list and isinstance(value, list):
        return typing.cast(T, [from_json(arguments[0], item) for item in value])
    if origin is tuple and isinstance(value, list):  # tuple[int, ...]
        return typing.cast(T, tuple(from_json(arguments[0], item) for item in value))
    if origin is dict and isinstance(value, dict):
        return typing.cast(T, {key: from_json(arguments[1], item) for key, item in value.items()})
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return typing.cast(T, float(value))
    if origin is None and type(value) is kind:
        return value
    raise TypeError(f"expected {kind}, got {value!r:.60}")


def _dataclass_of(kind: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"expected a {kind.__name__}, got {value!r:.60}")
    annotations = typing.get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := required - value.keys():
        raise ValueError(f"a {kind.__name__} without {', '.join(sorted(missing))}")
    if unknown := value.keys() - annotations.keys():
        raise ValueError(f"a {kind.__name__} with {', '.join(sorted(unknown))}")
    return kind(**{name: from_json(annotations[name], item) for name, item in value.items()})


def _first_that_fits(kinds: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in kinds:
        return None
    exact = [kind for kind in kinds if kind is type(value)]
    for kind in (*exact, *(kind for kind in kinds if kind is not type(None))):
        try:
            return from_json(kind, value)
        except (TypeError, ValueError) as error:
            failure = error
    raise failure
