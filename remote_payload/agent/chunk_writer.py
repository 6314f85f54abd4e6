"""Writing chunks to their places in a file that other processes write to as well."""

from __future__ import annotations

import mmap
import os
import time

from remote_payload.agent import quota

CONTENDED_BYTES_PER_S = 1e9
"""Who writes to memory more slowly than this waits for others."""
MAPPED_IN_A_ROW = 32
_MADV_POPULATE_WRITE = 23


class ChunkWriter:
    """Writes by `pwrite`. In a memory file system all writers of a file queue, spinning, for its one lock: where that
    shows, the next chunks are copied into a mapping of the file, which costs one writer more and eight of them less."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._is_in_memory = quota.file_system_type(path) == "tmpfs"
        self._mapped_to_come = 0

    def write(self, data: memoryview, offset: int) -> None:
        """Raises `OSError`, on a full disk too."""
        if self._mapped_to_come:
            self._mapped_to_come -= 1
            if write_mapped(self._fd, data, offset):
                return
        began, length = time.monotonic(), len(data)
        while data:
            count = os.pwrite(self._fd, data, offset)
            data, offset = data[count:], offset + count
        if self._is_in_memory and (time.monotonic() - began) * CONTENDED_BYTES_PER_S > length:
            self._mapped_to_come = MAPPED_IN_A_ROW


def write_mapped(fd: int, data: memoryview, offset: int) -> bool:
    """Copy `data` into a mapping of the file, which it must not exceed. False, with nothing written, where the kernel
    cannot say beforehand that there is room: to touch a page that there is no room for would end the process."""
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        with mmap.mmap(fd, offset + len(data) - start, offset=start) as mapping:
            mapping.madvise(_MADV_POPULATE_WRITE)
            mapping[offset - start :] = data
    except (OSError, ValueError):
        return False
    return True
