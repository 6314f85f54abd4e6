"""Which globals a checkpoint's pickle may name, and what each means without running it."""

from __future__ import annotations

import struct
from typing import Callable, Optional

from remote_payload.checkpoint.inert import NumpyArray, NumpyDtype, StorageRef, Symbol, TensorRef, Trust
from remote_payload.checkpoint.pickle_machine import PickleMachine
from remote_payload.checkpoint.pickle_values import MalformedPickleError
from remote_payload.checkpoint.trust import harmless_globals, named_dtype, storage_dtype, trust_of

Arguments = tuple[object, ...]
_MAX_DIMENSIONS = 64
_MAX_EXTENT = 1 << 62

_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_OLD_BUILTINS = {"long": "int", "unicode": "str", "xrange": "range"}
"""Protocol 2, torch's own, spells Python 3's types by the names that they had in Python 2."""


class SymbolTable:
    """The globals that one file names, in order of appearance."""

    def __init__(self) -> None:
        self._symbols: dict[tuple[str, str], Symbol] = {}

    def find(self, module: str, name: str) -> Symbol:
        """The symbol for a global, made at its first appearance."""
        if module == "__builtin__":
            name = _OLD_BUILTINS.get(name, name)
        module = _OLD_MODULES.get(module, module)
        symbol = self._symbols.get((module, name))
        if symbol is None:
            known = f"{module}.{name}" in _COPYING or f"{module}.{name}" in _PLAIN
            trust = Trust.KNOWN if known and "." not in name else trust_of(module, name)
            symbol = self._symbols[module, name] = Symbol(module, name, trust)
        return symbol

    def all(self) -> tuple[Symbol, ...]:
        return tuple(self._symbols.values())


def call_known(machine: PickleMachine, symbol: Symbol, arguments: Arguments) -> Optional[object]:
    """Imitate a call of a known global; None where its arguments have an unusual form."""
    copying, plain = _COPYING.get(symbol.full_name), _PLAIN.get(symbol.full_name)
    if copying is not None:
        return copying(machine, arguments)
    return plain(arguments) if plain is not None else None


def load_storage(identifier: object) -> StorageRef:
    """torch's persistent id ('storage', class, key, location, numel[, view]) as a storage."""
    if not isinstance(identifier, tuple) or len(identifier) < 5 or identifier[0] != "storage":
        raise MalformedPickleError("a persistent id that is no torch storage")
    if len(identifier) > 5 and identifier[5] is not None:
        raise MalformedPickleError("a view of a storage, as torch wrote before 0.4")
    kind, key, numel = identifier[1], identifier[2], identifier[4]
    dtype = storage_dtype(kind.module, kind.name) if isinstance(kind, Symbol) else None
    if dtype is None or not isinstance(key, (str, int)) or not _is_extent(numel):
        raise MalformedPickleError("a torch storage of unknown class, key or size")
    return StorageRef(str(key)[:200], dtype, _extent(numel))


def _is_extent(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_EXTENT


def _extent(value: object) -> int:
    if not isinstance(value, int) or not _is_extent(value):
        raise MalformedPickleError("a size that is no number from 0 to 2**62")
    return value


def _extents(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMENSIONS:
        raise MalformedPickleError("a tensor whose shape is no tuple of sizes")
    return tuple(_extent(n) for n in value)


def _tensor(storage: object, dtype: Optional[str], offset: object, shape: object, stride: object) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise MalformedPickleError("a tensor without a storage")
    sizes, strides = _extents(shape), _extents(stride)
    if len(sizes) != len(strides):
        raise MalformedPickleError("a tensor with as many strides as it has not dimensions")
    return TensorRef(storage, dtype or storage.dtype, _extent(offset), sizes, strides)


def _rebuild_tensor(a: Arguments) -> Optional[object]:
    return _tensor(a[0], None, a[1], a[2], a[3]) if len(a) >= 4 else None


def _rebuild_tensor_v3(a: Arguments) -> Optional[object]:
    dtype = named_dtype(a[6].module, a[6].name) if len(a) >= 7 and isinstance(a[6], Symbol) else None
    return _tensor(a[0], dtype, a[1], a[2], a[3]) if dtype else None


def _rebuild_parameter(a: Arguments) -> Optional[object]:
    if not a or not isinstance(a[0], TensorRef):
        return None
    a[0].is_parameter = True
    return a[0]


def _rebuild_meta_tensor(a: Arguments) -> Optional[object]:
    dtype = named_dtype(a[0].module, a[0].name) if len(a) >= 3 and isinstance(a[0], Symbol) else None
    return TensorRef(None, dtype, 0, _extents(a[1]), _extents(a[2])) if dtype else None


def _rebuild_from_type(machine: PickleMachine, a: Arguments) -> Optional[object]:
    if len(a) < 3 or not isinstance(a[0], Symbol) or not isinstance(a[2], tuple):
        return None
    if a[0].name.startswith("_rebuild_from_type"):
        # Nested in itself it would recurse here as deep as the file likes.
        return None
    return machine.call(a[0], a[2])


def _ordered_dict(machine: PickleMachine, a: Arguments) -> Optional[object]:
    if not a:
        return {}
    if isinstance(a[0], dict):
        return machine.make_dict(a[0].items())
    return machine.make_dict(a[0]) if isinstance(a[0], (list, tuple)) else None


def _default_dict(machine: PickleMachine, a: Arguments) -> Optional[object]:
    return _ordered_dict(machine, a[1:])


def _sequence(machine: PickleMachine, a: Arguments) -> Optional[object]:
    if not a:
        return []
    if not isinstance(a[0], (list, tuple)):
        return None
    machine.charge(8 * len(a[0]))
    return list(a[0])


def _tuple(machine: PickleMachine, a: Arguments) -> Optional[object]:
    items = _sequence(machine, a)
    return tuple(items) if isinstance(items, list) else None


def _set(machine: PickleMachine, a: Arguments) -> Optional[object]:
    if not a:
        return set()
    return machine.make_set(a[0]) if isinstance(a[0], (list, tuple)) else None


def _bytes(a: Arguments) -> Optional[object]:
    return (a[0] if a else b"") if not a or isinstance(a[0], bytes) else None


def _encode(machine: PickleMachine, a: Arguments) -> Optional[object]:
    # How protocol 2 spells bytes.
    if len(a) != 2 or not isinstance(a[0], str) or a[1] not in ("latin1", "latin-1"):
        return None
    machine.charge(len(a[0]))
    try:
        return a[0].encode("latin-1")
    except UnicodeEncodeError:
        return None


def _numpy_dtype(a: Arguments) -> Optional[object]:
    return NumpyDtype(a[0][:32]) if a and isinstance(a[0], str) else None


def _numpy_scalar(a: Arguments) -> Optional[object]:
    if len(a) != 2 or not isinstance(a[0], NumpyDtype) or not isinstance(a[1], bytes):
        return None
    values = decode_numpy(a[0], a[1], 1)
    return values[0] if values else None


def _numpy_array(_: Arguments) -> Optional[object]:
    return NumpyArray()


NUMPY_CODES = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "b1": "?"}
NUMPY_CODES.update({"u8": "Q", "u4": "I", "u2": "H", "u1": "B"})


def decode_numpy(dtype: NumpyDtype, data: bytes, count: int) -> Optional[list[object]]:
    """`count` numbers out of numpy's bytes; None for types or lengths that do not fit."""
    code = NUMPY_CODES.get(dtype.code)
    order = ">" if dtype.byte_order == ">" else "<"
    if code is None or struct.calcsize(f"{order}{code}") * count != len(data):
        return None
    return list(struct.unpack(f"{order}{count}{code}", data))


_COPYING: dict[str, Callable[[PickleMachine, Arguments], Optional[object]]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _ordered_dict,
    "collections.deque": _sequence,
    "builtins.dict": _ordered_dict,
    "builtins.list": _sequence,
    "builtins.tuple": _tuple,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "_codecs.encode": _encode,
    "torch.Size": _tuple,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
}
"""Imitations that make objects, and charge the machine's budget for them."""

_PLAIN: dict[str, Callable[[Arguments], Optional[object]]] = {
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_qtensor": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta_tensor,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
}


def allowed_globals() -> tuple[str, ...]:
    """The named allow-list: every global that a pickle may name without a finding, but for torch's own layers."""
    return tuple(sorted({*_COPYING, *_PLAIN, *harmless_globals()}))
