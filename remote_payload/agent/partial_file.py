"""A file that is arriving in the store: its lock, its journal, its bytes, and its last step to the final name.

The journal says which chunks are here. A line is written only after the data it speaks of was synced, so whatever
survives of it is true; a line that a crash cut short does not match its pattern and counts for nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Optional

from remote_payload.agent import files, quota, verified
from remote_payload.agent.background import Background
from remote_payload.agent.failure import AgentError
from remote_payload.wire.chunk_table import ChunkTable
from remote_payload.wire.codec import to_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.parts import ReadableSpans, added_lines
from remote_payload.wire.units import human_bytes

SYNC_BYTES = 32 * 1024 * 1024
SYNC_INTERVAL_S = 2.0
"""After so much, in bytes or seconds, whichever is less, what arrived is made durable while more arrives. What a killed
agent or machine loses is at most what is being made durable and as much again."""

_JOURNAL_LINE = re.compile(rb"(?m)^(\d{1,7}) ([0-9a-f]{16})\.$")
_LINE_BYTES = 28
"""The longest line of the journal, and the empty one before each sync's."""
_FALLOC_FL_KEEP_SIZE = 1
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the limit of a file's size is reached",
}
_data_sync = getattr(os, "fdatasync", os.fsync)


class PartialFile:
    """One stream's hold on the file. Make it through `prepare` (under an exclusive lock), or join with `joined`."""

    def __init__(self, layout: NodeLayout, digest: str, table: ChunkTable, fd: int, journal_fd: int) -> None:
        self.have = bytearray(len(table))
        self._layout = layout
        self._digest = digest
        self._table = table
        self.fd = fd
        self._journal_fd = journal_fd
        self._unsynced: list[int] = []
        self._unsynced_bytes = 0
        self._refusal: Optional[OSError] = None
        self._synced_at = time.monotonic()
        self._background = Background()

    @classmethod
    def prepare(cls, layout: NodeLayout, digest: str, table: ChunkTable) -> PartialFile:
        """Make or take over the part and its journal. Raises `AgentError`, `OSError`."""
        found = cls._opened(layout, digest, table)
        try:
            with found.fullness_explained():
                if not found._is_the_journals and os.path.lexists(layout.checkpoint_readable(digest)):
                    # Jobs may be reading it: they go on with the file that they have open, and another one begins.
                    os.unlink(layout.checkpoint_readable(digest))
                    os.unlink(layout.checkpoint_part(digest))
                    files.fsync_folder(layout.checkpoint_folder(digest))
                    found, given_up = cls._opened(layout, digest, table), found
                    given_up.close()
                if not found._is_the_journals:
                    found._begin_anew()
                _keep_space(found._journal_fd, _LINE_BYTES * len(table))
                found.reload()
                if os.path.lexists(layout.checkpoint_readable(digest)):
                    # An agent that was killed may have journalled what it did not come to add.
                    found._list_readable()
        except BaseException:
            found.close()
            raise
        return found

    @classmethod
    def _opened(cls, layout: NodeLayout, digest: str, table: ChunkTable) -> PartialFile:
        """Part and journal, made where they are not there."""
        part = layout.checkpoint_part(digest)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise AgentError("unfit", f"{part} is no regular file", "Remove it.")
            return cls(layout, digest, table, fd, _open_journal(layout.checkpoint_journal(digest)))
        except BaseException:
            os.close(fd)
            raise

    @property
    def _is_the_journals(self) -> bool:
        """Whether the journal speaks of this very part."""
        facts = os.fstat(self.fd)
        return facts.st_size == self._table.size and self._read_journal().startswith(_journal_head(facts.st_ino))

    def _begin_anew(self) -> None:
        """A part that the journal does not speak of is not believed."""
        os.ftruncate(self._journal_fd, 0)
        os.ftruncate(self.fd, self._table.size)
        _write_all(self._journal_fd, _journal_head(os.fstat(self.fd).st_ino))
        _data_sync(self._journal_fd)
        files.fsync_folder(self._layout.checkpoint_folder(self._digest))

    @classmethod
    def joined(cls, layout: NodeLayout, digest: str, table: ChunkTable) -> PartialFile:
        """Open what another stream of the session prepared. Raises `FileNotFoundError` if it was finished since."""
        fd = os.open(layout.checkpoint_part(digest), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            journal_fd = os.open(
                layout.checkpoint_journal(digest), os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except BaseException:
            os.close(fd)
            raise
        found = cls(layout, digest, table, fd, journal_fd)
        found.reload()
        return found

    def close(self) -> None:
        with contextlib.suppress(AgentError, OSError):  # of interest only while chunks are still promised
            self._background.wait()
        os.close(self.fd)
        os.close(self._journal_fd)

    def reload(self) -> None:
        """Take in what the journal says, other streams' chunks too."""
        for index in _named(self._read_journal(), self._table):
            self.have[index] = 1

    def write(self, index: int, data: memoryview) -> None:
        """Put a verified chunk in its place, and wherever else the file repeats it; a later `sync` journals that."""
        for place in self._table.same_chunks(index):
            if self.have[place]:
                continue
            offset, left = self._table.offset(place), data
            with self.fullness_explained():
                while left:
                    count = os.pwrite(self.fd, left, offset)
                    left, offset = left[count:], offset + count
            self.note(place)

    def note(self, index: int) -> None:
        """A verified chunk stands in its place; it is journalled by a later `sync`."""
        self._unsynced.append(index)
        self._unsynced_bytes += self._table.length(index)

    def touch(self) -> None:
        """Show whoever waits for the file that it gets on, though nothing more of it is durable yet."""
        with contextlib.suppress(OSError):
            os.utime(self._journal_fd)

    def sync_if_due(self, *, may_wait: bool = True) -> None:
        """Begin to make durable what was written, beside what goes on. Raises what the sync before met; waits for that
        one, if it may, only where as much has arrived again."""
        is_late = time.monotonic() - self._synced_at >= SYNC_INTERVAL_S
        is_much = self._unsynced_bytes >= SYNC_BYTES
        if (is_much and may_wait) or ((is_much or is_late) and not self._background.is_busy):
            self._begin_sync()

    @property
    def is_behind(self) -> bool:
        """Whether so much waits to be made durable that whoever can wait should."""
        return self._unsynced_bytes >= 2 * SYNC_BYTES

    def sync_while_quiet(self) -> None:
        """Begin to make durable what was written: nothing more arrives now, and the client may be gone without a word
        and come back soon over another stream."""
        if self._unsynced and not self._background.is_busy:
            self._begin_sync()

    def _begin_sync(self) -> None:
        written = self._take_unsynced()
        self._background.start(lambda: self._make_durable(written))

    def sync(self) -> None:
        """Make durable, then journal, all that was written. Nothing is journalled where the sync fails."""
        written = self._take_unsynced()
        try:
            self._background.wait()
        finally:
            self._make_durable(written)

    def _take_unsynced(self) -> list[int]:
        written, self._unsynced, self._unsynced_bytes = self._unsynced, [], 0
        self._synced_at = time.monotonic()
        return written

    def _make_durable(self, written: list[int]) -> None:
        if not written:
            return
        lines = [b"%d %s.\n" % (index, self._table.sha256(index).hex()[:16].encode()) for index in written]
        with self.fullness_explained():
            self._sync_data()
            # A line that a crash cut short must not swallow the first of ours.
            _write_all(self._journal_fd, b"\n" + b"".join(lines))
            _data_sync(self._journal_fd)
        for index in written:
            self.have[index] = 1
        self._add_to_readable(written)

    def _sync_data(self) -> None:
        """A kernel tells once of what it could not write, whichever bytes that were: nothing is believed afterwards."""
        if self._refusal is not None:
            raise self._refusal
        try:
            _data_sync(self.fd)
        except OSError as error:
            self._refusal = error
            raise

    def finish(self) -> bool:
        """Give the file its final name if every chunk is durable here; else False.

        The chunk manifest is written first: where the file stands, its manifest stands beside it.
        """
        self.sync()
        self.reload()
        if not all(self.have):
            return False
        layout, digest = self._layout, self._digest
        try:
            with self.fullness_explained():
                os.fsync(self.fd)
                write_manifest(layout, digest, self._table)
                os.rename(layout.checkpoint_part(digest), layout.checkpoint(digest))
                os.fchmod(self.fd, 0o400)
                files.fsync_folder(layout.checkpoint_folder(digest))
                # Each chunk was verified before it was written.
                verified.record(layout, digest, [verified.state_of(os.fstat(self.fd))])
        except FileNotFoundError:
            if not is_stored(layout, digest, self._table.size):
                raise
        remove_if_there(layout.checkpoint_journal(digest))
        remove_if_there(layout.checkpoint_readable(digest))
        return True

    def keep(self, wanted: bytearray) -> bool:
        """Let jobs read what is durable here, if that is every chunk of `wanted`; else False.

        What they may read stands in a list of its own, which speaks of this very part; what arrives later is added to
        it. The part may still become the finished file under their hands: it is the same file then.
        """
        self.sync()
        self.reload()
        if any(is_wanted and not is_here for is_wanted, is_here in zip(wanted, self.have)):
            return False
        # They would read a stored copy that was changed, and is being replaced, before the part.
        remove_if_there(self._layout.checkpoint(self._digest))
        with self.fullness_explained():
            self._list_readable()
        return True

    def _list_readable(self) -> None:
        here = (index for index, is_here in enumerate(self.have) if is_here)
        readable = ReadableSpans(os.fstat(self.fd).st_ino, self._table.size, tuple(self._spans_of(here)))
        files.replace(self._layout.checkpoint_readable(self._digest), json.dumps(to_json(readable)).encode())

    def _add_to_readable(self, durable: list[int]) -> None:
        """Tell jobs that read the part of more of it. A list that cannot be added to lacks bytes, and that is all."""
        with contextlib.suppress(OSError):
            path = self._layout.checkpoint_readable(self._digest)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _write_all(fd, added_lines(self._spans_of(sorted(durable))))
            finally:
                os.close(fd)

    @property
    def bytes_here(self) -> int:
        return self._table.size - self._missing_bytes()

    def _spans_of(self, ascending: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Where chunks stand, as few spans as there can be."""
        begin = end = 0
        for index in ascending:
            offset = self._table.offset(index)
            if offset != end:
                if begin < end:
                    yield begin, end
                begin = offset
            end = offset + self._table.length(index)
        if begin < end:
            yield begin, end

    def _read_journal(self) -> bytes:
        parts: list[bytes] = []
        offset = 0
        while True:
            part = os.pread(self._journal_fd, 1 << 20, offset)
            if not part:
                return b"".join(parts)
            parts.append(part)
            offset += len(part)

    def _missing_bytes(self) -> int:
        return sum(self._table.length(i) for i, is_here in enumerate(self.have) if not is_here)

    @property
    def to_come_bytes(self) -> int:
        """What the rest of the file will take of the disk, at most."""
        not_allocated = self._table.size - os.fstat(self.fd).st_blocks * 512
        return max(0, min(self._missing_bytes(), not_allocated))

    @contextlib.contextmanager
    def fullness_explained(self) -> Iterator[None]:
        """Raises `AgentError` no_space, with what is free and what is missing, where the disk or the quota is full."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            folder = self._layout.checkpoint_folder(self._digest)
            # What is free on a disk says nothing of a quota there that no program tells of.
            is_untold = error.errno == errno.EDQUOT and quota.quota_free_bytes(folder) is None
            free = "" if is_untold else f"{human_bytes(quota.space_left(folder))} are free, "
            raise AgentError(
                "no_space",
                f"{_FULL[error.errno]}, on {quota.disk_of(folder)}: {free}"
                f"{human_bytes(self._missing_bytes())} of the file are still missing",
                "Free space there or set another node_root, and run it again: what has arrived is kept.",
            ) from error


def is_stored(layout: NodeLayout, digest: str, size: int) -> bool:
    """Whether the finished file stands in the store. One of another size was tampered with, and is taken away."""
    path = layout.checkpoint(digest)
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return False
    if stat.S_ISREG(facts.st_mode) and facts.st_size == size:
        return True
    os.unlink(path)
    return False


def write_manifest(layout: NodeLayout, digest: str, table: ChunkTable) -> None:
    """The file's `ChunkManifest` as JSON, in place at once."""
    parts = [f'{{"digest": {json.dumps(digest)}, "size": {table.size}, "chunks": [']
    separator = ""
    for chunk in table.chunks():
        parts.append(f'{separator}\n{{"offset": {chunk.offset}, "length": {chunk.length}, "sha256": "{chunk.sha256}"}}')
        separator = ","
    parts.append("\n]}\n")
    files.replace(layout.checkpoint_manifest(digest), "".join(parts).encode())


def journalled(layout: NodeLayout, digest: str, table: ChunkTable) -> list[int]:
    """Chunks of `table` that the journal of a part names, which may be about another file, or lie."""
    most_bytes = 2 * _LINE_BYTES * (len(table) + 1)
    return list(_named(files.read_up_to(layout.checkpoint_journal(digest), most_bytes) or b"", table))


def _named(journal: bytes, table: ChunkTable) -> Iterator[int]:
    for match in _JOURNAL_LINE.finditer(journal):
        index = int(match.group(1))
        if index < len(table) and table.sha256(index).hex().encode().startswith(match.group(2)):
            yield index


def journal_state(layout: NodeLayout, digest: str) -> tuple[int, int]:
    """How long the journal is, and when it was touched: both grow while somebody gets on with the file."""
    try:
        facts = os.lstat(layout.checkpoint_journal(digest))
    except FileNotFoundError:
        return 0, 0
    return facts.st_size, facts.st_mtime_ns


def remove_if_there(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _open_journal(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _keep_space(fd: int, size: int) -> None:
    """Have the file system set blocks aside for what will be appended, where it knows how: on a disk that somebody
    fills, what has arrived can still be journalled."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes  # not cheap to import, and of use only here

        ctypes.CDLL(None).fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size))


def _journal_head(part_inode: int) -> bytes:
    return b"remote-eval journal 1 of part %d\n" % part_inode


def _write_all(fd: int, data: bytes) -> None:
    left: Optional[memoryview] = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
