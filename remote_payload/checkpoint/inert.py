"""What a pickle's objects become here: values that describe and never act."""

from __future__ import annotations

import enum
from typing import Optional


class Trust(str, enum.Enum):
    """What a global named by a pickle is to us. Whatever its trust, nothing is imported and nothing of it runs."""

    KNOWN = "known"
    """Understood: its effect on plain data is imitated."""
    INERT = "inert"
    """A harmless container of other projects: kept as an opaque object."""
    UNSAFE = "unsafe"
    """Everything else: a loader that obeyed would run code that we cannot vouch for."""


class Symbol:
    """A global by name. `called` says whether the pickle would have called, instantiated or updated it."""

    __slots__ = ("called", "module", "name", "trust")

    def __init__(self, module: str, name: str, trust: Trust) -> None:
        self.module = module
        self.name = name
        self.trust = trust
        self.called = False

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """An object that a pickle asked to make and that was not made. Its parts are kept, for the tensors in them."""

    __slots__ = ("arguments", "entries", "items", "state", "symbol")

    def __init__(self, symbol: Symbol, arguments: object = ()) -> None:
        self.symbol = symbol
        self.arguments = arguments
        self.state: object = None
        self.items: list[object] = []
        self.entries: dict[object, object] = {}


class StorageRef:
    """A torch storage: `numel` elements of `dtype`, in the file under `key`."""

    __slots__ = ("dtype", "key", "numel")

    def __init__(self, key: str, dtype: str, numel: int) -> None:
        self.key = key
        self.dtype = dtype
        self.numel = numel


class TensorRef:
    """A tensor as a view of a storage; offset and strides in elements of `dtype`.

    Without a storage it is a meta tensor, or put together from `pieces`: (offsets in each dimension, tensor) pairs that
    cover it exactly.
    """

    __slots__ = ("dtype", "is_parameter", "offset", "pieces", "shape", "storage", "stride")

    def __init__(
        self,
        storage: Optional[StorageRef],
        dtype: str,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.shape = shape
        self.stride = stride
        self.is_parameter = False
        self.pieces: tuple[tuple[tuple[int, ...], TensorRef], ...] = ()


class NumpyDtype:
    """numpy's type string such as `f8`, and `<`, `>`, `|` or `=`."""

    __slots__ = ("byte_order", "code")

    def __init__(self, code: str) -> None:
        self.code = code
        self.byte_order = "="


class NumpyArray:
    """A numpy array that lies inside the pickle."""

    __slots__ = ("data", "dtype", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: Optional[NumpyDtype] = None
        self.data: object = b""
