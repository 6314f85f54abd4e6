"""Frozen dataclasses to and from JSON values, checked against their annotations.

Whatever comes from the other machine is data to distrust: a wrong type, a missing field or a number where text belongs
raises `WireError` here, so that no later code meets a half-formed value. Unknown fields are ignored, which lets a newer
agent add one.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any, TypeVar, Union

T = TypeVar("T")
_UNIONS = (Union, getattr(types, "UnionType", Union))


class WireError(ValueError):
    """A message that does not have the shape its type promises."""


def to_json(value: Any) -> Any:
    """The JSON value (dict, list, str, number, bool, None) of a dataclass tree."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return value


def from_json(cls: type[T], value: Any, where: str = "") -> T:
    """Build `cls` from a JSON value; `WireError` names the field that does not fit."""
    return typing.cast(T, _decode(cls, value, where or cls.__name__))


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in _UNIONS:
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        if len(rest) == 1:
            return _decode(rest[0], value, where)
        return _decode_plain_union(rest, value, where)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise WireError(f"{where}: expected a list, got {type(value).__name__}")
        items = [_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, dict):
            raise WireError(f"{where}: expected an object, got {type(value).__name__}")
        return {k: _decode(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            raise WireError(f"{where}: {value!r} is none of {[m.value for m in hint]}") from None
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(typing.cast(type, hint), value, where)
    return _decode_scalar(hint, value, where)


def _decode_plain_union(hints: list[Any], value: Any, where: str) -> Any:
    for hint in hints:
        try:
            return _decode(hint, value, where)
        except WireError:
            continue
    raise WireError(f"{where}: {type(value).__name__} fits none of the allowed types")


def _decode_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise WireError(f"{where}: expected an object, got {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in value:
            given[field.name] = _decode(hints[field.name], value[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise WireError(f"{where}.{field.name}: missing")
    return cls(**given)


def _decode_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_bool_where_number = isinstance(value, bool) and hint is not bool
    if hint in (dict, list, str, int, float, bool) and isinstance(value, hint) and not is_bool_where_number:
        return value
    raise WireError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}")
