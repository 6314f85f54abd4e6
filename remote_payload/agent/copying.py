"""Chunks from files of the node into another file there, by several threads, verified before they are written.

Nothing that is not verified is ever written, so what stands in the file already cannot be spoiled. Blocks are shared
where the file system knows how and both files have them at the same offset within a block: then what was verified
counts for what both files hold, as long as the file that it stood in has not been written to since. What was verified
as it came to the node is not even read again for that.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import mmap
import os
import queue
import stat
import struct
import threading
import time
from collections.abc import Generator, Sequence
from typing import Callable, NamedTuple, Optional, Union

from remote_payload.agent.verified import FileState, state_of
from remote_payload.wire.chunk_table import ChunkTable
from remote_payload.wire.chunks import CHUNK_BYTES

MAX_THREADS = 4
"""Each holds a chunk. Writing to one file, which takes two fifths of the time, is one thread's at a time."""
_AHEAD = 4
"""So many chunks more than there are threads may be copied and not yet be taken note of."""
_PIECE_BYTES = 256 * 1024
"""What is read and hashed at once: the processor's cache still holds it then."""
_SETTLED_S = 3.0
"""What was written to a younger file might not show in its time stamps."""
_MIN_SHARED_BYTES = 64 * 1024
_FICLONERANGE = 0x4020940D
"""Of Linux on most processors. Where it is another number this one is unknown, and nothing is shared."""
_CLONE = struct.Struct("=qQQQ")


class Place(NamedTuple):
    """Where a chunk may stand, or does, in a file that stands as it did when it was `verified`."""

    path: str
    offset: int
    verified: Optional[FileState] = None


class Copying:
    """Copies chunks of `table` into the file open as `fd`, each from the first of its places where it stands."""

    def __init__(self, table: ChunkTable, fd: int, work: Sequence[tuple[int, Sequence[Place]]]) -> None:
        self._table = table
        self._fd = fd
        self._todo = collections.deque(work)
        self._facts = os.fstat(fd)
        self._block_bytes = os.fstatvfs(fd).f_bsize
        self._writing = threading.Lock()
        self._is_over = threading.Event()
        self._may_go_on = threading.Semaphore(_AHEAD)
        self._results: queue.SimpleQueue[Union[int, OSError, None]] = queue.SimpleQueue()

    def copied(
        self, threads: int, interval_s: float, go_on: Callable[[], bool] = lambda: True
    ) -> Generator[Optional[int], None, None]:
        """The indices of chunks as they come to stand in the file, which threads do not run far ahead of; None after
        `interval_s` without one. No chunk is begun once `go_on` says no. Closed early, no thread is at it any more.
        Raises `OSError` where the file cannot be written to."""
        workers: list[threading.Thread] = []
        try:
            for _ in range(max(1, min(threads, MAX_THREADS, len(self._todo)))):
                worker = threading.Thread(target=self._work, args=(go_on,), name="copying")
                worker.start()
                workers.append(worker)
            at_work = len(workers)
            while at_work:
                try:
                    result = self._results.get(timeout=interval_s)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(result, OSError):
                    raise result
                if result is None:
                    at_work -= 1
                else:
                    yield result
                    self._may_go_on.release()
        finally:
            self._is_over.set()
            for _ in workers:
                self._may_go_on.release()
            for worker in workers:
                worker.join()

    def _work(self, go_on: Callable[[], bool]) -> None:
        try:
            # Takes memory only where it is filled, which what is shared hardly does.
            buffer = memoryview(mmap.mmap(-1, max(1, min(CHUNK_BYTES, self._table.size))))
            with contextlib.closing(_Source()) as source:
                while go_on() and not self._is_over.is_set():
                    try:
                        index, places = self._todo.popleft()
                    except IndexError:
                        break
                    if any(self._copy(source, place, index, buffer) for place in places):
                        self._results.put(index)
                        self._may_go_on.acquire()
        except OSError as error:
            self._results.put(error)
        finally:
            self._results.put(None)

    def _copy(self, source: _Source, place: Place, index: int, buffer: memoryview) -> bool:
        view = buffer[: self._table.length(index)]
        fd = source.opened(place.path)
        if fd is None:
            return False
        facts = os.fstat(fd)
        offset = self._table.offset(index)
        begin = end = 0
        if state_of(facts) == place.verified:
            begin, end = self._share(fd, facts, place.offset, offset, len(view))
        if begin < end:
            if not (_fill(fd, place.offset, view[:begin]) and _fill(fd, place.offset + end, view[end:])):
                return False
        elif _read(fd, place.offset, view) != self._table.sha256(index):
            return False
        else:
            begin, end = self._share(fd, facts, place.offset, offset, len(view))
        # The kernel lets one thread at a time write to a file, and the others turn in circles meanwhile.
        with self._writing:
            self._write(view[:begin], offset)
            self._write(view[end:], offset + end)
        return True

    def _share(self, source: int, facts: os.stat_result, start: int, offset: int, length: int) -> tuple[int, int]:
        """From where to where in the chunk both files have the same blocks now."""
        block = self._block_bytes
        if not block or (start - offset) % block or os.path.samestat(facts, self._facts):
            return 0, 0
        begin, end = -offset % block, length - (offset + length) % block
        is_settled = time.time() - max(facts.st_mtime, facts.st_ctime) >= _SETTLED_S
        if end - begin < _MIN_SHARED_BYTES or not is_settled:
            return 0, 0
        try:
            fcntl.ioctl(self._fd, _FICLONERANGE, _CLONE.pack(source, start + begin, end - begin, offset + begin))
        except OSError:
            self._block_bytes = 0  # it never will
            return 0, 0
        return (begin, end) if state_of(os.fstat(source)) == state_of(facts) else (0, 0)

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count


class _Source:
    """The file that a thread copies from, open for as long as it goes on with the same one."""

    def __init__(self) -> None:
        self._path = ""
        self._fd: Optional[int] = None

    def opened(self, path: str) -> Optional[int]:
        """None for what is no regular file that can be read."""
        if path != self._path:
            self.close()
            self._path, self._fd = path, _open(path)
        return self._fd

    def close(self) -> None:
        self._path, fd, self._fd = "", self._fd, None
        if fd is not None:
            os.close(fd)


def digest_at(place: Place, length: int) -> bytes:
    """The SHA-256 of what stands there; nothing where it cannot be read."""
    with contextlib.closing(_Source()) as source:
        fd = source.opened(place.path)
        return _read(fd, place.offset, memoryview(bytearray(length))) if fd is not None else b""


def _open(path: str) -> Optional[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def _read(fd: int, offset: int, view: memoryview) -> bytes:
    """Fill `view` from `offset` on; the SHA-256 of that, or nothing where it cannot be read."""
    digest = hashlib.sha256()
    return digest.digest() if _fill(fd, offset, view, digest.update) else b""


def _fill(fd: int, offset: int, view: memoryview, on_piece: Callable[[memoryview], None] = lambda _: None) -> bool:
    """Whether as much as `view` holds could be read from `offset` on."""
    while view:
        try:
            count = os.preadv(fd, [view[:_PIECE_BYTES]], offset)
        except OSError:
            return False
        if not count:
            return False
        on_piece(view[:count])
        view, offset = view[count:], offset + count
    return True
