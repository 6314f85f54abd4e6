"""Chunks that the node has already, in an earlier checkpoint of its store or elsewhere in the file that arrives.

Chunk manifests stand beside the stored files; they only say where to look. What is copied is verified by its SHA-256
where it was copied to.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import itertools
import os
import re
import stat
import threading
from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional

from remote_payload.agent import files, store
from remote_payload.agent.partial_file import PartialFile
from remote_payload.wire.chunk_table import ChunkTable
from remote_payload.wire.codec import WireError, from_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.members import MemberList, check_members

MAX_SOURCES = 64
"""So many checkpoints, the latest used first, are looked through."""
MAX_CANDIDATES = 3
"""How many places a chunk is tried from: a second one matters only where the first is damaged."""
_MAX_LINE_BYTES = 200
_MAX_THREADS = 4
_PIECE_BYTES = 1024 * 1024
_TELL_INTERVAL_S = 2.0
_LINE = re.compile(rb'\{"offset": (\d{1,18}), "length": (\d{1,8}), "sha256": "([0-9a-f]{64})"\}')
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Place(NamedTuple):
    path: str
    offset: int


def reuse_chunks(
    layout: NodeLayout, digest: str, table: ChunkTable, part: PartialFile, tell: Callable[[], None]
) -> int:
    """Copy into `part` every chunk that it lacks and that can be had here; how many bytes that were.

    `tell` is called every other second. Raises what `tell` raises and `AgentError` where the disk is full; what was
    copied until then is kept.
    """
    wanted = _wanted(table, part.have)
    if not wanted:
        return 0
    places = _places(layout, digest, table, part, wanted)
    work = [(index, places[sha256]) for sha256, indices in wanted.items() if sha256 in places for index in indices]
    return _copy_all(work, table, part, tell)


def _wanted(table: ChunkTable, have: bytearray) -> dict[bytes, list[int]]:
    wanted: dict[bytes, list[int]] = {}
    for index, is_here in enumerate(have):
        if not is_here:
            wanted.setdefault(table.sha256(index), []).append(index)
    return wanted


def _places(
    layout: NodeLayout,
    digest: str,
    table: ChunkTable,
    part: PartialFile,
    wanted: dict[bytes, list[int]],
) -> dict[bytes, list[_Place]]:
    """Where the wanted chunks may be."""
    places: dict[bytes, list[_Place]] = {}
    for index, is_here in enumerate(part.have):
        if is_here and table.sha256(index) in wanted:
            places.setdefault(table.sha256(index), [_Place(layout.checkpoint_part(digest), table.offset(index))])
    lengths = {sha256: table.length(indices[0]) for sha256, indices in wanted.items()}
    for stored in _stored(layout):
        if stored == digest or all(len(places.get(sha256, ())) >= MAX_CANDIDATES for sha256 in wanted):
            continue
        found: list[tuple[bytes, int]] = []
        with contextlib.suppress(OSError):
            found.extend(_matches(layout.checkpoint_manifest(stored), lengths))
        holder = _Holder(layout, stored) if found else None
        for sha256, offset in found:
            known = places.setdefault(sha256, [])
            if holder is not None and len(known) < MAX_CANDIDATES:
                known.append(holder.place(offset))
    return places


class _Holder:
    """A stored checkpoint by the offsets of its chunk manifest, which for a folder runs through all of its files."""

    def __init__(self, layout: NodeLayout, digest: str) -> None:
        self._paths, self._starts = [layout.checkpoint(digest)], [0]
        with contextlib.suppress(WireError, ValueError, OSError):
            value = files.read_json(layout.checkpoint_members(digest))
            members = from_json(MemberList, value).members if value is not None else ()
            if members:
                check_members(members)
                tree = layout.checkpoint_tree(digest)
                self._paths = [os.path.join(tree, member.path) for member in members]
                self._starts = [0, *itertools.accumulate(member.size for member in members)][:-1]

    def place(self, offset: int) -> _Place:
        index = bisect.bisect_right(self._starts, offset) - 1
        return _Place(self._paths[index], offset - self._starts[index])


def _stored(layout: NodeLayout) -> list[str]:
    """Digests of the checkpoints in the store, the latest used first."""
    latest_first = sorted(store.stored_files(layout), key=lambda file: file.last_used, reverse=True)
    return [file.digest for file in latest_first[:MAX_SOURCES]]


def _matches(path: str, lengths: dict[bytes, int]) -> Iterator[tuple[bytes, int]]:
    """(sha256, offset) of the wanted chunks that a manifest speaks of, read a line at a time: it may be long."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        while line := file.readline(_MAX_LINE_BYTES):
            match = _LINE.match(line)
            if match is not None:
                sha256 = bytes.fromhex(match.group(3).decode())
                if lengths.get(sha256) == int(match.group(2)):
                    yield sha256, int(match.group(1))


def _open(path: str) -> Optional[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def _copy_all(
    work: list[tuple[int, list[_Place]]], table: ChunkTable, part: PartialFile, tell: Callable[[], None]
) -> int:
    """Threads help: copying and hashing let go of the interpreter's lock."""
    if not work:
        return 0
    import concurrent.futures  # not cheap to import, and seldom needed

    is_over = threading.Event()

    def copy(index: int, places: list[_Place]) -> tuple[int, bool]:
        offset, length, sha256 = table.offset(index), table.length(index), table.sha256(index)
        for place in places:
            if is_over.is_set():
                break
            if _copy_verified(place, part.fd, offset, length, sha256):
                return index, True
        return index, False

    copied_bytes = 0
    threads = max(1, min(_MAX_THREADS, os.cpu_count() or 1, len(work)))
    with concurrent.futures.ThreadPoolExecutor(threads, "reuse") as pool, part.fullness_explained():
        running = {pool.submit(copy, *one) for one in work}
        try:
            while running:
                done, running = concurrent.futures.wait(running, _TELL_INTERVAL_S, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    index, is_copied = future.result()
                    if is_copied:
                        part.note(index)
                        copied_bytes += table.length(index)
                part.sync_if_due()
                tell()
        finally:
            is_over.set()
            for future in running:
                future.cancel()
            part.sync()
    return copied_bytes


def _copy_verified(place: _Place, fd: int, offset: int, length: int, sha256: bytes) -> bool:
    """Whether the chunk now stands at `offset`. Where it does not, what stands there counts for nothing."""
    source = _open(place.path)
    if source is None:
        return False
    try:
        _copy(source, place.offset, fd, offset, length)
        return _digest_at(fd, offset, length) == sha256
    except EOFError:
        return False
    except OSError as error:
        if error.errno in _FULL:
            raise
        return False  # a source that cannot be read is no source
    finally:
        os.close(source)


def _copy(source: int, start: int, fd: int, offset: int, length: int) -> None:
    """By the kernel where it can, which shares the blocks on file systems that know how; else through memory."""
    done = _copy_in_kernel(source, start, fd, offset, length)
    while done < length:
        data = os.pread(source, min(length - done, _PIECE_BYTES), start + done)
        if not data:
            raise EOFError
        view = memoryview(data)
        while view:
            count = os.pwrite(fd, view, offset + done)
            view, done = view[count:], done + count


def _copy_in_kernel(source: int, start: int, fd: int, offset: int, length: int) -> int:
    """How many bytes of it were copied so."""
    copy_file_range = getattr(os, "copy_file_range", None)
    done = 0
    while copy_file_range is not None and done < length:
        try:
            count = copy_file_range(source, fd, length - done, start + done, offset + done)
        except OSError as error:
            if error.errno in _FULL:
                raise
            break
        if not count:
            break
        done += count
    return done


def _digest_at(fd: int, offset: int, length: int) -> bytes:
    digest = hashlib.sha256()
    end = offset + length
    while offset < end:
        data = os.pread(fd, min(end - offset, _PIECE_BYTES), offset)
        if not data:
            raise EOFError
        digest.update(data)
        offset += len(data)
    return digest.digest()
