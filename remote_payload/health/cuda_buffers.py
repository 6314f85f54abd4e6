"""Memory of the pass on a GPU: pinned buffers with their streams, results, and counters that stay on the device."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np
import torch

from remote_payload.health.distribution import Array

_RESULT_BYTES = 1 << 20
_COUNTERS_AT_ONCE = 64
_RETRY_S = 0.01


class Pair:
    """As much pinned memory as device memory, and both addresses."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(size, dtype=torch.uint8, device=device)
        self.view: Array = self.host.numpy()
        self.size, self.host_address, self.device_address = size, self.host.data_ptr(), self.device.data_ptr()


class Buffer:
    """Room for blocks, room for their results, and a stream."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.stream = int(self._stream.cuda_stream)
        self.data = Pair(size, device)
        self.results = Pair(_RESULT_BYTES, device)

    def synchronize(self) -> None:
        """Wait for all that was queued on its stream."""
        self._stream.synchronize()

    def make_room(self, count: int) -> None:
        """Room for `count` bytes of results. None of earlier blocks' may still be under way."""
        if count > self.results.size:
            self.results = Pair(1 << (count - 1).bit_length(), self._device)


class Buffers:
    """At most `most` buffers, made one by one while they are needed: pinning memory that the system has to find first
    takes longer than reading into it, and several threads that do it at once are no faster."""

    def __init__(self, most: int, size: int, device: torch.device) -> None:
        self._left, self._size, self._device = most, size, device
        self._making = threading.Lock()
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()

    @contextlib.contextmanager
    def one(self) -> Iterator[Buffer]:
        """A buffer for the time of the context. The device must be the current one."""
        buffer = self._take()
        try:
            yield buffer
        finally:
            self._free.put(buffer)

    def _take(self) -> Buffer:
        wait_s = 0.0
        while True:
            with contextlib.suppress(queue.Empty):
                return self._free.get(wait_s > 0, wait_s)
            if self._making.acquire(blocking=False):
                try:
                    if self._left:
                        buffer = Buffer(self._size, self._device)
                        self._left -= 1
                        return buffer
                finally:
                    self._making.release()
            # Somebody else makes one now, or all are in use. Whoever makes one may fail.
            wait_s = _RETRY_S


class Counters:
    """A group's counters of bit patterns stay on the device until its last block is in: half a megabyte each, few at a
    time. Those that are done with are zeroed and used again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._in_use: dict[int, torch.Tensor] = {}
        self._free = list(self._zeroed(_COUNTERS_AT_ONCE))
        self._fetched = torch.empty(1 << 16, dtype=torch.int64, pin_memory=True)

    def address(self, group: int) -> int:
        """Where a group's counters are on the device; from the first call on they are its own."""
        with self._lock:
            counts = self._in_use.get(group)
            if counts is None:
                if not self._free:
                    self._free.extend(self._zeroed(_COUNTERS_AT_ONCE))
                counts = self._in_use[group] = self._free.pop()
            return counts.data_ptr()

    def take(self, group: int) -> Optional[Array]:
        """A group's counts, None if there are none. Nothing may add to them any more."""
        with self._lock:
            counts = self._in_use.pop(group, None)
        if counts is None:
            return None
        self._fetched.copy_(counts, non_blocking=True)
        counts.zero_()
        self._wait()
        found: Array = self._fetched.numpy().copy()
        with self._lock:
            self._free.append(counts)
        return found

    def _zeroed(self, number: int) -> Sequence[torch.Tensor]:
        made = torch.zeros((number, 1 << 16), dtype=torch.int64, device=self._device).unbind(0)
        self._wait()
        return made

    def _wait(self) -> None:
        # Other streams than the current one, which zeroes them, add to them from now on.
        torch.cuda.current_stream(self._device).synchronize()


class Arena:
    """Where in a buffer's results each result is: zeroed at once and fetched at once."""

    def __init__(self, buffer: Buffer) -> None:
        self.size = 0
        self._buffer = buffer

    def reserve(self, count: int) -> int:
        at = self.size
        self.size += -(-count // 256) * 256
        return at

    def address(self, at: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._buffer.results.device_address + at)

    def get(self, at: int, dtype: Any, count: int) -> Array:
        """A view, good until the buffer's next use."""
        width = np.dtype(dtype).itemsize
        return self._buffer.results.view[at : at + count * width].view(dtype)
