"""What is sent: a file of this machine, or whatever else can be read by position."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from orchestrator.errors import IntegrityError, Owner, UsageError
from orchestrator.transfer.channel import FrameChannel


class LocalFileChangedError(IntegrityError):
    """The local file is no longer what its manifest says."""

    owner = Owner.YOU


class Source(Protocol):
    """What is sent, read by position from several threads."""

    def send(self, channel: FrameChannel, offset: int, count: int) -> int:
        """Send some of `count` bytes from `offset`; how many."""

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes. Raises `LocalFileChangedError` where they are not there."""

    def body(self, offset: int, count: int, /) -> tuple[int, bytes] | None:
        """(encoding, body) of the DATA frame of a whole chunk; None where its bytes go by `send`."""

    def changed(self) -> LocalFileChangedError:
        """What to raise where a chunk is no longer what the manifest says."""

    def close(self) -> None: ...


class LocalFile:
    """A file of this machine as a `Source`."""

    def __init__(self, path: Path) -> None:
        """Raises `UsageError`."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"cannot open {path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)

    def send(self, channel: FrameChannel, offset: int, count: int) -> int:
        """Send some of `count` bytes from `offset`, without a copy where the stream can; how many."""
        try:
            sent = channel.send_file(self._fd, offset, count)
        except OSError as error:
            raise self._unreadable(error) from error
        if not sent:
            raise self.changed()
        return sent

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes. Raises `LocalFileChangedError` where they are not there, `UsageError`."""
        parts = []
        while count:
            try:
                part = os.pread(self._fd, count, offset)
            except OSError as error:
                raise self._unreadable(error) from error
            if not part:
                raise self.changed()
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def body(self, _offset: int, _count: int, /) -> tuple[int, bytes] | None:
        return None

    def changed(self) -> LocalFileChangedError:
        return LocalFileChangedError(
            f"{self.path} changed while it was being sent",
            action="Wait until it is written completely, or evaluate a copy of it; then run this again.",
        )

    def _unreadable(self, error: OSError) -> UsageError:
        return UsageError(f"cannot read {self.path}: {error.strerror}")
