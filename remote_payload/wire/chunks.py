"""How a file is cut into chunks, and the digest that follows from it.

A file's digest is `v1:` + SHA-256 over the ordered binary SHA-256 digests of its chunks. Chunks cover every byte. They
begin and end with each large tensor (a record of a torch zip, or of a safetensors file), so that it keeps its digests
when the pickle before it grows and shifts the offsets behind it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import BinaryIO, Callable, Optional

from remote_payload.wire.names import FILE_DIGEST_PREFIX
from remote_payload.wire.records import record_cuts

CHUNK_BYTES = 8 * 1024 * 1024
SAMPLE_CHUNKS = 8


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

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(offset, length) of each chunk."""
        return [(chunk.offset, chunk.length) for chunk in self.chunks]


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
    cuts = [*record_cuts(file, size), size]
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


def sample_spans(manifest: ChunkManifest) -> tuple[tuple[int, int, str], ...]:
    """(offset, length, sha256) of a few chunks: the first, the last, and others that follow from the digest."""
    count = len(manifest.chunks)
    chosen = {0, count - 1} if count else set()
    step = 0
    while len(chosen) < min(SAMPLE_CHUNKS, count):
        word = hashlib.sha256(f"{manifest.digest}/{step}".encode()).digest()
        chosen.add(int.from_bytes(word[:8], "big") % count)
        step += 1
    picked = (manifest.chunks[index] for index in sorted(chosen))
    return tuple((chunk.offset, chunk.length, chunk.sha256) for chunk in picked)
