"""The numbers in one-element tensors (counters, optimizer steps, losses), read with the header."""

from __future__ import annotations

import struct
from typing import Any, Callable

from remote_payload.checkpoint import dtypes
from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.plain import json_number


class SingleValues:
    """Reads at most `limit` of them; `read_bytes(file, offset, length)` gives the raw bytes."""

    def __init__(self, read_bytes: Callable[[int, int, int], bytes], byte_order: str, limit: int) -> None:
        self._read_bytes = read_bytes
        self._order = ">" if byte_order == "big" else "<"
        self._left = limit

    def read(self, file: int, offset: int, dtype: str) -> Any:
        """A number or bool, a text for what is not finite, None for types that are no plain numbers."""
        code = dtypes.STRUCT_CODES.get(dtype)
        if self._left <= 0 or (code is None and dtype != "bfloat16"):
            return None
        self._left -= 1
        try:
            data = self._read_bytes(file, offset, dtypes.ITEM_BYTES[dtype])
        except CheckpointError:
            return None
        if dtype == "bfloat16":
            # A bfloat16 is the upper half of a float32.
            data = data + b"\0\0" if self._order == ">" else b"\0\0" + data
            code = "f"
        value = struct.unpack(f"{self._order}{code}", data)[0]
        if dtype == "bool":
            return bool(value)
        return json_number(value) if isinstance(value, float) else value
