"""How far a transfer is, how fast, and how fast it may be."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable

_RATE_WINDOW_S = 12.0
"""Two of the signs of life that a slow link gives (`receive.ALIVE_INTERVAL_S`), and a little."""


@dataclasses.dataclass(frozen=True)
class TransferProgress:
    """`bytes_done` counts what is at its target.

    `bytes_per_s` is of the last seconds; `eta_s` None where nothing moved in them. `streams`: how many carry it now.
    `bytes_saved` needed no sending; `bytes_reused` is the part of them that the target copied from other files that it
    has. `bytes_packed` is what packing took off what was sent.
    """

    bytes_done: int
    bytes_total: int
    bytes_per_s: float
    eta_s: float | None
    bytes_saved: int = 0
    streams: int = 1
    bytes_reused: int = 0
    bytes_packed: int = 0


ProgressListener = Callable[[TransferProgress], None]
"""Called from the thread that asked for the transfer, several times a second at most per chunk; it must return soon."""


class ProgressMeter:
    """Turns byte counts into `TransferProgress`. Not for several threads."""

    def __init__(self, bytes_total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = bytes_total
        self._clock = clock
        self._seen: collections.deque[tuple[float, int]] = collections.deque()

    def measure(
        self, bytes_moved: int, bytes_saved: int, streams: int = 1, *, bytes_reused: int = 0, bytes_packed: int = 0
    ) -> TransferProgress:
        """`bytes_moved` counts from the start of the transfer, without what was saved."""
        now = self._clock()
        done = min(bytes_moved + bytes_saved, self._total)
        while len(self._seen) > 1 and self._seen[0][0] < now - _RATE_WINDOW_S:
            self._seen.popleft()
        if not self._seen or self._seen[-1][1] != bytes_moved:
            self._seen.append((now, bytes_moved))
        then, moved_then = self._seen[0]
        rate = max(bytes_moved - moved_then, 0) / (now - then) if now > then else 0.0
        eta_s = (self._total - done) / rate if rate > 0 else None
        return TransferProgress(done, self._total, rate, eta_s, bytes_saved, streams, bytes_reused, bytes_packed)


class TokenBucket:
    """Holds senders to `bytes_per_s` on average and together, with bursts of a quarter of a second. None: no limit."""

    def __init__(
        self,
        bytes_per_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError("a bandwidth limit is above 0 bytes/s")
        self._rate = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()
        self._lock = threading.Lock()

    def piece_bytes(self, largest: int) -> int:
        """How much to send at once, so that the longest pause stays near a quarter of a second."""
        return largest if self._rate is None else max(1024, min(largest, int(self._rate / 4)))

    def take(self, count: int) -> None:
        """Wait until `count` more bytes may go."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now - 0.25) + count / self._rate
            wait_s = self._free_at - now
        if wait_s > 0:
            self._sleep(wait_s)
