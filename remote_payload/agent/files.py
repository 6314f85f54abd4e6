"""Reading and writing small files so that a crash or a neighbour can never leave half of one behind."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from typing import Any, Optional

NO_HARD_LINKS = {errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_OPEN_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def fsync_folder(folder: str) -> None:
    """Make renames and new names in `folder` durable. File systems that cannot sync a folder are left alone."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_new(path: str, data: bytes) -> None:
    """Create `path` with `data`, synced. Raises `FileExistsError`; removes what it began if it cannot finish."""
    descriptor = os.open(path, _OPEN_NEW, 0o600)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        os.unlink(path)
        raise


def replace(path: str, data: bytes) -> None:
    """Put `data` at `path` in one step: whoever reads it sees the old contents or the new."""
    temporary = _temporary_beside(path)
    write_new(temporary, data)
    try:
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    fsync_folder(os.path.dirname(path))


def create_once(path: str, data: bytes) -> bool:
    """Create `path` with all of `data` at once, unless it exists. True for the one caller who did."""
    temporary = _temporary_beside(path)
    write_new(temporary, data)
    try:
        won = _link(temporary, path, data)
    finally:
        os.unlink(temporary)
    if won:
        fsync_folder(os.path.dirname(path))
    return won


def _link(temporary: str, path: str, data: bytes) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # Over NFS the answer to a link that did happen may be lost and the retry refused: the link count tells.
        return os.stat(temporary).st_nlink == 2
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        try:
            write_new(path, data)
        except FileExistsError:
            return False
    return True


def read_up_to(path: str, max_bytes: int, offset: int = 0) -> Optional[bytes]:
    """At most `max_bytes` from `offset`, or None where there is no regular file. Follows no link, waits for no pipe."""
    try:
        descriptor = os.open(path, _OPEN_READ)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        parts, position = [], offset
        while position < offset + max_bytes:
            part = os.pread(descriptor, offset + max_bytes - position, position)
            if not part:
                break
            parts.append(part)
            position += len(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def read_json(path: str, max_bytes: int = 64 * 1024 * 1024) -> Any:
    """The JSON value in `path`, or None where there is no such file. Raises `ValueError` for what is no JSON."""
    data = read_up_to(path, max_bytes)
    return None if data is None else parse_json(data)


def parse_json(data: bytes) -> Any:
    """Like `json.loads`, and text that is nested too deep is a `ValueError` too."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _temporary_beside(path: str) -> str:
    return f"{path}.{secrets.token_hex(8)}.tmp"
