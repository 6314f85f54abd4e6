"""How a file is cut into chunks, and the digest that follows from it.

A file's digest is `v1:` + SHA-256 over the ordered binary SHA-256 digests of its chunks. Chunks cover every byte. They
begin anew at each large member of a zip (a torch checkpoint's tensor records), so that a record keeps its digests when
the pickle before it grows and shifts the offsets behind it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, Callable, Optional

from remote_payload.wire.names import FILE_DIGEST_PREFIX

CHUNK_BYTES = 8 * 1024 * 1024
MIN_RECORD_BYTES = 64 * 1024
"""Records below this do not start a chunk of their own: thousands of tiny ones would only cost round trips."""
MAX_RECORDS = 200_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """`length` bytes at `offset`, with their SHA-256 in hex."""

    offset: int
    length: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ChunkManifest:
    """A whole file as ordered chunks. `digest` is the file's identity."""

    digest: str
    size: int
    chunks: tuple[Chunk, ...]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What stands for a file until its digest is known; equal fingerprints are a hint, never proof."""

    path: str
    size: int
    mtime_ns: int
    inode: int


def file_digest(chunks: tuple[Chunk, ...]) -> str:
    """The `v1:` digest over ordered chunk digests."""
    outer = hashlib.sha256()
    for chunk in chunks:
        outer.update(bytes.fromhex(chunk.sha256))
    return FILE_DIGEST_PREFIX + outer.hexdigest()


def chunk_spans(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of every chunk in order, covering [0, size) exactly."""
    cuts = [*_zip_record_starts(file, size), size]
    start = 0
    for cut in cuts:
        while start < cut:
            length = min(CHUNK_BYTES, cut - start)
            yield start, length
            start += length


def digest_file(
    file: BinaryIO, size: int, on_bytes: Optional[Callable[[int], None]] = None, buffer_bytes: int = 1 << 20
) -> ChunkManifest:
    """Read `file` once and return its manifest. Raises `EOFError` if it is shorter than `size` by then."""
    chunks = []
    buffer = memoryview(bytearray(buffer_bytes))
    for offset, length in list(chunk_spans(file, size)):
        file.seek(offset)
        digest, left = hashlib.sha256(), length
        while left:
            count = file.readinto(buffer[: min(left, buffer_bytes)])  # type: ignore[attr-defined]
            if not count:
                raise EOFError(f"file ends at {offset + length - left}, {size} bytes were promised")
            digest.update(buffer[:count])
            left -= count
            if on_bytes:
                on_bytes(count)
        chunks.append(Chunk(offset, length, digest.hexdigest()))
    ordered = tuple(chunks)
    return ChunkManifest(file_digest(ordered), size, ordered)


def _zip_record_starts(file: BinaryIO, size: int) -> list[int]:
    """Where the data of each large stored zip member begins, ascending; empty for what is no sound zip."""
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        return []
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, OverflowError, EOFError, OSError, UnicodeError):
        return []
    if len(members) > MAX_RECORDS:
        return []
    starts = set()
    for member in members:
        if member.file_size < MIN_RECORD_BYTES or not 0 <= member.header_offset <= size - _LOCAL_HEADER.size:
            continue
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size:
            continue
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if magic == b"PK\x03\x04" and start < size:
            starts.add(start)
    return sorted(starts)
