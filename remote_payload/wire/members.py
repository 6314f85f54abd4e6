"""A checkpoint that is a folder, on its way into a node's store: its files, and what stands for all of them.

Each large file goes by itself, as any other does. All small ones go as one: the pack, in which they stand one behind
the other, so that a thousand of them take no thousand round trips.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

from remote_payload.wire.chunks import CHUNK_BYTES, Chunk, ChunkManifest, file_digest
from remote_payload.wire.codec import WireError
from remote_payload.wire.folders import MAX_FILES
from remote_payload.wire.names import FILE_DIGEST_PREFIX, check_file_digest, check_member_path

PACKED_BELOW = CHUNK_BYTES
"""Files of fewer bytes than this are small."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A file of a folder: `path` is relative to it, with slashes; `digest` is that of the file's content."""

    path: str
    size: int
    digest: str

    @property
    def is_packed(self) -> bool:
        return self.size < PACKED_BELOW


@dataclasses.dataclass(frozen=True)
class MemberList:
    """What `members.json` holds beside a stored folder."""

    members: tuple[Member, ...]


def check_members(members: Sequence[Member]) -> None:
    """Raise `WireError` unless these can be the files of one folder, in the order of their paths."""
    if not 0 < len(members) <= MAX_FILES:
        raise WireError(f"a folder of {len(members)} files cannot be sent: 1 to {MAX_FILES} can")
    before = ""
    folders: set[str] = set()
    for member in members:
        check_member_path(member.path)
        check_file_digest(member.digest)
        if member.size < 0 or member.path <= before:
            raise WireError(f"the folder's list is out of order or wrong at {member.path[:120]!r}")
        before = member.path
        parts = member.path.split("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    both = folders.intersection(member.path for member in members)
    if both:
        raise WireError(f"{min(both)[:120]!r} is a file and a folder at once")


def folder_digest(members: Iterable[Member]) -> str:
    """The folder's identity: `v1:` + SHA-256 over the digest and path of every file, in the order of the paths."""
    outer = hashlib.sha256(b"remote-eval folder\n")
    for member in members:
        outer.update(f"{member.digest} {member.path}\n".encode())
    return FILE_DIGEST_PREFIX + outer.hexdigest()


def joined(manifests: Iterable[ChunkManifest]) -> ChunkManifest:
    """The chunks of files that stand one behind the other, as those of one file."""
    chunks: list[Chunk] = []
    size = 0
    for manifest in manifests:
        chunks.extend(Chunk(size + chunk.offset, chunk.length, chunk.sha256) for chunk in manifest.chunks)
        size += manifest.size
    ordered = tuple(chunks)
    return ChunkManifest(file_digest(ordered), size, ordered)
