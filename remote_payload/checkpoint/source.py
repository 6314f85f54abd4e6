"""A file that is read by position, so that one that shrinks meanwhile gives an error and not a crash."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from types import TracebackType
from typing import Callable, Optional

from remote_payload.checkpoint.errors import (
    BytesNotSentError,
    CheckpointError,
    CheckpointIsDirectoryError,
    MissingCheckpointError,
    NotACheckpointError,
    TruncatedCheckpointError,
    UnreadableCheckpointError,
)
from remote_payload.wire.chunks import Fingerprint
from remote_payload.wire.codec import WireError
from remote_payload.wire.folders import folder_fingerprint
from remote_payload.wire.layout import part_of
from remote_payload.wire.parts import ReadableSpans, parse_readable

_ASKED_BYTES = 512 * 1024
"""Linux begins to read no more of a longer request than its device takes at once."""
_MAX_LIST_BYTES = 256 * 1024 * 1024


class Source:
    """An open regular file. Context manager; `read` is safe from several threads at once.

    A file of a node's store of which only a part is kept is read as if it were whole, and `BytesNotSentError` is raised
    for every use that touches a byte which had not been sent and verified by the last look at it: the first is at the
    beginning, each `look_again` another. `on_read` is told what `read` is asked for.
    """

    def __init__(self, path: str, on_read: Optional[Callable[[int, int], None]] = None) -> None:
        self.path = path
        self._descriptor, self._readable = _open_stored(path)
        self._on_read = on_read
        self.size = os.fstat(self._descriptor).st_size

    @property
    def is_whole(self) -> bool:
        """Whether all of the file is there."""
        return self._readable is None

    def holds(self, offset: int, length: int) -> bool:
        """Whether these bytes may be read."""
        readable = self._readable
        return readable is None or readable.hold(offset, length)

    def look_again(self) -> None:
        """Take in what has arrived of a part since. What may be read only grows: once the file stands it is all, and
        another part that was begun instead is not looked at."""
        if self._readable is None:
            return
        try:
            descriptor, readable = _open_stored(self.path)
        except CheckpointError:
            return
        try:
            found, ours = os.fstat(descriptor), os.fstat(self._descriptor)
            if readable is not None:
                if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
                    self._readable = readable
            elif found.st_size == self.size:
                # In one step: other threads go on reading, the same bytes.
                os.dup2(descriptor, self._descriptor, inheritable=False)
                self._readable = None
        finally:
            os.close(descriptor)

    def descriptor_for(self, offset: int, length: int) -> int:
        """For reading these bytes by position, as long as the source is open."""
        self._check_sent(offset, length)
        return self._descriptor

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises `TruncatedCheckpointError` if the file ends before."""
        if offset + length > self.size:
            raise TruncatedCheckpointError(f"{self.path} ends at byte {self.size}, {offset + length} bytes are needed")
        self._check_sent(offset, length)
        if self._on_read is not None:
            self._on_read(offset, length)
        pieces, got = [], 0
        while got < length:
            try:
                piece = os.pread(self._descriptor, min(length - got, 1 << 30), offset + got)
            except OSError as error:
                raise UnreadableCheckpointError(f"{self.path}: {error.strerror} at byte {offset + got}") from error
            if not piece:
                raise TruncatedCheckpointError(
                    f"{self.path} became shorter while it was read: it ends at {offset + got}"
                )
            pieces.append(piece)
            got += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` from `offset` on. Raises as `read` does."""
        got, length = 0, len(target)
        self._check_sent(offset, length)
        while got < length:
            try:
                count = _read_once(self._descriptor, target[got:], offset + got)
            except OSError as error:
                raise UnreadableCheckpointError(f"{self.path}: {error.strerror} at byte {offset + got}") from error
            if not count:
                raise TruncatedCheckpointError(
                    f"{self.path} became shorter while it was read: it ends at {offset + got}"
                )
            got += count

    def ask_ahead(self, offset: int, length: int) -> None:
        """Tell the system that these bytes are wanted soon. A hint: where it cannot be given, nothing happens."""
        if not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):
            for start in range(offset, offset + length, _ASKED_BYTES):
                count = min(_ASKED_BYTES, offset + length - start)
                os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_WILLNEED)

    def is_cached(self, offset: int) -> bool:
        """Whether the byte at `offset` can be read without waiting for a disk. False where the system cannot tell."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            return os.preadv(self._descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:
            return False

    def map(self, offset: int, length: int) -> mmap.mmap:
        """`length` bytes from `offset` on, read-only. Raises `OSError`, `ValueError` beyond the file's end.

        Of a file that is cut short later, touching the lost part ends the process.
        """
        self._check_sent(offset, length)
        return mmap.mmap(self._descriptor, length, access=mmap.ACCESS_READ, offset=offset)

    def fingerprint(self) -> Fingerprint:
        """What the open file is now: a change between two calls means that somebody wrote to it."""
        return _fingerprint(self.path, os.fstat(self._descriptor))

    def _check_sent(self, offset: int, length: int) -> None:
        if not self.holds(offset, length):
            raise BytesNotSentError(
                f"{self.path} has not arrived in full: of the bytes {offset} to {offset + length} not all were sent"
            )

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()


class SourceWindow(Source):
    """A span of an open source that is read as if it were a file of its own. It closes nothing."""

    def __init__(self, source: Source, offset: int, length: int) -> None:
        self.path = source.path
        self.size = length
        self._source = source
        self._offset = offset

    def read(self, offset: int, length: int) -> bytes:
        self._check(offset, length)
        return self._source.read(self._offset + offset, length)

    def read_into(self, offset: int, target: memoryview) -> None:
        self._check(offset, len(target))
        self._source.read_into(self._offset + offset, target)

    def fingerprint(self) -> Fingerprint:
        return self._source.fingerprint()

    def close(self) -> None:
        """The source belongs to somebody else."""

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise TruncatedCheckpointError(
                f"{self.path} at {self._offset}: {self.size} bytes are there, {offset + length} are needed"
            )


def _read_once(descriptor: int, target: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    piece = os.pread(descriptor, len(target), offset)
    target[: len(piece)] = piece
    return len(piece)


def fingerprint_of(path: str) -> Optional[Fingerprint]:
    """What stands at `path` now, a file or a folder; None if nothing does."""
    try:
        if os.path.isdir(path):
            return folder_fingerprint(path)
        return _fingerprint(path, os.stat(path))
    except (OSError, ValueError):
        return None


def _fingerprint(path: str, status: os.stat_result) -> Fingerprint:
    return Fingerprint(path, status.st_size, status.st_mtime_ns, status.st_ino)


def _open_stored(path: str) -> tuple[int, Optional[ReadableSpans]]:
    """The file; or the part that is kept of it, and what of that may be read."""
    try:
        return _open(path), None
    except MissingCheckpointError:
        part = _open_part(path)
        # Between the two looks the part may have become the file.
        return part if part is not None else (_open(path), None)


def _open_part(path: str) -> Optional[tuple[int, ReadableSpans]]:
    """The part comes first: as long as it is open no other file has its inode, and a list that is read after its size
    was seen can only be its own."""
    names = part_of(path)
    if names is None:
        return None
    try:
        descriptor = os.open(names[0], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    facts = os.fstat(descriptor)
    with contextlib.suppress(OSError, WireError):
        with open(os.open(names[1], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            readable = parse_readable(file.read(_MAX_LIST_BYTES))
        if stat.S_ISREG(facts.st_mode) and (readable.part_inode, readable.size) == (facts.st_ino, facts.st_size):
            return descriptor, readable
    os.close(descriptor)
    return None


def _open(path: str) -> int:
    try:
        # A FIFO would block for ever without O_NONBLOCK; regular files ignore it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise MissingCheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the path holds a null character"
        raise UnreadableCheckpointError(f"{path} cannot be opened: {reason}") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise CheckpointIsDirectoryError(f"{path} is a folder, not a file")
    raise NotACheckpointError(f"{path} is no regular file")
