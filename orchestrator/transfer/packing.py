"""Packing chunks beside the sending, where the link is not much faster than all packers, and unpacking."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from orchestrator.transfer.channel import damaged
from remote_payload.wire.codec import WireError
from remote_payload.wire.packing import pack_floats, unpack
from remote_payload.wire.packing_rates import MIN_BYTES, PackingRates
from remote_payload.wire.processors import usable_processors
from remote_payload.wire.stream import PACKED_ENCODING, RAW_ENCODING

MAX_WORKERS = 4
"""zlib lets go of the interpreter; splitting into planes does not, and takes a tenth of the time."""
SPARE_CHUNKS = 4
"""Chunks that are packed, are being sent or wait for a worker, beyond one a worker: what all streams together hold in
memory."""

PackedChunk = Future[tuple[int, bytes]]
"""(encoding, body) of a chunk's DATA frame: in fewer bytes, or as it was read where it had better go so."""


class Packer:
    """Packs the chunks of one transfer in threads of its own; its methods may be called from several threads.

    Until the link's rate is known it packs a chunk for each worker, so that some are ready by then. What it has read is
    not read again: it goes as it is where packing does not shrink it, and waits where the stream that asked is lost.
    """

    def __init__(
        self, rates: PackingRates, clock: Callable[[], float] = time.monotonic, workers: int | None = None
    ) -> None:
        self.rates = rates
        self._clock = clock
        self._workers = workers or min(MAX_WORKERS, usable_processors())
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="packer")
        self._lock = threading.Lock()
        self._places = self._workers + SPARE_CHUNKS
        self._taken_places = 0
        self._begun = 0
        self._left_over = dict[tuple[int, int], PackedChunk]()
        self._is_closed = False

    @property
    def pays(self) -> bool:
        """Whether the next chunk is to be packed, as far as the rates tell."""
        return self.rates.pays_beside(self._workers)

    @property
    def has_room(self) -> bool:
        """Whether `begin` would take another chunk."""
        may_begin = self.pays if self.rates.knows_link else self._begun < self._workers
        return not self._is_closed and self._taken_places < self._places and may_begin

    def begin(self, offset: int, length: int, read: Callable[[int, int], bytes]) -> PackedChunk | None:
        """Begin to pack the chunk that stands at `offset`; None where that does not pay, or there is no place. `read`
        is called in a worker, and what it raises is the future's. What was begun goes to `end` or `leave` at last."""
        with self._lock:
            left_over = self._left_over.pop((offset, length), None)
            if left_over is not None:
                return left_over
            if length < MIN_BYTES or not self.has_room:
                return None
            self._taken_places += 1
            self._begun += 1
            self.rates.note_tried()
            return self._pool.submit(self._pack, offset, length, read)

    def leave(self, offset: int, length: int, chunk: PackedChunk) -> None:
        """The stream that asked for the chunk is lost: it keeps its place until `begin` is asked for it again."""
        with self._lock:
            self._left_over[offset, length] = chunk

    def end(self, chunk: PackedChunk) -> None:
        """The chunk is sent, or is not to be: its place is free as soon as no worker has it any more."""
        chunk.cancel()
        chunk.add_done_callback(lambda _: self._free_place())

    def close(self) -> None:
        """Wait for what is being packed; nothing is read any more afterwards."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _pack(self, offset: int, length: int, read: Callable[[int, int], bytes]) -> tuple[int, bytes]:
        data = read(offset, length)
        begun = self._clock()
        packed = pack_floats(data)
        if packed is None:
            return RAW_ENCODING, data
        self.rates.note_packed(len(data), self._clock() - begun)
        return PACKED_ENCODING, packed

    def _free_place(self) -> None:
        with self._lock:
            self._taken_places -= 1


class Unpacker:
    """Unpacks the chunks of one transfer, as many at once as there are processors to pack them: that bounds memory. It
    is used again, since fresh memory costs a quarter of the time."""

    def __init__(self, rates: PackingRates) -> None:
        self._rates = rates
        self._places = threading.Semaphore(min(MAX_WORKERS, usable_processors()))
        self._spare: list[bytearray] = []

    @contextlib.contextmanager
    def unpacked(self, body: memoryview, length: int) -> Iterator[memoryview]:
        """The `length` bytes that were packed. Raises `StreamDamagedError` for anything else."""
        with self._places:
            memory = bytearray()
            with contextlib.suppress(IndexError):
                memory = self._spare.pop()
            if len(memory) < length:
                memory = bytearray(length)
            try:
                begun = time.monotonic()
                try:
                    data = unpack(body, length, memory)
                except WireError as error:
                    raise damaged(error) from error
                self._rates.note_unpacked(length, time.monotonic() - begun)
                with data:
                    yield data
            finally:
                self._spare.append(memory)
