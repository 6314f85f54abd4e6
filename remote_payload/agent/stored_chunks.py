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
from collections.abc import Iterator, Sequence

from remote_payload.agent import files
from remote_payload.agent.copying import Place, digest_at
from remote_payload.wire.codec import WireError, from_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.members import MemberList, check_members, folder_digest
from remote_payload.wire.names import FILE_DIGEST_PREFIX

_MAX_LINE_BYTES = 200
_LINE = re.compile(rb'\{"offset": (\d{1,18}), "length": (\d{1,8}), "sha256": "([0-9a-f]{64})"\}')
_REMEMBERED = 64
_SAMPLE = 4


class StoredChunks:
    """A stored checkpoint by the offsets of its chunk manifest, which for a folder runs through all of its files."""

    def __init__(self, layout: NodeLayout, digest: str) -> None:
        self._paths, self._starts = [layout.checkpoint(digest)], [0]
        digests = [digest]
        with contextlib.suppress(WireError, ValueError, OSError):
            value = files.read_json(layout.checkpoint_members(digest))
            members = from_json(MemberList, value).members if value is not None else ()
            if members:
                check_members(members)
                tree = layout.checkpoint_tree(digest)
                self._paths = [os.path.join(tree, member.path) for member in members]
                self._starts = [0, *itertools.accumulate(member.size for member in members)][:-1]
                is_its_list = folder_digest(members) == digest
                digests = [member.digest if is_its_list else "" for member in members]
        self._verified_ns = [0] * len(digests)
        with contextlib.suppress(OSError):
            # The manifest was written when the files had been verified.
            manifest = layout.checkpoint_manifest(digest)
            facts = os.lstat(manifest)
            told = tuple(zip(self._paths, self._starts, digests))
            believed = _believed(manifest, facts.st_mtime_ns, facts.st_ino, told)
            self._verified_ns = [facts.st_mtime_ns if is_believed else 0 for is_believed in believed]

    def place(self, offset: int) -> Place:
        file = bisect.bisect_right(self._starts, offset) - 1
        return Place(self._paths[file], offset - self._starts[file], self._verified_ns[file])


@functools.lru_cache(maxsize=_REMEMBERED)
def _believed(manifest: str, _mtime_ns: int, _inode: int, told: tuple[tuple[str, int, str], ...]) -> tuple[bool, ...]:
    """For each file, of which path, offset of its begin and digest are told: whether the digest follows from a
    manifest's chunks, and some of these stand in it, since another file in its place may have any time stamp."""
    chunks: list[list[tuple[int, int, bytes]]] = [[] for _ in told]
    file, end = -1, 0
    for offset, length, sha256 in manifest_lines(manifest):
        if offset != end:
            return (False,) * len(told)
        while file + 1 < len(told) and offset >= told[file + 1][1]:
            file += 1
        chunks[file].append((offset, length, sha256))
        end += length
    return tuple(
        _digest_of(of_file) == digest and _stand_at(path, start, of_file)
        for (path, start, digest), of_file in zip(told, chunks)
    )


def _digest_of(chunks: Sequence[tuple[int, int, bytes]]) -> str:
    return FILE_DIGEST_PREFIX + hashlib.sha256(b"".join(sha256 for _, _, sha256 in chunks)).hexdigest()


def _stand_at(path: str, start: int, chunks: Sequence[tuple[int, int, bytes]]) -> bool:
    last = len(chunks) - 1
    sample = {chunks[number * last // (_SAMPLE - 1)] for number in range(_SAMPLE)} if chunks else set()
    return all(digest_at(Place(path, offset - start), length) == sha256 for offset, length, sha256 in sample)


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
