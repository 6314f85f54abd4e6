"""Advisory locks (`flock`) among our own processes; a process that dies lets go of its locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Callable

from remote_payload.agent.failure import AgentError
from remote_payload.wire.names import check_nonce

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_POLL_S = 0.1
_WAIT_S = 60.0


def try_lock(fd: int, operation: int) -> bool:
    """Take or change the lock without waiting. Where the file system has no locks everybody gets it."""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


@contextlib.contextmanager
def alone(path: str, what: str, tell: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock at `path`. `tell` is called while others do; `AgentError` conflict after a minute of that."""
    fd = os.open(path, _OPEN, 0o600)
    try:
        deadline = time.monotonic() + _WAIT_S
        while not try_lock(fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise AgentError("conflict", f"another process has been {what} for too long ({path})", "Try again.")
            tell()
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


class SessionLock:
    """Lets the streams of one upload session share a checkpoint folder, and keeps all other sessions out.

    The first of a session takes the lock exclusively, writes the session's name, prepares the folder, and then shares
    it; others join only while that name stands there. Where the file system has no locks everybody is let in: chunks
    are verified before they are written, so two sessions write the same bytes, and only work is done twice.
    """

    def __init__(self, path: str, session: str) -> None:
        self._path = path
        self._session = check_nonce(session).encode()
        self._fd = self._open()

    def try_exclusive(self) -> bool:
        """Take the lock for this session alone, for now. Makes the folder anew where it was deleted since."""
        while True:
            if not try_lock(self._fd, fcntl.LOCK_EX):
                return False
            if self._is_in_place():
                break
            os.close(self._fd)
            self._fd = self._open()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, self._session, 0)
        return True

    def try_shared(self) -> bool:
        """Take, or fall back to, a share in this session's lock."""
        if not try_lock(self._fd, fcntl.LOCK_SH):
            return False
        if os.pread(self._fd, len(self._session) + 1, 0) == self._session:
            return True
        try_lock(self._fd, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        os.close(self._fd)

    def _open(self) -> int:
        while True:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # deleted between the two
                return os.open(self._path, _OPEN, 0o600)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False
