"""Where a file from a node arrives: a hidden, locked, partial file beside the target, renamed once it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import IntegrityError, LockedError, UsageError

_READ_BYTES = 1024 * 1024
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Landing:
    """One file on its way to `target`. Spans come in order; what is verified of it is `verified_bytes` long.

    Every method raises `UsageError` where this machine's disk refuses.
    """

    def __init__(self, target: Path, size: int, sha256: str | None, key: str) -> None:
        """`key` names where the file comes from; its partial file here is named after it, so none is left behind."""
        self.target = target
        self.size = size
        self.verified_bytes = 0
        self.is_done = False
        self._sha256 = sha256
        self._digest = hashlib.sha256()
        self._resumed_bytes = 0
        token = hashlib.sha256(os.fsencode(target.name) + b"\0" + key.encode(errors="surrogatepass")).hexdigest()
        self._partial = target.with_name(f".remote-eval-{token[:24]}.part")
        self._fd: int | None = None

    def open(self) -> None:
        """Take up the partial file, or begin one.

        With a known SHA-256, a target that has it already is done, and a partial file counts as verified as far as it
        goes: the whole is checked at the end. Raises `LockedError` while another fetch holds it.
        """
        with self._local_errors():
            if self._sha256 is not None and self._target_is_it():
                self.verified_bytes, self.is_done = self.size, True
                return
            self._fd = self._open_locked()
            if self._sha256 is not None:
                self._take_up()

    def held_bytes(self) -> int:
        """How long the partial file is."""
        with self._local_errors():
            return os.fstat(self._opened).st_size

    def digest_held(self, offset: int, length: int) -> str:
        """SHA-256 of a span that the partial file holds."""
        digest = hashlib.sha256()
        with self._local_errors():
            for piece in self._pieces(offset, length):
                digest.update(piece)
        return digest.hexdigest()

    def take_up_span(self, offset: int, length: int) -> None:
        """Count a held span as verified. It must follow what is verified so far."""
        with self._local_errors():
            for piece in self._pieces(offset, length):
                self._digest.update(piece)
        self.verified_bytes += length
        self._resumed_bytes = self.verified_bytes

    def forget_rest(self) -> None:
        """Drop whatever the partial file holds beyond what is verified."""
        if self._fd is not None:
            with self._local_errors():
                os.ftruncate(self._fd, self.verified_bytes)

    def write(self, offset: int, data: memoryview) -> None:
        """Put down bytes that are not verified yet."""
        with self._local_errors():
            while data:
                count = os.pwrite(self._opened, data, offset)
                data, offset = data[count:], offset + count

    def commit(self, length: int, digest: hashlib._Hash) -> None:
        """The next `length` bytes are verified; `digest` is over the file up to there."""
        self.verified_bytes += length
        self._digest = digest

    def digest_so_far(self) -> hashlib._Hash:
        """A copy to go on with."""
        return self._digest.copy()

    def finish(self) -> bool:
        """Check the whole, sync, and rename to the target. False: what an earlier fetch had left was damaged, and is
        dropped: fetch it again. Raises `IntegrityError` for a file that is not what was promised.
        """
        if self.verified_bytes != self.size:
            raise IntegrityError(f"{self.target.name} has {self.verified_bytes} of {self.size} bytes")
        if self._sha256 is not None and self._digest.hexdigest() != self._sha256:
            was_resumed = self._resumed_bytes > 0
            self._start_over()
            if was_resumed:
                return False
            raise IntegrityError(
                f"{self.target.name} is not what the node's manifest says: another SHA-256",
                action="It changed after the manifest was written, or the node's disk is damaged: look at it there.",
            )
        with self._local_errors():
            os.fsync(self._opened)
            self._partial.replace(self.target)
            folder = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self.is_done = True
        self.close()
        return True

    def close(self) -> None:
        """Let go of the partial file; it stays for the next time."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def _opened(self) -> int:
        if self._fd is None:
            raise ValueError("the landing is not open")
        return self._fd

    def _target_is_it(self) -> bool:
        try:
            facts = self.target.lstat()
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != self.size:
            return False
        digest = hashlib.sha256()
        with self.target.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
        return digest.hexdigest() == self._sha256

    def _open_locked(self) -> int:
        """An open, locked descriptor of the partial file, which its last holder may rename under our hands."""
        while True:
            fd = os.open(self._partial, _OPEN, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._stands_at(fd):
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise LockedError(
                    f"another remote-eval is fetching {self.target} now", action="Wait for it, or end it."
                ) from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _stands_at(self, fd: int) -> bool:
        try:
            there, ours = self._partial.lstat(), os.fstat(fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _take_up(self) -> None:
        held = os.fstat(self._opened).st_size
        if held > self.size:
            os.ftruncate(self._opened, 0)
            held = 0
        self.take_up_span(0, held)

    def _start_over(self) -> None:
        self.verified_bytes = self._resumed_bytes = 0
        self._digest = hashlib.sha256()
        self.forget_rest()

    def _pieces(self, offset: int, length: int) -> Iterator[bytes]:
        end = offset + length
        while offset < end:
            piece = os.pread(self._opened, min(_READ_BYTES, end - offset), offset)
            if not piece:
                raise OSError(f"became shorter than {end} bytes")
            yield piece
            offset += len(piece)

    @contextlib.contextmanager
    def _local_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"cannot write {self.target}: {error.strerror or error}",
                action="Free space there or choose another folder, then run this again: what has arrived is kept.",
            ) from error
