"""Where the chunks of a stored checkpoint stand, by the manifest beside it, and whether it is to be believed."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from typing import Callable, Optional

from remote_payload.agent import files, verified
from remote_payload.agent.copying import MAX_THREADS, Place, digest_at
from remote_payload.agent.verified import FileState, state_at
from remote_payload.wire.chunks import CHUNK_BYTES
from remote_payload.wire.codec import WireError, from_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.members import MemberList, check_members, folder_digest
from remote_payload.wire.names import FILE_DIGEST_PREFIX
from remote_payload.wire.processors import usable_processors

_MAX_LINE_BYTES = 200
_LINE = re.compile(rb'\{"offset": (\d{1,18}), "length": (\d{1,8}), "sha256": "([0-9a-f]{64})"\}')
_REMEMBERED = 64
_SAMPLE = 4
_SETTLED_S = 3.0
"""What is written to a younger file might not show in its time stamps."""
_Chunk = tuple[int, int, bytes]
"""Offset, length and SHA-256."""


class StoredChunks:
    """A stored checkpoint by the offsets of its chunk manifest, which for a folder runs through all of its files.

    A file of it is believed while it stands as it did when it was verified, its digest follows from the manifest, and
    some of the chunks of the checkpoint, looked at, are what they were: not every file system keeps the times.
    """

    def __init__(self, layout: NodeLayout, digest: str) -> None:
        self._layout, self._digest = layout, digest
        self._tree: Optional[str] = None
        self._paths, self._starts, self._digests = [layout.checkpoint(digest)], [0], [digest]
        with contextlib.suppress(WireError, ValueError, OSError):
            value = files.read_json(layout.checkpoint_members(digest))
            members = from_json(MemberList, value).members if value is not None else ()
            if members:
                check_members(members)
                self._tree = layout.checkpoint_tree(digest)
                self._paths = [os.path.join(self._tree, member.path) for member in members]
                self._starts = [0, *itertools.accumulate(member.size for member in members)][:-1]
                is_its_list = folder_digest(members) == digest
                self._digests = [member.digest if is_its_list else "" for member in members]
        self._verified: list[Optional[FileState]] = [None] * len(self._paths)
        with contextlib.suppress(OSError):
            facts = os.lstat(layout.checkpoint_manifest(digest))
            states = verified.recorded(layout, digest, len(self._paths))
            told = tuple(zip(self._paths, self._starts, self._digests, states))
            believed = _believed(layout.checkpoint_manifest(digest), facts.st_mtime_ns, facts.st_ino, told)
            self._verified = [state if is_believed else None for state, is_believed in zip(states, believed)]

    def place(self, offset: int) -> Place:
        file = bisect.bisect_right(self._starts, offset) - 1
        return Place(self._paths[file], offset - self._starts[file], self._verified[file])

    @property
    def is_believed(self) -> bool:
        """Whether every file is, and a folder holds no others."""
        return self._has_no_others and all(map(self._is_file_believed, range(len(self._paths))))

    @property
    def states(self) -> tuple[Optional[FileState], ...]:
        """How each file stood when it was verified; None for one that is not believed."""
        return tuple(self._verified)

    def verify(self, tell: Callable[[], None] = lambda: None) -> bool:
        """Whether every file is what its digest says, and a folder holds no others. What is not believed is read in
        full for that, and is from then on. `tell` is called as it gets on."""
        if not self._has_no_others:
            return False
        chunks = _by_file(self._layout.checkpoint_manifest(self._digest), self._starts)
        for file, (path, start, digest) in enumerate(zip(self._paths, self._starts, self._digests)):
            if self._is_file_believed(file):
                continue
            state = state_at(path)
            if state is None or _digest_of(chunks[file]) != digest:
                return False
            age_s = time.time() - max(state.mtime_ns, state.ctime_ns) / 1e9
            time.sleep(min(_SETTLED_S, max(0.0, _SETTLED_S - age_s)))
            if not _all_stand(path, start, state.size, chunks[file], tell) or state_at(path) != state:
                return False
            self._verified[file] = state
            if state.size >= CHUNK_BYTES:
                verified.record(
                    self._layout, self._digest, self._verified
                )  # whoever is cut off reads it no second time
        verified.record(self._layout, self._digest, self._verified)
        return True

    def _is_file_believed(self, file: int) -> bool:
        state = self._verified[file]
        return state is not None and state == state_at(self._paths[file])

    @property
    def _has_no_others(self) -> bool:
        return self._tree is None or sum(len(names) for _, _, names in os.walk(self._tree)) == len(self._paths)


@functools.lru_cache(maxsize=_REMEMBERED)
def _believed(
    manifest: str, _mtime_ns: int, _inode: int, told: tuple[tuple[str, int, str, Optional[FileState]], ...]
) -> tuple[bool, ...]:
    """For each file, of which path, offset of its begin, digest and how it stood when it was verified are told: whether
    the digest follows from a manifest's chunks, and those that are looked at of the checkpoint stand in it."""
    chunks = _by_file(manifest, [start for _, start, _, _ in told])
    of_digest = [_digest_of(of_file) == digest for (_, _, digest, _), of_file in zip(told, chunks)]
    in_question = (file for file, (_, _, _, state) in enumerate(told) if state is not None and of_digest[file])
    all_chunks = [(file, chunk) for file in in_question for chunk in chunks[file]]
    last = len(all_chunks) - 1
    sample = {all_chunks[number * last // (_SAMPLE - 1)] for number in range(_SAMPLE)} if all_chunks else set()
    damaged = {file for file, chunk in sample if not _stands(told[file][0], told[file][1], chunk)}
    return tuple(is_its_digest and file not in damaged for file, is_its_digest in enumerate(of_digest))


def _by_file(manifest: str, starts: Sequence[int]) -> list[list[_Chunk]]:
    """The chunks of the files that begin at `starts`; none at all where they do not stand one behind the other."""
    chunks: list[list[_Chunk]] = [[] for _ in starts]
    file, end = -1, 0
    for offset, length, sha256 in manifest_lines(manifest):
        if offset != end:
            return [[] for _ in starts]
        while file + 1 < len(starts) and offset >= starts[file + 1]:
            file += 1
        chunks[file].append((offset, length, sha256))
        end += length
    return chunks


def _digest_of(chunks: Sequence[_Chunk]) -> str:
    return FILE_DIGEST_PREFIX + hashlib.sha256(b"".join(sha256 for _, _, sha256 in chunks)).hexdigest()


def _stands(path: str, start: int, chunk: _Chunk) -> bool:
    offset, length, sha256 = chunk
    return digest_at(Place(path, offset - start), length) == sha256


def _all_stand(path: str, start: int, size: int, chunks: Sequence[_Chunk], tell: Callable[[], None]) -> bool:
    """Whether the file, which has `size` bytes, consists of these chunks."""
    from concurrent.futures import ThreadPoolExecutor  # not cheap to import, and of use only here

    if size != sum(length for _, length, _ in chunks):
        return False
    pool = ThreadPoolExecutor(max(1, min(MAX_THREADS, usable_processors())), "verify")
    try:
        for stands in pool.map(lambda chunk: _stands(path, start, chunk), chunks):
            if not stands:
                return False
            tell()
    finally:
        pool.shutdown(cancel_futures=True)
    return True


def manifest_lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """(offset, length, sha256) of the chunks that a manifest speaks of, read a line at a time: it may be long. Nothing
    where it cannot be read."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return
            while line := file.readline(_MAX_LINE_BYTES):
                match = _LINE.match(line)
                if match is not None:
                    yield int(match.group(1)), int(match.group(2)), bytes.fromhex(match.group(3).decode())
