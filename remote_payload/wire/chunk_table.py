"""The chunk table of `receive`: what its MANIFEST pages and bitmaps of chunks hold, and how either end reads them.

An entry of the table is a chunk's length u32, big-endian, and its binary SHA-256; a page is a run of whole entries.
"""

from __future__ import annotations

import array
import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Optional

from remote_payload.wire.chunks import CHUNK_BYTES, Chunk, ChunkManifest
from remote_payload.wire.codec import WireError
from remote_payload.wire.names import FILE_DIGEST_PREFIX
from remote_payload.wire.stream import Buffer, DamagedStreamError

MAX_CHUNKS = 1_000_000
"""Bounds the agent's memory: the table of so many chunks takes 50 MB."""
MANIFEST_PAGE_CHUNKS = 16_384

_ENTRY = struct.Struct(">I32s")


class ChunkTable:
    """A file's chunks in 44 bytes each; offsets follow from the lengths, so they can neither overlap nor leave gaps."""

    def __init__(self, packed: bytes, size: int) -> None:
        """`packed` as in MANIFEST pages. Raises `WireError` unless the chunks cover `size` bytes exactly."""
        if len(packed) % _ENTRY.size or len(packed) // _ENTRY.size > MAX_CHUNKS:
            raise WireError("the chunk table has a wrong length")
        self.size = size
        self._packed: Buffer = packed
        self._offsets = array.array("Q")
        self._same: Optional[dict[bytes, list[int]]] = None
        offset = 0
        for length, _ in _ENTRY.iter_unpack(packed):
            if not 0 < length <= CHUNK_BYTES:
                raise WireError(f"a chunk of {length} bytes is not allowed")
            self._offsets.append(offset)
            offset += length
        if offset != size:
            raise WireError(f"the chunks cover {offset} bytes of {size}")

    def __len__(self) -> int:
        return len(self._offsets)

    def offset(self, index: int) -> int:
        return self._offsets[index]

    def length(self, index: int) -> int:
        return int(_ENTRY.unpack_from(self._packed, index * _ENTRY.size)[0])

    def sha256(self, index: int) -> bytes:
        """The chunk's binary digest."""
        return bytes(_ENTRY.unpack_from(self._packed, index * _ENTRY.size)[1])

    def same_chunks(self, index: int) -> Sequence[int]:
        """The indices of all chunks with the digest of this one, itself among them, ascending."""
        if self._same is None:
            first: dict[bytes, int] = {}
            self._same = {}
            for number, (_, digest) in enumerate(_ENTRY.iter_unpack(self._packed)):
                if first.setdefault(digest, number) != number:
                    self._same.setdefault(digest, [first[digest]]).append(number)
        return self._same.get(self.sha256(index), (index,))

    def file_digest(self) -> str:
        """The `v1:` digest over ordered chunk digests, as `chunks.file_digest`."""
        outer = hashlib.sha256()
        for _, digest in _ENTRY.iter_unpack(self._packed):
            outer.update(digest)
        return FILE_DIGEST_PREFIX + outer.hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        for offset, (length, digest) in zip(self._offsets, _ENTRY.iter_unpack(self._packed)):
            yield Chunk(offset, length, digest.hex())

    def manifest(self) -> ChunkManifest:
        return ChunkManifest(self.file_digest(), self.size, tuple(self.chunks()))


class DraftTable(ChunkTable):
    """The table of a file whose chunks' digests become known one after the other; until then they are zeros."""

    def __init__(self, packed: bytes, size: int) -> None:
        super().__init__(packed, size)
        self._growing = bytearray(packed)
        self._packed = memoryview(self._growing).toreadonly()

    def set_sha256(self, index: int, sha256: bytes) -> None:
        _ENTRY.pack_into(self._growing, index * _ENTRY.size, self.length(index), sha256)

    def same_chunks(self, index: int) -> Sequence[int]:
        return (index,)


def pack_unknown(lengths: Iterable[int]) -> bytes:
    """The chunks of a `DraftTable` by their lengths."""
    return b"".join(_ENTRY.pack(length, b"") for length in lengths)


def pack_chunks(chunks: tuple[Chunk, ...]) -> bytes:
    """Chunks as `ChunkTable` reads them."""
    return b"".join(_ENTRY.pack(chunk.length, bytes.fromhex(chunk.sha256)) for chunk in chunks)


def manifest_pages(packed: bytes) -> Iterator[tuple[int, bytes]]:
    """(index of the first chunk, page) for MANIFEST frames."""
    page_bytes = MANIFEST_PAGE_CHUNKS * _ENTRY.size
    for start in range(0, len(packed), page_bytes):
        yield start // _ENTRY.size, packed[start : start + page_bytes]


def page_chunk_count(page: bytes) -> int:
    """How many chunks a MANIFEST page holds. Raises `DamagedStreamError` unless it holds whole ones."""
    if not page or len(page) % _ENTRY.size:
        raise DamagedStreamError("a page of the chunk table has a wrong length")
    return len(page) // _ENTRY.size


def encode_bitmap(flags: bytearray) -> bytes:
    """One bit for each byte of `flags`, lowest bit first."""
    bits = bytearray((len(flags) + 7) // 8)
    for index, flag in enumerate(flags):
        if flag:
            bits[index >> 3] |= 1 << (index & 7)
    return bytes(bits)


def decode_bitmap(bits: bytes, count: int) -> bytearray:
    """`count` flags. Raises `DamagedStreamError` for a bitmap of another length."""
    if len(bits) != (count + 7) // 8:
        raise DamagedStreamError("the bitmap of chunks has a wrong length")
    return bytearray(bits[index >> 3] >> (index & 7) & 1 for index in range(count))
