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
from collections.abc import Iterator

from remote_payload.agent import files
from remote_payload.agent.copying import Place
from remote_payload.wire.codec import WireError, from_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.members import MemberList, check_members, folder_digest
from remote_payload.wire.names import FILE_DIGEST_PREFIX

_MAX_LINE_BYTES = 200
_LINE = re.compile(rb'\{"offset": (\d{1,18}), "length": (\d{1,8}), "sha256": "([0-9a-f]{64})"\}')
_REMEMBERED = 64


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
                digests = [member.digest for member in members] if folder_digest(members) == digest else []
        self._verified_ns = 0
        with contextlib.suppress(OSError):
            # The manifest was written when the files had been verified.
            manifest = layout.checkpoint_manifest(digest)
            facts = os.lstat(manifest)
            if _digests_by(manifest, facts.st_mtime_ns, facts.st_ino, tuple(self._starts)) == digests:
                self._verified_ns = facts.st_mtime_ns

    def place(self, offset: int) -> Place:
        index = bisect.bisect_right(self._starts, offset) - 1
        return Place(self._paths[index], offset - self._starts[index], self._verified_ns)


@functools.lru_cache(maxsize=_REMEMBERED)
def _digests_by(manifest: str, _mtime_ns: int, _inode: int, starts: tuple[int, ...]) -> list[str]:
    """The digests of the files that begin at `starts`, one behind the other, as a manifest's chunks tell."""
    outers = [hashlib.sha256() for _ in starts]
    file, end = -1, 0
    for offset, length, sha256 in manifest_lines(manifest):
        if offset != end:
            return []
        while file + 1 < len(starts) and offset >= starts[file + 1]:
            file += 1
        outers[file].update(sha256)
        end += length
    return [FILE_DIGEST_PREFIX + outer.hexdigest() for outer in outers]


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
