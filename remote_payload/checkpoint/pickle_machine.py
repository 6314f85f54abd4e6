"""A pickle interpreter of our own, because Python's executes what it reads.

It knows the opcodes of protocols 0 to 5 and makes plain containers, numbers, text and the inert objects of `inert.py`.
Globals are looked up by name in a table (`pickle_globals.py`), never imported. Work and memory are bounded by `Limits`;
nothing here recurses along the data, so nesting costs no stack.
"""

from __future__ import annotations

import codecs
from typing import Any, Callable, Optional

from remote_payload.checkpoint.inert import NumpyArray, NumpyDtype, Opaque, Symbol, Trust
from remote_payload.checkpoint.limits import DEFAULT_LIMITS, Limits
from remote_payload.checkpoint.pickle_reader import PickleReader
from remote_payload.checkpoint.pickle_values import (
    MalformedPickleError,
    PickleEndsError,
    checked_key,
    decimal,
    fill_array,
)

_MAX_INTEGER_BYTES = 1024


class PickleMachine(PickleReader):
    """Interprets one pickle in `data` from `position` on.

    `find_symbol(module, name)` names globals, `call(machine, symbol, arguments)` imitates those that are known (None:
    make an opaque object), `load_persistent(id)` turns persistent ids into storages.
    """

    def __init__(
        self,
        data: bytes,
        find_symbol: Callable[[str, str], Symbol],
        call: Callable[[PickleMachine, Symbol, tuple[object, ...]], Optional[object]],
        load_persistent: Callable[[object], object],
        limits: Limits = DEFAULT_LIMITS,
        position: int = 0,
    ) -> None:
        super().__init__(data, position)
        self._find_symbol = find_symbol
        self._call_known = call
        self._load_persistent = load_persistent
        self._limits = limits
        self._memory_left = limits.memory_bytes
        self.opcodes = 0
        self._stack: list[object] = []
        self._below: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        """The pickle's value; `position` is then behind STOP. Raises `MalformedPickleError`."""
        data, table, end = self._data, _TABLE, self._end
        try:
            for count in range(self._limits.opcodes):
                if self.position >= end:
                    raise PickleEndsError("the pickle ends before its STOP opcode")
                opcode = data[self.position]
                self.position += 1
                if opcode == 0x2E:
                    self.opcodes = count + 1
                    return self._stack.pop()
                handler = table[opcode]
                if handler is None:
                    raise MalformedPickleError(f"byte 0x{opcode:02x} at {self.position - 1} is no pickle opcode")
                handler(self)
        except IndexError:
            raise MalformedPickleError(f"stack underflow at {self.position}") from None
        except UnicodeDecodeError as error:
            raise MalformedPickleError(f"text that is no {error.encoding} at {self.position}") from None
        raise MalformedPickleError(f"more than {self._limits.opcodes} opcodes")

    @property
    def memory_used(self) -> int:
        return self._limits.memory_bytes - self._memory_left

    def charge(self, size: int) -> None:
        """Account for `size` bytes of new objects; every copy that a handler makes goes through here."""
        self._memory_left -= size
        if self._memory_left < 0:
            raise MalformedPickleError(f"the pickle's objects need more than {self._limits.memory_bytes} bytes")

    def make_dict(self, pairs: Any) -> dict[object, object]:
        """A dict from (key, value) pairs whose keys are safe to hash."""
        made: dict[object, object] = {}
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise MalformedPickleError("a mapping is made from something that is no pair")
            self.charge(100)
            made[checked_key(pair[0])] = pair[1]
        return made

    def make_set(self, items: Any) -> set[object]:
        made: set[object] = set()
        for item in items:
            self.charge(80)
            made.add(checked_key(item))
        return made

    def call(self, function: object, arguments: object) -> object:
        """What calling `function` stands for: an imitation if it is known, else an opaque object."""
        if not isinstance(arguments, tuple):
            raise MalformedPickleError("a call whose arguments are no tuple")
        self.charge(120)
        if not isinstance(function, Symbol):
            # Only a loader that had run something could hold a callable value here.
            function = self._find_symbol("?", f"result of a call ({type(function).__name__})")
        function.called = True
        if function.trust is Trust.KNOWN:
            result = self._call_known(self, function, arguments)
            if result is not None:
                return result
        return Opaque(function, arguments)

    def _push(self, value: object) -> None:
        # Looked up after the value was made: `_pop_mark` replaces the stack.
        self._stack.append(value)

    def _pop_mark(self) -> list[object]:
        items = self._stack
        self._stack = self._below.pop()
        self.charge(64 + 8 * len(items))
        return items

    def _mark(self) -> None:
        if len(self._below) >= self._limits.mark_depth:
            raise MalformedPickleError(f"more than {self._limits.mark_depth} open marks")
        self._below.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _put(self, index: int) -> None:
        self.charge(100)
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise MalformedPickleError(f"memo entry {index} does not exist")
        self._stack.append(self._memo[index])

    def _new_dict(self) -> None:
        self.charge(64)
        self._stack.append({})

    def _new_list(self) -> None:
        self.charge(56)
        self._stack.append([])

    def _new_set(self) -> None:
        self.charge(216)
        self._stack.append(set())

    def _tuple_of(self, count: int) -> None:
        self.charge(40 + 8 * count)
        if len(self._stack) < count:
            raise IndexError
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(items)

    def _integer(self, data: bytes) -> None:
        if len(data) > _MAX_INTEGER_BYTES:
            raise MalformedPickleError(f"an integer of {len(data)} bytes")
        self._stack.append(int.from_bytes(data, "little", signed=True))

    def _int_line(self) -> None:
        line = self.take_line()
        self._stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else decimal(line))

    def _long_line(self) -> None:
        self._stack.append(decimal(self.take_line().rstrip(b"L")))

    def _float_line(self) -> None:
        try:
            self._stack.append(float(self.take_line()[:64]))
        except ValueError:
            raise MalformedPickleError(f"text that is no number at {self.position}") from None

    def _string_line(self) -> None:
        line = self.take_line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise MalformedPickleError(f"a string without quotes at {self.position}")
        try:
            self._stack.append(codecs.escape_decode(line[1:-1])[0].decode("latin-1"))
        except ValueError:
            raise MalformedPickleError(f"a string with a broken escape at {self.position}") from None

    def _memoize(self) -> None:
        self._put(len(self._memo))

    def _frame(self) -> None:
        if self.take_u8() > self._end - self.position:
            raise PickleEndsError("a frame reaches beyond the pickle")

    def _unsupported_buffer(self) -> None:
        raise MalformedPickleError("out-of-band buffers do not exist in a file")

    def _dict_from_mark(self) -> None:
        items = self._pop_mark()
        if len(items) % 2:
            raise MalformedPickleError("a key without a value")
        self._stack.append(self.make_dict(zip(items[::2], items[1::2])))

    def _set_items(self, items: list[object]) -> None:
        if len(items) % 2:
            raise MalformedPickleError("a key without a value")
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target = target.entries
        if not isinstance(target, dict):
            raise MalformedPickleError(f"items are set in a {type(target).__name__}")
        self.charge(50 * len(items))
        for index in range(0, len(items), 2):
            key = items[index]
            target[key if type(key) is str else checked_key(key)] = items[index + 1]

    def _set_item(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._set_items([key, value])

    def _append_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target = target.items
        if not isinstance(target, list):
            raise MalformedPickleError(f"items are appended to a {type(target).__name__}")
        target.extend(items)

    def _add_items(self) -> None:
        items = self._pop_mark()
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(self.make_set(items))
        else:
            raise MalformedPickleError(f"items are added to a {type(target).__name__}")

    def _frozen_set(self) -> None:
        self._push(frozenset(self.make_set(self._pop_mark())))

    def _symbol(self, module: object, name: object) -> Symbol:
        if not isinstance(module, str) or not isinstance(name, str):
            raise MalformedPickleError("a global whose name is no text")
        return self._find_symbol(module, name)

    def _global_line(self) -> None:
        module, name = self.take_line(), self.take_line()
        self._stack.append(self._symbol(module.decode("utf-8"), name.decode("utf-8")))

    def _stack_global(self) -> None:
        name = self._stack.pop()
        self._stack.append(self._symbol(self._stack.pop(), name))

    def _extension(self, code: int) -> None:
        self._stack.append(self._find_symbol("copyreg", f"extension {code}"))

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        self._stack[-1] = self.call(self._stack[-1], arguments)

    def _new_object(self) -> None:
        self._reduce()

    def _new_object_ex(self) -> None:
        keywords = self._stack.pop()
        arguments = self._stack.pop()
        if not isinstance(arguments, tuple):
            raise MalformedPickleError("a call whose arguments are no tuple")
        self._stack[-1] = self.call(self._stack[-1], (*arguments, keywords) if keywords else arguments)

    def _instance_line(self) -> None:
        module, name = self.take_line(), self.take_line()
        symbol = self._symbol(module.decode("utf-8"), name.decode("utf-8"))
        self._push(self.call(symbol, tuple(self._pop_mark())))

    def _object_from_mark(self) -> None:
        items = self._pop_mark()
        self._stack.append(self.call(items[0], tuple(items[1:])))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif isinstance(target, NumpyDtype) and isinstance(state, tuple) and len(state) > 1:
            target.byte_order = state[1] if isinstance(state[1], str) else "="
        elif isinstance(target, NumpyArray) and isinstance(state, tuple) and len(state) == 5:
            fill_array(target, state)
        elif isinstance(target, Symbol):
            target.called = True
        # Attributes of plain containers (a state dict's _metadata) and of tensors carry nothing that we report.

    def _persistent(self) -> None:
        self._stack.append(self._load_persistent(self._stack.pop()))

    def _duplicate(self) -> None:
        self._stack.append(self._stack[-1])


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


_Handler = Callable[[PickleMachine], None]
_M = PickleMachine
_OPCODES: dict[bytes, _Handler] = {
    b"\x80": lambda m: (m.take(1), None)[1],
    b"\x95": _M._frame,
    b"(": _M._mark,
    b"0": _M._pop,
    b"1": lambda m: (m._pop_mark(), None)[1],
    b"2": _M._duplicate,
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"I": _M._int_line,
    b"L": _M._long_line,
    b"F": _M._float_line,
    b"J": lambda m: m._push(m.take_i4()),
    b"K": lambda m: m._push(m.take_u1()),
    b"M": lambda m: m._push(m.take_u2()),
    b"\x8a": lambda m: m._integer(m.take_bytes(m.take_u1())),
    b"\x8b": lambda m: m._integer(m.take_bytes(m.take_u4())),
    b"G": lambda m: m._push(m.take_double()),
    b"S": _M._string_line,
    b"T": lambda m: m._push(m.take_bytes(m.take_u4()).decode("latin-1")),
    b"U": lambda m: m._push(m.take_bytes(m.take_u1()).decode("latin-1")),
    b"V": lambda m: m._push(m.take_line().decode("raw-unicode-escape")),
    b"X": lambda m: m._push(_utf8(m.take_bytes(m.take_u4()))),
    b"\x8c": lambda m: m._push(_utf8(m.take_bytes(m.take_u1()))),
    b"\x8d": lambda m: m._push(_utf8(m.take_bytes(m.take_u8()))),
    b"B": lambda m: m._push(m.take_bytes(m.take_u4())),
    b"C": lambda m: m._push(m.take_bytes(m.take_u1())),
    b"\x8e": lambda m: m._push(m.take_bytes(m.take_u8())),
    b"\x96": lambda m: m._push(m.take_bytes(m.take_u8())),
    b"\x97": _M._unsupported_buffer,
    b"\x98": _M._unsupported_buffer,
    b"}": _M._new_dict,
    b"]": _M._new_list,
    b"\x8f": _M._new_set,
    b")": lambda m: m._push(()),
    b"t": lambda m: m._push(tuple(m._pop_mark())),
    b"\x85": lambda m: m._tuple_of(1),
    b"\x86": lambda m: m._tuple_of(2),
    b"\x87": lambda m: m._tuple_of(3),
    b"l": lambda m: m._push(m._pop_mark()),
    b"d": _M._dict_from_mark,
    b"s": _M._set_item,
    b"u": lambda m: m._set_items(m._pop_mark()),
    b"a": lambda m: m._append_items([m._stack.pop()]),
    b"e": lambda m: m._append_items(m._pop_mark()),
    b"\x90": _M._add_items,
    b"\x91": _M._frozen_set,
    b"p": lambda m: m._put(decimal(m.take_line())),
    b"q": lambda m: m._put(m.take_u1()),
    b"r": lambda m: m._put(m.take_u4()),
    b"\x94": _M._memoize,
    b"g": lambda m: m._get(decimal(m.take_line())),
    b"h": lambda m: m._get(m.take_u1()),
    b"j": lambda m: m._get(m.take_u4()),
    b"c": _M._global_line,
    b"\x93": _M._stack_global,
    b"\x82": lambda m: m._extension(m.take_u1()),
    b"\x83": lambda m: m._extension(m.take_u2()),
    b"\x84": lambda m: m._extension(m.take_u4()),
    b"R": _M._reduce,
    b"\x81": _M._new_object,
    b"\x92": _M._new_object_ex,
    b"i": _M._instance_line,
    b"o": _M._object_from_mark,
    b"b": _M._build,
    b"P": lambda m: m._push(m._load_persistent(m.take_line().decode("latin-1"))),
    b"Q": _M._persistent,
}


def _table() -> tuple[Optional[_Handler], ...]:
    return tuple(_OPCODES.get(bytes([code])) for code in range(256))


_TABLE = _table()
