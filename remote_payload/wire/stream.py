"""The binary protocol of the stream verbs, spoken behind the agent's ready line on its standard streams.

Both directions carry frames: a header of 22 bytes, big-endian, then `length` bytes of body, then the body's CRC-32,
except for DATA, whose body has a SHA-256 elsewhere.

    magic "RE" · version u8 · kind u8 · encoding u8 · zero u8 · length u32 · argument u64 · check u32

`check` is the CRC-32 of the 18 bytes before it. `encoding` is one of `DATA_ENCODINGS` in a DATA frame and 0 in any
other; 0: the bytes as they are; 1: packed as `packing` says, which must make them fewer. A frame that breaks these
rules ends the stream; nothing it held was used.

`receive` puts a file into the store. The request's params are a `ReceiveRequest`. Then:

    client → agent   MANIFEST  a page of the chunk table (`chunk_table.py`); argument: index of its first chunk. As
                               many pages as the table needs, in order; none for an empty file
    agent → client   WAITING   JSON `WaitingFacts`, repeated while another client sends the same file, or while
                               room is made, or what is here is read or copied from
                     REUSED    JSON `ReusedFacts`, before HAVE or FINISHED: chunks that were copied from what is here,
                               or what became of a stored copy that was not believed
                     HAVE      bitmap of the chunks that are here and durable, lowest bit first; argument: chunk count
                     FINISHED  JSON `FinishedFacts`: the file is here already (instead of HAVE)
    client → agent   DIGEST    of a draft only: the SHA-256 of the chunk whose DATA comes next; argument: its index
                     COPY      of a draft only: the SHA-256 of a chunk that the agent is to copy from what is here when
                               it finds the time; argument: its index
                     DATA      one whole chunk; argument: its index. Any order, any subset. It stands for every chunk
                               of the table that has its digest
                     FINISH    every chunk was sent and acknowledged, on whatever stream
                     KEEP      instead of FINISH: every chunk that is wanted for now was; the rest may follow some day.
                               Bitmap of the wanted chunks; argument: chunk count
                     ALIVE     of a draft only: the client has nothing to say yet. The agent answers with an ALIVE
                     LEAVE     no more chunks come over this stream; argument 1, of a draft only: nobody needs it any
                               more
    agent → client   ACK       argument: index of a chunk that was verified and written
                     REFUSED   argument: index of a chunk whose bytes are not what the table says: send it again
                     COPIED    of a draft only; argument: of so many chunks more, in the order of their COPYs, there is
                               nothing left to copy: each stands here, or could not be had
                     ALIVE     argument: bytes of DATA taken so far, so that a slow chunk does not look like silence
                     HAVE      answers FINISH and KEEP while chunks are missing; FINISHED answers either when the file
                               is in place
                     KEPT      JSON `KeptFacts`, answers KEEP: the file stays a part, and jobs may read what is here
                     LEFT      JSON `LeftFacts`, answers LEAVE once what was acknowledged is durable
                     FAILURE   JSON `StreamFailure`; the stream ends

Behind FINISHED, KEPT and LEFT the stream is on stand-by (below).

A draft is what goes of a file before it may take the place of others, or before its digest is known: then its request
names another one that stands for it, and the table's digests are zeros. It is never finished. The file's own request
says later which draft it `adopts`, and so does a draft that goes by the file's digest, of an earlier one.

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
    client → agent   LEAVE     the stream is on stand-by behind the answers to the wants before

`standby` is a stream that is opened before it is known what for, as one is that has served a verb to its end:

    client → agent   ALIVE     again and again: the agent is still wanted. It is not answered
                     PERFORM   JSON `StreamCall`: from here on the stream is as one that was opened for that verb

`forward` is in `wire/forward.py`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
import zlib
from typing import Any, Callable, NamedTuple, Optional, TypeVar, Union

from remote_payload.wire.chunks import CHUNK_BYTES
from remote_payload.wire.codec import WireError, from_json, to_json
from remote_payload.wire.failures import RemoteFailure

T = TypeVar("T")
Buffer = Union[bytes, bytearray, memoryview]

STREAM_VERSION = 1
MAX_DATA_BYTES = CHUNK_BYTES
MAX_CONTROL_BYTES = 1024 * 1024
MAX_SPAN_BYTES = 64 * 1024 * 1024
RAW_ENCODING = 0
PACKED_ENCODING = 1
DATA_ENCODINGS = frozenset({RAW_ENCODING, PACKED_ENCODING})
"""How the body of a DATA frame may be written; a receiver refuses any other."""

_MAGIC = b"RE"
_HEADER = struct.Struct(">2sBBBBIQ")
_CHECK = struct.Struct(">I")
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
    COPY = 23
    PACKED = 24
    COPIED = 25


class DamagedStreamError(WireError):
    """Bytes that are no frame, or a frame out of turn. The stream is of no further use; a new one is."""


@dataclasses.dataclass(frozen=True)
class StandbyRequest:
    """`wait_s`: the agent gives up after so long without a word. Behind another verb that is the `idle_s` of that."""

    wait_s: float = 60.0


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
    nothing is freed for it or copied before it begins. `adopts`: the digest that stood for this file, if one did.
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
    """Another session is sending this file, room is made for it, or what is here of it is read or copied;
    `journalled` grows as that gets on."""

    journalled: int


@dataclasses.dataclass(frozen=True)
class ReusedFacts:
    """So many bytes of the file were had from other files of the store, or from the same file. The stored copy of it
    may have been touched since it was verified: `was_read`: it was read in full and is what its digest says;
    `was_changed`: it is not, and is replaced."""

    bytes_reused: int
    was_read: bool = False
    was_changed: bool = False


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
    """So many bytes of the file are verified and durable; `bytes_reused` of them were copied for this stream."""

    bytes_here: int
    bytes_reused: int = 0


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
