"""Output of a remote script, kept up to a bound."""

from __future__ import annotations


class BoundedBytes:
    """Keeps the first `limit_bytes` of what is added and counts the rest. One thread adds; others may read."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._parts: list[bytes] = []
        self._kept_bytes = 0
        self.dropped_bytes = 0

    def add(self, data: bytes) -> None:
        kept = data[: self._limit_bytes - self._kept_bytes]
        if kept:
            self._parts.append(kept)
            self._kept_bytes += len(kept)
        self.dropped_bytes += len(data) - len(kept)

    def value(self) -> bytes:
        return b"".join(self._parts)
