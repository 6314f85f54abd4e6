"""The binary protocol of the stream verbs, spoken behind the agent's ready line on its standard streams.

Both directions carry frames: a header of 22 bytes, big-endian, then `length` bytes of body, then the body's CRC-32,
except for DATA, whose body has a SHA-256 elsewhere.

    magic "RE" · version u8 · kind u8 · encoding u8 · zero u8 · length u32 · argument u64 · check u32

`check` is the CRC-32 of the 18 bytes before it. `encoding` is one of `DATA_ENCODINGS` in a DATA frame and 0 in any
other; 0: the bytes as they are; 1: packed as `packing` says, which must make them fewer. A frame that breaks these
rules ends the stream; nothing it held was used.

`receive` puts a file into the store. The request's params are a `ReceiveRequest`. Then:

    client → agent   MANIFEST  chunk table page: (length u32, sha256) per chunk; argument: index of its first chunk.
                               As many pages as the table needs, in order; none for an empty file
    agent → client   WAITING   JSON `WaitingFacts`, repeated while another client sends the same file, or while
                               room is made or chunks are copied from what is here
                     REUSED    JSON `ReusedFacts`, before HAVE: chunks that were copied from what is here
                     HAVE      bitmap of the chunks that are here and durable, lowest bit first; argument: chunk count
                     FINISHED  JSON `FinishedFacts`: the file is here already (instead of HAVE)
    client → agent   DIGEST    of a draft only: the SHA-256 of the chunk whose DATA comes next; argument: its index
                     DATA      one whole chunk; argument: its index. Any order, any subset. It stands for every chunk
                               of the table that has its digest
                     FINISH    every chunk was sent and acknowledged, on whatever stream
                     KEEP      instead of FINISH: every chunk that is wanted for now was; the rest may follow some day.
                               Bitmap of the wanted chunks; argument: chunk count
                     LEAVE     no more chunks come over this stream; argument 1: nobody needs the draft any more
    agent → client   ACK       argument: index of a chunk that was verified and written
                     REFUSED   argument: index of a chunk whose bytes are not what the table says: send it again
                     ALIVE     argument: bytes of DATA taken so far, so that a slow chunk does not look like silence
                     HAVE      answers FINISH and KEEP while chunks are missing; FINISHED answers either when the file
                               is in place
                     KEPT      JSON `KeptFacts`, answers KEEP: the file stays a part, and jobs may read what is here
                     LEFT      JSON `LeftFacts`, answers LEAVE once what was acknowledged is durable: the stream is on
                               stand-by now
                     FAILURE   JSON `StreamFailure`; the stream ends

A draft is a file whose digest is not known yet: its request names another one that stands for it, the table's digests
are zeros, and it is never finished. The file's own request says later which draft it `adopts`.

Several streams may carry one file at once: those with the same `session` share the folder, those of other sessions
wait. A stream that ends, for whatever reason, first makes durable and journals what it acknowledged; so one stream
finishes after the others have ended. `encoding` and new kinds are where a later protocol version adds to this.

`send` gives spans of files. The request's params are a `SendRequest`. Then, as often as the client likes, and without
waiting for earlier answers:

    client → agent   WANT      JSON `Want`
    agent → client   SPAN      JSON `SpanFacts`: what the file is, and what follows
                     DATA      argument: offset; several, in order, unless the want is for a digest only. A packed one
                               stands for the whole span
                     END       JSON `SpanEnd`, with the SHA-256 of the span, unpacked
                     FAILURE   instead of any of them, or amid DATA; the next want is served all the same

`standby` is a stream that is opened before it is known what for. The agent says its ready line once more, and then,
as after LEFT,

    client → agent   PERFORM   JSON `StreamCall`: from here on the stream is as one that was opened for that verb

`forward` is in `wire/forward.py`.
"""

from __future__ import annotations

import array
import dataclasses
import enum
import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Callable, NamedTuple, Optional, TypeVar, Union

from remote_payload.wire.chunks import CHUNK_BYTES, Chunk, ChunkManifest
from remote_payload.wire.codec import WireError, from_json, to_json
from remote_payload.wire.failures import RemoteFailure
from remote_payload.wire.names import FILE_DIGEST_PREFIX

T = TypeVar("T")
Buffer = Union[bytes, bytearray, memoryview]

STREAM_VERSION = 1
MAX_DATA_BYTES = CHUNK_BYTES
MAX_CONTROL_BYTES = 1024 * 1024
MAX_CHUNKS = 1_000_000
"""Bounds the agent's memory: the table of so many chunks takes 50 MB."""
MANIFEST_PAGE_CHUNKS = 16_384
MAX_SPAN_BYTES = 64 * 1024 * 1024
RAW_ENCODING = 0
PACKED_ENCODING = 1
DATA_ENCODINGS = frozenset({RAW_ENCODING, PACKED_ENCODING})
"""How the body of a DATA frame may be written; a receiver refuses any other."""

_MAGIC = b"RE"
_HEADER = struct.Struct(">2sBBBBIQ")
_CHECK = struct.Struct(">I")
_ENTRY = struct.Struct(">I32s")
HEADER_BYTES = _HEADER.size + _CHECK.size


class FrameKind(enum.IntEnum):
    MANIFEST = 1
    WAITING = 2
    HAVE = 3
    DATA = 4
    ACK = 5
    REFUSED = 6
    ALIVE = 7
    FINISH = 8
    FINISHED = 9
    FAILURE = 10
    WANT = 11
    SPAN = 12
    END = 13
    PERFORM = 14
    REUSED = 15
    KEEP = 16
    KEPT = 17
    FORWARDING = 18
    FILL = 19
    DIGEST = 20
    LEAVE = 21
    LEFT = 22


class DamagedStreamError(WireError):
    """Bytes that are no frame, or a frame out of turn. The stream is of no further use; a new one is."""


@dataclasses.dataclass(frozen=True)
class StandbyRequest:
    """`wait_s`: the agent gives up after so long without being told what for."""

    wait_s: float = 900.0


@dataclasses.dataclass(frozen=True)
class StreamCall:
    """Another stream verb and its params, which a stand-by stream goes on as."""

    verb: str
    params: Any


@dataclasses.dataclass(frozen=True)
class ReceiveRequest:
    """Start receiving a file of `size` bytes in `chunk_count` chunks with the `v1:` digest `digest`.

    `session`: 32 hex digits, the same on all streams of one upload. `wait_s`: how long to stand by while another
    session holds the file and does not get on. `idle_s`: the agent gives up after so long without a byte. `run_id`: for
    whom, if for a run. `store_limit_bytes`: the store is kept below that by freeing what nobody needs. `is_draft`:
    `digest` only stands for the file's own. `adopts`: the digest that stood for this file, if one did.
    """

    root: str
    digest: str
    size: int
    chunk_count: int
    session: str
    wait_s: float = 90.0
    idle_s: float = 60.0
    run_id: str = ""
    store_limit_bytes: Optional[int] = None
    is_draft: bool = False
    adopts: str = ""


@dataclasses.dataclass(frozen=True)
class WaitingFacts:
    """Another session is sending this file, room is made for it, or its chunks are copied from what is here;
    `journalled` grows as that gets on."""

    journalled: int


@dataclasses.dataclass(frozen=True)
class ReusedFacts:
    """So many bytes of the file were had from other files of the store, or from the same file."""

    bytes_reused: int


@dataclasses.dataclass(frozen=True)
class FinishedFacts:
    """The verified file stands at `path` on the node."""

    path: str
    digest: str
    size: int


@dataclasses.dataclass(frozen=True)
class KeptFacts:
    """`bytes_here` of the file are verified and may be read by jobs; it will stand at `path` once it is complete."""

    path: str
    digest: str
    size: int
    bytes_here: int


@dataclasses.dataclass(frozen=True)
class LeftFacts:
    """So many bytes of the file are verified and durable."""

    bytes_here: int


@dataclasses.dataclass(frozen=True)
class StreamFailure:
    """`resumable`: the stream was at fault, and the same on a new one may succeed."""

    failure: RemoteFailure
    resumable: bool = False


@dataclasses.dataclass(frozen=True)
class SendRequest:
    root: str
    idle_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class Want:
    """A span of the regular file at the absolute `path`. Below the node root no symbolic link is followed.

    `length` at most `MAX_SPAN_BYTES`; a span is cut at the end of the file. `digest_only`: END without the data.
    `may_grow`: what is appended meanwhile is no change. `may_pack`: floats in it may come packed.
    """

    path: str
    offset: int
    length: int
    digest_only: bool = False
    may_grow: bool = False
    may_pack: bool = False


@dataclasses.dataclass(frozen=True)
class SpanFacts:
    """The file as opened, and `length` bytes of it from `offset` that END will speak of."""

    size: int
    mtime_ns: int
    inode: int
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class SpanEnd:
    """`packing_s`: how long packing took; 0 where the span was not packed."""

    sha256: str
    packing_s: float = 0.0


class FrameHeader(NamedTuple):
    kind: FrameKind
    length: int
    argument: int
    encoding: int = RAW_ENCODING


def encode_frame(kind: FrameKind, argument: int = 0, body: Buffer = b"") -> bytes:
    """A whole control frame."""
    return b"".join((_encode_header(kind, argument, len(body)), body, _CHECK.pack(zlib.crc32(body))))


def encode_json_frame(kind: FrameKind, value: Any, argument: int = 0) -> bytes:
    """A control frame whose body is a dataclass as JSON."""
    return encode_frame(kind, argument, json.dumps(to_json(value)).encode())


def encode_data_header(argument: int, length: int, encoding: int = RAW_ENCODING) -> bytes:
    """The header of a DATA frame; its `length` bytes, written as `encoding` says, follow it."""
    return _encode_header(FrameKind.DATA, argument, length, encoding)


def _encode_header(kind: FrameKind, argument: int, length: int, encoding: int = RAW_ENCODING) -> bytes:
    bare = _HEADER.pack(_MAGIC, STREAM_VERSION, kind, encoding, 0, length, argument)
    return bare + _CHECK.pack(zlib.crc32(bare))


def decode_header(raw: bytes) -> FrameHeader:
    """Check a header of `HEADER_BYTES`. Raises `DamagedStreamError`."""
    magic, version, kind_number, encoding, zero, length, argument = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise DamagedStreamError("what arrived is no frame")
    if version != STREAM_VERSION:
        raise DamagedStreamError(f"a frame of version {version} arrived, {STREAM_VERSION} is spoken here")
    if _CHECK.pack(zlib.crc32(raw[: _HEADER.size])) != raw[_HEADER.size :]:
        raise DamagedStreamError("a frame's header is damaged")
    try:
        kind = FrameKind(kind_number)
    except ValueError:
        raise DamagedStreamError(f"a frame of unknown kind {kind_number} arrived") from None
    if length > (MAX_DATA_BYTES if kind is FrameKind.DATA else MAX_CONTROL_BYTES):
        raise DamagedStreamError(f"a {kind.name} frame of {length} bytes is too long")
    if zero or encoding not in (DATA_ENCODINGS if kind is FrameKind.DATA else (RAW_ENCODING,)):
        raise DamagedStreamError(f"a frame of unknown encoding {encoding} arrived")
    return FrameHeader(kind, length, argument, encoding)


class FrameReader:
    """Frames from `fill`, which fills a buffer completely or raises `EOFError`, at a frame's border as within it."""

    def __init__(self, fill: Callable[[memoryview], None]) -> None:
        self._fill = fill

    def header(self) -> FrameHeader:
        """The next header. A DATA frame's body is left to the caller; any other's is for `body`."""
        raw = bytearray(HEADER_BYTES)
        self._fill(memoryview(raw))
        return decode_header(bytes(raw))

    def body(self, header: FrameHeader) -> bytes:
        """A control frame's body, checked."""
        both = bytearray(header.length + _CHECK.size)
        self._fill(memoryview(both))
        body = bytes(both[: header.length])
        if _CHECK.pack(zlib.crc32(body)) != both[header.length :]:
            raise DamagedStreamError(f"a {header.kind.name} frame is damaged")
        return body


def decode_json(cls: type[T], body: bytes) -> T:
    """The dataclass in a control frame's body. Raises `DamagedStreamError`."""
    try:
        return from_json(cls, json.loads(body))
    except (ValueError, RecursionError) as error:
        raise DamagedStreamError(f"a frame's body is malformed: {error}") from None


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
