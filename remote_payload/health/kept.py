"""Compiled kernels that are kept between runs, in a folder of this user's for what can be made again."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from typing import Optional

CACHE_VARIABLE = "REMOTE_EVAL_CACHE"
"""Names the folder for what can be made again; otherwise the user's own."""
MOST_KEPT = 8
"""Of each kind: homes are shared between unlike machines, and old sources leave old files."""


def own_folder() -> Optional[str]:
    """A folder that belongs to this user, whom nobody else can slip a library into; None if there can be none."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    folder = os.environ.get(CACHE_VARIABLE) or os.path.join(cache, "remote-eval")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return None
    is_private = stat.S_ISDIR(status.st_mode) and _only_we_write(status)
    return folder if is_private and os.access(folder, os.W_OK) else None


def is_ours(path: str) -> bool:
    """Whether a regular file stands at `path` that nobody else could have written."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and _only_we_write(status)


def read_kept(path: str) -> Optional[bytes]:
    """What stands at `path`, if it is ours."""
    if not is_ours(path):
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def write_kept(path: str, data: bytes) -> None:
    """Put `data` at `path` at once as a whole; where that cannot be, it is made again next time."""
    with contextlib.suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(prefix=".kept-", dir=os.path.dirname(path))
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def forget_old(path: str) -> None:
    """Mark `path` as used now, and remove those of its kind that were not used for longest, beyond `MOST_KEPT`.

    A kind is what stands before the name's first hyphen. A library that a process has loaded stays loaded.
    """
    folder, name = os.path.split(path)
    kind = name.split("-", 1)[0] + "-"
    with contextlib.suppress(OSError):
        # The time of access is ours to set: many file systems are mounted without it.
        os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
    with contextlib.suppress(OSError):
        with os.scandir(folder) as entries:
            found = [(e.stat(follow_symlinks=False).st_atime_ns, e.path) for e in entries if e.name.startswith(kind)]
        for _, old in sorted(found, reverse=True)[MOST_KEPT:]:
            os.unlink(old)


def _only_we_write(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022
