"""A file that arrives in spans of any order: a hidden, locked partial file beside its target, with a journal."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import LockedError, UsageError

SYNC_BYTES = 64 * 1024 * 1024
_READ_BYTES = 1024 * 1024
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class SpanFile:
    """The partial file of one target. Spans are written from several threads; `here` tells which are verified.

    A span is journalled once its bytes are on the disk, so nothing that the journal names is read or fetched again; it
    holds for one `identity` of the source alone. Methods raise `UsageError` where this machine's disk refuses.
    """

    def __init__(self, target: Path, identity: str, spans: int) -> None:
        """Take up what an earlier fetch left, or begin. Raises `LockedError` while another fetch holds it."""
        token = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:24]
        self.target = target
        self.here = bytearray(spans)
        self._partial = target.with_name(f".remote-eval-{token}.spans")
        self._journal = target.with_name(f".remote-eval-{token}.journal")
        self._head = json.dumps({"schema": 1, "identity": identity})
        self._lock = threading.Lock()
        self._due: list[int] = []
        self._due_bytes = 0
        self._log = -1
        with self._local_errors():
            self._fd = os.open(self._partial, _OPEN, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(self._fd), self._partial.lstat()):
                    raise FileNotFoundError  # its last holder has just renamed it to the target
                self._take_up()
            except (BlockingIOError, FileNotFoundError):
                self._close()
                raise LockedError(
                    f"another remote-eval is fetching {target} now", action="Wait for it, or end it."
                ) from None
            except BaseException:
                self._close()
                raise

    def write(self, offset: int, data: memoryview) -> None:
        """Put down bytes that are not verified yet."""
        with self._local_errors():
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count

    def commit(self, index: int, length: int) -> None:
        """Span `index` is written and verified."""
        with self._lock:
            self.here[index] = 1
            self._due.append(index)
            self._due_bytes += length
            if self._due_bytes >= SYNC_BYTES:
                self._sync()

    def sha256(self) -> str:
        """Of the whole, which is read for it."""
        with self._local_errors():
            return sha256_of(self._partial)

    def start_over(self) -> None:
        """Nothing of it is here."""
        with self._lock, self._local_errors():
            self.here = bytearray(len(self.here))
            self._due.clear()
            self._due_bytes = 0
            self._begin()

    def finish(self, mtime_ns: int) -> None:
        """Everything is verified: rename it to the target."""
        with self._lock, self._local_errors():
            os.fsync(self._fd)
            os.utime(self._fd, ns=(mtime_ns, mtime_ns))
            self._partial.replace(self.target)
            self._journal.unlink(missing_ok=True)
            folder = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._due.clear()

    def close(self) -> None:
        """Journal what has arrived, and let go of it; it stays for the next time."""
        with self._lock:
            with contextlib.suppress(UsageError):
                self._sync()
            self._close()

    def _sync(self) -> None:
        if not self._due:
            return
        with self._local_errors():
            os.fdatasync(self._fd)
            os.write(self._log, "".join(f"{index}\n" for index in self._due).encode())
            os.fdatasync(self._log)
        self._due.clear()
        self._due_bytes = 0

    def _take_up(self) -> None:
        known = b""
        with contextlib.suppress(FileNotFoundError):
            known = self._journal.read_bytes()
        # A last line without its end was being written when the client died.
        first, *lines = known.split(b"\n")[:-1] or [b""]
        # A client that is killed behind the rename leaves the journal alone: it speaks of no partial file any more.
        if os.fstat(self._fd).st_size and first.decode(errors="replace") == self._head:
            for line in lines:
                if line.isdigit() and int(line) < len(self.here):
                    self.here[int(line)] = 1
        self._log = os.open(self._journal, _OPEN | os.O_APPEND, 0o600)
        self._begin()

    def _begin(self) -> None:
        """Let the journal name what is here, and nothing else."""
        if not any(self.here):
            os.ftruncate(self._fd, 0)
        os.ftruncate(self._log, 0)
        kept = [self._head, *(str(index) for index, is_here in enumerate(self.here) if is_here)]
        os.write(self._log, ("\n".join(kept) + "\n").encode())
        os.fdatasync(self._log)

    def _close(self) -> None:
        for fd in (self._fd, self._log):
            if fd >= 0:
                os.close(fd)
        self._fd = self._log = -1

    @contextlib.contextmanager
    def _local_errors(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            raise UsageError(
                f"cannot write {self.target}: {error.strerror or error}",
                action="Free space there or choose another folder, then run this again: what has arrived is kept.",
            ) from error


def sha256_of(path: Path) -> str:
    """Raises `OSError`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
