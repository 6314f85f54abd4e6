"""Whether packing a chunk pays, by the measured rates of the link and of the packers; one rule for client and node."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Callable, Optional

MIN_BYTES = 256 * 1024
"""Smaller chunks are not worth a look."""
_FIRST_GUESS_BYTES_PER_S = 80e6
_NEWEST = 0.3
"""Weight of the newest measurement in a rate."""
_MEASURE_S = 0.25
"""A link is measured over so much time: what one chunk leaves in buffers would tell a faster one."""
_PART_PACKED = 0.7
"""Of a link's rate. Where what the packers do not get to goes as it is, it still pays with packers so much slower than
the link. Where they are slower yet, the processors are what the link waits for."""
_RETRY_S = 2.0
"""Packers that were too slow are measured anew, with one chunk, after so long."""


class PackingRates:
    """Measures what tells whether packing pays, as a transfer goes on. For several threads.

    Until the link's rate is known, chunks go as they are; the packers' is a guess until they have packed one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._packer_bytes_per_s = _FIRST_GUESS_BYTES_PER_S
        self._unpacker_bytes_per_s = math.inf
        self._link_bytes_per_s: Optional[float] = None
        self._tried_at = clock()
        self._movers = 0
        self._looked_at = clock()
        self._moving_s = 0.0
        self._moved_bytes = 0

    @property
    def knows_link(self) -> bool:
        with self._lock:
            return self._link_bytes_per_s is not None

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Around moving a chunk that is ready: what all streams carry is measured while any of them moves one. The time
        that a lost stream stood still tells nothing of the link."""
        self._change_movers(1)
        try:
            yield
        except BaseException:
            self._forget_moment()
            raise
        finally:
            self._change_movers(-1)

    def note_moved(self, count: int) -> None:
        """So many bytes more went over a stream, packed or not."""
        with self._lock:
            self._look_at_clock()
            self._moved_bytes += count
            if self._moving_s >= _MEASURE_S:
                # A piece that a slow link takes long for counts for as long.
                spans = self._moving_s / _MEASURE_S
                self._link_bytes_per_s = _mean(self._link_bytes_per_s, self._moved_bytes / self._moving_s, spans)
                self._moving_s, self._moved_bytes = 0.0, 0

    def note_packed(self, count: int, seconds: float) -> None:
        """One packer took so long for a chunk of `count` bytes."""
        with self._lock:
            self._packer_bytes_per_s = _mean(self._packer_bytes_per_s, count / max(seconds, 1e-6))

    def note_unpacked(self, count: int, seconds: float) -> None:
        """Unpacking took so long for a chunk of `count` bytes, where that is done here."""
        with self._lock:
            rate = count / max(seconds, 1e-6)
            before = self._unpacker_bytes_per_s
            self._unpacker_bytes_per_s = _mean(before if math.isfinite(before) else None, rate)

    def pays(self, packers: float) -> bool:
        """Whether the next chunk is to be packed, as far as the rates of the link and of so many packers tell."""
        with self._lock:
            rate = min(self._packer_bytes_per_s, self._unpacker_bytes_per_s) * packers
            return packing_pays(self._link_bytes_per_s, rate, self._clock() - self._tried_at)

    def pays_beside(self, packers: float) -> bool:
        """The same where the link does not wait for the packers."""
        return self.pays(packers / _PART_PACKED)

    def note_tried(self) -> None:
        """A chunk is given to a packer."""
        with self._lock:
            self._tried_at = self._clock()

    def _change_movers(self, change: int) -> None:
        with self._lock:
            self._look_at_clock()
            self._movers += change

    def _forget_moment(self) -> None:
        with self._lock:
            self._looked_at = self._clock()
            self._moving_s, self._moved_bytes = 0.0, 0

    def _look_at_clock(self) -> None:
        now = self._clock()
        if self._movers:
            self._moving_s += now - self._looked_at
        self._looked_at = now


def packing_pays(link: Optional[float], packers: float, untried_s: float) -> bool:
    """Whether to pack a chunk, by rates in bytes/s, the link's now and all packers' as last measured, and by how long
    ago a chunk was last given to them."""
    return link is not None and (link < packers or untried_s >= _RETRY_S)


def _mean(before: Optional[float], newest: float, times: float = 1.0) -> float:
    """The rate after `newest` was measured so many times in a row."""
    return newest if before is None else newest + (1.0 - _NEWEST) ** times * (before - newest)
