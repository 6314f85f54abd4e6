"""A checkpoint's plain values as JSON: bounded, acyclic, and nothing in it but text, numbers, lists and objects."""

from __future__ import annotations

import math
from typing import Any

from remote_payload.checkpoint.inert import NumpyArray, NumpyDtype, Opaque, StorageRef, Symbol, TensorRef
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.pickle_globals import decode_numpy

_MAX_JSON_INTEGER = 1 << 63
_MAX_ARRAY_VALUES = 1000
_OMEGACONF = "omegaconf."
_MAX_WRAPPINGS = 8


class PlainValues:
    """Turns parts of a tree into JSON values, out of one budget for the whole file.

    What is left out is replaced by a text in angle brackets. NaN and infinities become the texts `NaN`, `Infinity` and
    `-Infinity`, because JSON has no numbers for them.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._left = limits.shown_values
        self.left_out = False

    def convert(self, value: object, depth: int = 0) -> Any:
        """The JSON value of `value`. Recursion ends at `Limits.shown_depth`."""
        self._left -= 1
        if self._left < 0:
            self.left_out = True
            return "<left out>"
        value = _without_omegaconf(value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return (
                value if -_MAX_JSON_INTEGER < value < _MAX_JSON_INTEGER else f"<integer of {value.bit_length()} bits>"
            )
        if isinstance(value, float):
            return json_number(value)
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, bytes):
            return f"<{len(value)} bytes>"
        return self._container(value, depth)

    def _text(self, value: str) -> str:
        if len(value) <= self._limits.shown_text:
            return value
        self.left_out = True
        return value[: self._limits.shown_text] + "<…>"

    def _container(self, value: object, depth: int) -> Any:
        if isinstance(value, TensorRef):
            return f"<tensor {value.dtype} {list(value.shape)[:16]}>"
        if isinstance(value, Symbol):
            return f"<{value.full_name[:200]}>"
        if isinstance(value, NumpyArray):
            return self._array(value)
        if isinstance(value, (StorageRef, NumpyDtype)):
            return f"<{type(value).__name__}>"
        if depth >= self._limits.shown_depth:
            self.left_out = True
            return "<nested too deep>"
        if isinstance(value, dict):
            return self._mapping(value, depth)
        if isinstance(value, (list, tuple)):
            return self._items(value, depth)
        if isinstance(value, (set, frozenset)):
            return sorted(self._items(list(value), depth), key=repr)
        if isinstance(value, Opaque):
            return self._opaque(value, depth)
        return f"<{type(value).__name__}>"

    def _items(self, value: Any, depth: int) -> list[Any]:
        made = []
        for item in value:
            if self._left <= 0:
                self.left_out = True
                made.append("<left out>")
                break
            made.append(self.convert(item, depth + 1))
        return made

    def _mapping(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, item in value.items():
            if self._left <= 0:
                self.left_out = True
                break
            made[key_text(key)] = self.convert(item, depth + 1)
        return made

    def _opaque(self, value: Opaque, depth: int) -> Any:
        made: dict[str, Any] = {"<type>": value.symbol.full_name[:200]}
        if isinstance(value.state, dict):
            made.update(self._mapping(value.state, depth))
        elif value.state is not None:
            made["<state>"] = self.convert(value.state, depth + 1)
        for name, part in (("<arguments>", value.arguments), ("<items>", value.items)):
            if part:
                made[name] = self.convert(part, depth + 1)
        if value.entries:
            made.update(self._mapping(value.entries, depth))
        return made

    def _array(self, value: NumpyArray) -> Any:
        count = math.prod(value.shape)
        numbers = None
        if count <= _MAX_ARRAY_VALUES and isinstance(value.data, bytes) and value.dtype is not None:
            numbers = decode_numpy(value.dtype, value.data, count)
        if numbers is not None and len(value.shape) <= 1:
            self._left -= count
            shown = [json_number(n) if isinstance(n, float) else n for n in numbers]
            return shown if value.shape else shown[0]
        return f"<numpy array {value.dtype.code if value.dtype else '?'} {list(value.shape)[:16]}>"


def _without_omegaconf(value: object) -> object:
    """What an OmegaConf node holds: each names its parent as well, which would repeat everything at every level."""
    for _ in range(_MAX_WRAPPINGS):
        if not isinstance(value, Opaque) or not value.symbol.module.startswith(_OMEGACONF):
            break
        held = [value.state[k] for k in ("_content", "_val") if k in value.state] if type(value.state) is dict else []
        if len(held) != 1:
            break
        value = held[0]
    return value


def json_number(value: float) -> Any:
    """`value`, or its name in text if it is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def key_text(key: object) -> str:
    """A key as bounded text; compound keys by their type alone."""
    if isinstance(key, str):
        return key if len(key) <= 500 else key[:500] + "<…>"
    if key is None or isinstance(key, (bool, int, float)):
        return str(key)
    if isinstance(key, Symbol):
        return key.full_name[:200]
    return f"<{type(key).__name__}>"
