"""The bytes of one pickle, taken in order: the arguments of opcodes, none of which reaches beyond the end."""

from __future__ import annotations

import struct

from remote_payload.checkpoint.pickle_values import PickleEndsError

_MAX_LINE = 1 << 20

_INT2 = struct.Struct("<H").unpack_from
_INT4 = struct.Struct("<i").unpack_from
_UINT4 = struct.Struct("<I").unpack_from
_UINT8 = struct.Struct("<Q").unpack_from
_DOUBLE = struct.Struct(">d").unpack_from


class PickleReader:
    """Takes values from `data`, from `position` on. Every method raises `PickleEndsError` where the data ends first."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._end = len(data)
        self.position = position

    def take(self, count: int) -> int:
        """Go past `count` bytes and return where they begin."""
        start = self.position
        if count > self._end - start:
            raise PickleEndsError(f"the pickle ends inside a value of {count} bytes at {start}")
        self.position = start + count
        return start

    def take_bytes(self, count: int) -> bytes:
        start = self.take(count)
        return self._data[start : start + count]

    def take_line(self) -> bytes:
        stop = self._data.find(b"\n", self.position, self.position + _MAX_LINE)
        if stop < 0:
            raise PickleEndsError(f"a text argument at {self.position} has no end")
        line = self._data[self.position : stop]
        self.position = stop + 1
        return line

    def take_u1(self) -> int:
        return self._data[self.take(1)]

    def take_u2(self) -> int:
        return int(_INT2(self._data, self.take(2))[0])

    def take_u4(self) -> int:
        return int(_UINT4(self._data, self.take(4))[0])

    def take_u8(self) -> int:
        return int(_UINT8(self._data, self.take(8))[0])

    def take_i4(self) -> int:
        return int(_INT4(self._data, self.take(4))[0])

    def take_double(self) -> float:
        return float(_DOUBLE(self._data, self.take(8))[0])
