"""Whether a chunk goes packed, and its packing beside the sending, where the link is slower than all packers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from remote_payload.wire.packing import WIDTHS, pack

MIN_BYTES = 256 * 1024
"""Smaller chunks are not worth a look."""
MAX_WORKERS = 4
"""zlib lets go of the interpreter; splitting into planes does not, and takes a tenth of the time."""
SPARE_CHUNKS = 2
"""Chunks that are packed or wait for a worker, beyond one a worker: what all streams together hold in memory."""
_SAMPLE_BYTES = 16 * 1024
_SAMPLES = 4
_WORTH = 0.95
_FIRST_GUESS_BYTES_PER_S = 80e6
_NEWEST = 0.3
"""Weight of the newest measurement in a rate."""
_MEASURE_S = 0.25
"""A link is measured over so much time: what one chunk leaves in buffers would tell a faster one."""
_LOST_HALF = 0.5
"""Packers that were too slow are measured anew once the link has so much left of its rate."""

PackedChunk = Future["bytes | None"]
"""A chunk in fewer bytes, or None where it had better go as it is."""


class Packer:
    """Packs the chunks of one transfer in threads of its own; its methods may be called from several threads.

    Packing and sending overlap, so packing pays where the link is slower than all workers together, and a chunk
    shrinks. Both rates are measured as the transfer goes on, the workers' with each chunk that they pack; until the
    link's is known, chunks go as they are.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, workers: int | None = None) -> None:
        self._clock = clock
        self._workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="packer")
        self._lock = threading.Lock()
        self._free_places = self._workers + SPARE_CHUNKS
        self._is_closed = False
        self._worker_bytes_per_s = _FIRST_GUESS_BYTES_PER_S
        self._link_bytes_per_s: float | None = None
        self._fastest_bytes_per_s = 0.0
        self._senders = 0
        self._looked_at = clock()
        self._sending_s = 0.0
        self._sent_bytes = 0

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Around handing a chunk to a stream: what all streams carry is measured while any of them is sending."""
        self._change_senders(1)
        try:
            yield
        finally:
            self._change_senders(-1)

    def note_sent(self, count: int) -> None:
        """So many bytes more were handed to a stream, packed or not."""
        with self._lock:
            self._look_at_clock()
            self._sent_bytes += count
            if self._sending_s >= _MEASURE_S:
                # A piece that a slow link takes long for counts for as long.
                spans = self._sending_s / _MEASURE_S
                link = _mean(self._link_bytes_per_s, self._sent_bytes / self._sending_s, spans)
                self._link_bytes_per_s = link
                self._fastest_bytes_per_s = max(self._fastest_bytes_per_s, link)
                self._sending_s, self._sent_bytes = 0.0, 0

    @property
    def pays(self) -> bool:
        """Whether the next chunk is to be packed, as far as the rates tell."""
        with self._lock:
            packers = self._worker_bytes_per_s * self._workers
            return packing_pays(self._link_bytes_per_s, packers, self._fastest_bytes_per_s)

    def begin(self, length: int, read: Callable[[], bytes]) -> PackedChunk | None:
        """Begin to pack a chunk; None where that does not pay, or there is no place. `read` is called in a worker,
        and what it raises is the future's. What was begun is to be handed to `end`."""
        if length < MIN_BYTES or not self.pays:
            return None
        with self._lock:
            if self._is_closed or not self._free_places:
                return None
            self._free_places -= 1
            self._fastest_bytes_per_s = self._link_bytes_per_s or 0.0
            return self._pool.submit(self._pack, read)

    def end(self, chunk: PackedChunk) -> None:
        """The chunk is sent, or is not to be: its place is free as soon as no worker has it any more."""
        chunk.cancel()
        chunk.add_done_callback(lambda _: self._free_place())

    def close(self) -> None:
        """Wait for what is being packed; nothing is read any more afterwards."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _pack(self, read: Callable[[], bytes]) -> bytes | None:
        data = read()
        width, ratio = best_width(data)
        if ratio > _WORTH:
            return None
        begun = self._clock()
        packed = pack(data, width)
        rate = len(data) / max(self._clock() - begun, 1e-6)
        with self._lock:
            self._worker_bytes_per_s = _mean(self._worker_bytes_per_s, rate)
        return packed if len(packed) < len(data) else None

    def _free_place(self) -> None:
        with self._lock:
            self._free_places += 1

    def _change_senders(self, change: int) -> None:
        with self._lock:
            self._look_at_clock()
            self._senders += change

    def _look_at_clock(self) -> None:
        now = self._clock()
        if self._senders:
            self._sending_s += now - self._looked_at
        self._looked_at = now


def packing_pays(link: float | None, packers: float, fastest: float) -> bool:
    """Whether to pack a chunk, by rates in bytes/s: the link's now, all packers' as last measured, and the highest that
    the link had since a chunk was last given to them. One that has lost half since then gives them one, to measure them
    anew."""
    return link is not None and (link < packers or link < _LOST_HALF * fastest)


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


def _mean(before: float | None, newest: float, times: float = 1.0) -> float:
    """The rate after `newest` was measured so many times in a row."""
    return newest if before is None else newest + (1.0 - _NEWEST) ** times * (before - newest)
