"""Whether a chunk goes packed: where a sample of it says how much smaller it gets, and the link is slow enough."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from remote_payload.wire.packing import WIDTHS, pack

MIN_BYTES = 256 * 1024
"""Smaller chunks are not worth a look."""
_SAMPLE_BYTES = 16 * 1024
_SAMPLES = 4
_WORTH = 0.95
_FIRST_GUESS_BYTES_PER_S = 80e6
_NEWEST = 0.3
"""Weight of the newest measurement in a rate."""


class Packer:
    """Packs the chunks of one transfer; its methods may be called from several threads.

    Packing and sending take turns on a stream, so packing pays where `1 / packing_rate < (1 - ratio) / sending_rate`.
    Both rates are measured as the transfer goes on; until the link's is known, chunks go as they are.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._packing_bytes_per_s = _FIRST_GUESS_BYTES_PER_S
        self._sending_bytes_per_s: float | None = None

    def note_sent(self, count: int, seconds: float) -> None:
        """So many bytes were handed to a stream in so much time; small ones vanish in buffers and tell nothing."""
        if count >= MIN_BYTES:
            with self._lock:
                self._sending_bytes_per_s = _mean(self._sending_bytes_per_s, count / max(seconds, 1e-6))

    def pack(self, length: int, read: Callable[[], bytes]) -> bytes | None:
        """The chunk in fewer bytes, or None where it had better go as it is. `read` is called where that may pay."""
        if length < MIN_BYTES or not self._pays(0.0):
            return None
        data = read()
        width, ratio = best_width(data)
        if ratio > _WORTH or not self._pays(ratio):
            return None
        begun = self._clock()
        packed = pack(data, width)
        with self._lock:
            rate = length / max(self._clock() - begun, 1e-6)
            self._packing_bytes_per_s = _mean(self._packing_bytes_per_s, rate)
        return packed if len(packed) < length else None

    def _pays(self, ratio: float) -> bool:
        with self._lock:
            sending = self._sending_bytes_per_s
            return sending is not None and sending < self._packing_bytes_per_s * (1 - ratio)


def best_width(data: bytes) -> tuple[int, float]:
    """(element width, packed bytes / bytes) of the width that packs a sample best."""
    size = _SAMPLE_BYTES
    step = max(size, (len(data) - size) // (_SAMPLES - 1) // 8 * 8)
    sample = b"".join(data[start : start + size] for start in range(0, len(data), step))
    if not sample:
        return 1, 1.0
    ratios = {width: len(pack(sample, width)) / len(sample) for width in WIDTHS}
    width = min(ratios, key=lambda width: ratios[width])
    return width, ratios[width]


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST * (newest - before)
