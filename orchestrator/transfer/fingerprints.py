"""Chunk manifests of local files, computed once and remembered.

A remembered manifest counts only while path, size, mtime, inode and ctime are what they were, and while a sample of the
chunks still has its digests: a checkpoint rewritten in place with its old size and time stamp is seen by either.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from orchestrator.errors import CheckpointError, IntegrityError
from orchestrator.layout import LocalLayout
from remote_payload.wire.chunk_table import ChunkTable, pack_chunks
from remote_payload.wire.chunks import Chunk, ChunkManifest, Fingerprint, chunk_spans, file_digest, sample_spans
from remote_payload.wire.codec import WireError
from remote_payload.wire.processors import usable_processors

SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was hashed could change again within one tick of its time stamps
(2 s on FAT, 1 s on old network file systems), so its manifest is not remembered."""
_MAX_THREADS = 16
_MAX_REMEMBERED = 1000
_READ_BYTES = 512 * 1024
_NICER = 10
_SCHEMA = """
CREATE TABLE IF NOT EXISTS manifests_2 (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    inode INTEGER NOT NULL, digest TEXT NOT NULL, chunks BLOB NOT NULL, used_at REAL NOT NULL
)
"""


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A local file as it was when it was last read in full. `was_remembered`: that was not now."""

    manifest: ChunkManifest
    fingerprint: Fingerprint
    was_remembered: bool = False


class HashListener(Protocol):
    """Hears of a file's chunks while it is read."""

    def begun(self, spans: Sequence[tuple[int, int]], /) -> Sequence[int]:
        """The (offset, length) of all chunks; answers with their indices in the order in which they are to be read."""

    def hashed(self, index: int, sha256: bytes, /) -> None:
        """Called from several threads."""


def digest_local_file(
    path: Path,
    layout: LocalLayout,
    listener: HashListener | None = None,
    *,
    use_remembered: bool = True,
    now_ns: Callable[[], int] = time.time_ns,
) -> LocalFile:
    """The chunk manifest of a local file, from memory or by reading it once, of which `listener` hears.

    Raises `CheckpointError` (missing, no regular file, unreadable) and `IntegrityError` (changed while it was read).
    """
    fd = _open(path)
    try:
        before = _Facts.of(fd, path)
        memory = _Memory(layout)
        known = memory.recall(before) if use_remembered else None
        if known is not None and _matches(fd, sample_spans(known)):
            return LocalFile(known, before.fingerprint, was_remembered=True)
        begun_ns = now_ns()
        manifest = _digest(fd, path, before.size, listener)
        if _Facts.of(fd, path) != before or not _stands_at(path, before):
            raise _changed(path)
    finally:
        os.close(fd)
    if begun_ns - max(before.mtime_ns, before.ctime_ns) > SETTLED_NS:
        memory.remember(before, manifest)
    return LocalFile(manifest, before.fingerprint)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What tells one state of a file from another without reading it."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, fd: int, path: Path) -> _Facts:
        facts = os.fstat(fd)
        return cls(os.path.realpath(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.path, self.size, self.mtime_ns, self.inode)


class _Memory:
    """The cache file. Losing it costs time, never correctness: one that cannot be used is done without."""

    def __init__(self, layout: LocalLayout) -> None:
        self._layout = layout

    def recall(self, facts: _Facts) -> ChunkManifest | None:
        try:
            with closing(self._connect()) as database, database:
                row = database.execute(
                    "SELECT digest, chunks FROM manifests_2"
                    " WHERE path = ? AND size = ? AND mtime_ns = ? AND ctime_ns = ? AND inode = ?",
                    _key(facts),
                ).fetchone()
                if row is None:
                    return None
                manifest = ChunkTable(bytes(row[1]), facts.size).manifest()
                database.execute("UPDATE manifests_2 SET used_at = ? WHERE path = ?", (time.time(), _key(facts)[0]))
        except (sqlite3.Error, OSError, WireError, TypeError):
            return None
        return manifest if manifest.digest == row[0] else None

    def remember(self, facts: _Facts, manifest: ChunkManifest) -> None:
        try:
            self._store(facts, manifest)
        except sqlite3.OperationalError:
            return  # locked or full: next time
        except sqlite3.DatabaseError:
            self._layout.fingerprint_cache.unlink(missing_ok=True)  # no database any more
        except OSError:
            return

    def _store(self, facts: _Facts, manifest: ChunkManifest) -> None:
        with closing(self._connect()) as database, database:
            database.execute(
                "INSERT OR REPLACE INTO manifests_2 VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*_key(facts), manifest.digest, pack_chunks(manifest.chunks), time.time()),
            )
            database.execute(
                "DELETE FROM manifests_2 WHERE path NOT IN"
                " (SELECT path FROM manifests_2 ORDER BY used_at DESC LIMIT ?)",
                (_MAX_REMEMBERED,),
            )

    def _connect(self) -> sqlite3.Connection:
        self._layout.make_private(self._layout.fingerprint_cache.parent)
        database = sqlite3.connect(self._layout.fingerprint_cache, timeout=2.0)
        database.execute(_SCHEMA)
        return database


def _key(facts: _Facts) -> tuple[bytes, int, int, int, int]:
    # Inodes are unsigned and SQLite's integers are not; paths need not be text.
    inode = facts.inode - (1 << 64) if facts.inode >= 1 << 63 else facts.inode
    return os.fsencode(facts.path), facts.size, facts.mtime_ns, facts.ctime_ns, inode


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file at {path}", action="Check the path.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", action="Check its permissions.") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise CheckpointError(f"{path} is {kind}", action="Name the file itself.")
    return fd


def _digest(fd: int, path: Path, size: int, listener: HashListener | None) -> ChunkManifest:
    with os.fdopen(os.dup(fd), "rb") as file:
        spans = list(chunk_spans(file, size))
    try:
        digests = _hash_spans(fd, spans, listener)
    except EOFError:
        raise _changed(path) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    chunks = tuple(Chunk(offset, length, sha) for (offset, length), sha in zip(spans, digests, strict=True))
    return ChunkManifest(file_digest(chunks), size, chunks)


def _hash_spans(fd: int, spans: Sequence[tuple[int, int]], listener: HashListener | None = None) -> Sequence[str]:
    """SHA-256 of every span. Threads help, since hashing and reading let go of the interpreter's lock."""
    threads = max(1, min(_MAX_THREADS, usable_processors(), len(spans)))
    digests = [""] * len(spans)
    # One iterator for all: a thread whose processor others need leaves the more to the rest.
    indices = iter(range(len(spans)) if listener is None else listener.begun(spans))
    is_over = threading.Event()

    def work() -> None:
        if listener is not None:
            _let_others_first()
        buffer = memoryview(bytearray(_READ_BYTES))
        for index in indices:
            offset, left = spans[index]
            digest = hashlib.sha256()
            while left and not is_over.is_set():
                count = _read_at(fd, buffer[: min(left, _READ_BYTES)], offset)
                if not count:
                    raise EOFError
                digest.update(buffer[:count])
                offset, left = offset + count, left - count
            digests[index] = digest.hexdigest()
            if listener is not None and not is_over.is_set():
                listener.hashed(index, digest.digest())

    with concurrent.futures.ThreadPoolExecutor(threads, "hash") as pool:
        try:
            running = [pool.submit(work) for _ in range(threads)]
            for future in concurrent.futures.as_completed(running):
                future.result()
        finally:
            is_over.set()
    return digests


def _let_others_first() -> None:
    """This thread's processor is anybody's who sends what has been hashed; where there is no such thing, nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)


def _read_at(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    data = os.pread(fd, len(view), offset)
    view[: len(data)] = data
    return len(data)


def _matches(fd: int, sample: Sequence[tuple[int, int, str]]) -> bool:
    try:
        digests = _hash_spans(fd, [(offset, length) for offset, length, _ in sample])
    except (EOFError, OSError):
        return False
    return list(digests) == [sha256 for _, _, sha256 in sample]


def _stands_at(path: Path, before: _Facts) -> bool:
    try:
        return path.stat().st_ino == before.inode
    except OSError:
        return False


def _changed(path: Path) -> IntegrityError:
    return IntegrityError(
        f"{path} changed while it was read",
        action="Wait until it is written completely, or evaluate a copy of it; then run this again.",
    )
