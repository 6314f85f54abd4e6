"""Memory that the host of a virtual machine has given already, for files in a tmpfs.

Some hosts take back what a guest does not use, and give it again 4 KiB at a time: 10 microseconds each, or 0.4 GB/s,
whoever writes. What is measured then is the host. A cushion of used memory shrinks here as fast as files grow.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

_AHEAD_BYTES = 512 * 1024 * 1024
_LOOK_S = 0.02
_PIECE = bytes(8 * 1024 * 1024)


@contextlib.contextmanager
def warm_memory(folder: Path, size: int) -> Iterator[None]:
    """For the time of the context the next `size` bytes that are written below `folder` find such memory; nothing is
    done where it is no tmpfs."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True).stdout
    if kind.strip() != "tmpfs":
        yield
        return
    cushion = folder / "cushion"
    with cushion.open("wb") as file:
        for _ in range(size // len(_PIECE)):
            file.write(_PIECE)
        file.flush()
        wanted_used, left, is_over = _used_bytes(folder) - _AHEAD_BYTES, file.tell(), threading.Event()

        def follow() -> None:
            nonlocal left
            while left and not is_over.wait(_LOOK_S):
                left = max(0, min(left, left - (_used_bytes(folder) - wanted_used)))
                os.truncate(cushion, left)

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            cushion.unlink()


def _used_bytes(folder: Path) -> int:
    facts = os.statvfs(folder)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize
