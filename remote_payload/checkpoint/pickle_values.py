"""Values in a pickle that take a second look before they are believed."""

from __future__ import annotations

from remote_payload.checkpoint.inert import NumpyArray, NumpyDtype

_MAX_INTEGER_DIGITS = 1000
_MAX_KEY_PARTS = 256
_MAX_INTEGER_KEY = 1 << 60
"""Python hashes integers modulo 2**61 - 1: larger keys could be chosen to collide."""


class MalformedPickleError(ValueError):
    """The stream breaks the pickle format, or a limit."""


class PickleEndsError(MalformedPickleError):
    """The stream ends before its STOP."""


def fill_array(array: NumpyArray, state: tuple[object, ...]) -> None:
    """Take shape, type and bytes from the state that numpy pickles for an array."""
    _, shape, dtype, _, data = state
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise MalformedPickleError("a numpy array without a shape")
    array.shape = tuple(n for n in shape if isinstance(n, int))
    array.dtype = dtype if isinstance(dtype, NumpyDtype) else None
    array.data = data


def decimal(text: bytes) -> int:
    """The integer that a line of text spells."""
    if len(text) > _MAX_INTEGER_DIGITS:
        raise MalformedPickleError(f"an integer of {len(text)} digits")
    try:
        return int(text)
    except ValueError:
        raise MalformedPickleError("text that is no integer") from None


def checked_key(key: object) -> object:
    """`key` if hashing it is safe and cheap: Python's hash of tuples recurses, without a limit, in C."""
    pending, seen = [key], 0
    while pending:
        part = pending.pop()
        seen += 1
        if seen > _MAX_KEY_PARTS:
            raise MalformedPickleError("a key of too many parts")
        if isinstance(part, (list, dict, set)):
            raise MalformedPickleError(f"a {type(part).__name__} as a key")
        if isinstance(part, (tuple, frozenset)):
            if len(part) > _MAX_KEY_PARTS:
                raise MalformedPickleError("a key of too many parts")
            pending.extend(part)
        elif isinstance(part, int) and not -_MAX_INTEGER_KEY < part < _MAX_INTEGER_KEY:
            raise MalformedPickleError("a key beyond 60 bits")
    return key
