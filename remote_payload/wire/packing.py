"""Floats in fewer bytes: an element's bytes are split into planes, and those that hold exponents are Huffman-coded.

A packed chunk: element width u8; for each plane, the first bytes of all elements first: kind u8, length u32 big-endian;
then the planes in that order; then the bytes that fill no element. A plane is raw, a raw deflate stream, or one byte
that is repeated. Only the standard library is needed to unpack it, and nothing larger than the chunk ever arises.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator
from typing import NamedTuple, Optional, Union

from remote_payload.wire.codec import WireError

WIDTHS = (1, 2, 4, 8)
_RAW, _DEFLATED, _REPEATED = 0, 1, 2
_PLANE = struct.Struct(">BI")
_WORTH = 0.95
"""What shrinks to no less than this, a plane or a sample of a chunk, is left as it is."""
_SAMPLE_BYTES = 8 * 1024
_SAMPLES = 4
_LOOK_BYTES = 64
_PIECE_BYTES = 64 * 1024


class Planes(NamedTuple):
    """How floats would be packed: element width, the planes that shrink, and packed bytes / bytes."""

    width: int
    coded: Collection[int]
    ratio: float


def pack_floats(data: Union[bytes, bytearray]) -> Optional[bytes]:
    """`data` in fewer bytes, as floats of the width that a sample tells; None where it had better go as it is."""
    found = best_planes(data)
    if found.ratio > _WORTH:
        return None
    packed = pack(data, found.width, found.coded)
    return packed if len(packed) < len(data) else None


def best_planes(data: Union[bytes, bytearray]) -> Planes:
    """The element width that packs a sample best, and which of its planes do."""
    size = _SAMPLE_BYTES
    step = max(size, (len(data) - size) // (_SAMPLES - 1) // 8 * 8)
    sample = b"".join(data[start : start + size] for start in range(0, len(data), step))
    return min((_planes(sample, width) for width in WIDTHS), key=lambda planes: planes.ratio)


def _planes(sample: bytes, width: int) -> Planes:
    packed = [_pack_plane(sample[start::width]) for start in range(width)]
    coded = [number for number, (kind, _) in enumerate(packed) if kind != _RAW]
    return Planes(width, coded, sum(len(body) for _, body in packed) / len(sample) if sample else 1.0)


def pack(data: Union[bytes, bytearray], width: int, coded: Optional[Collection[int]] = None) -> bytes:
    """`data`, as elements of `width` bytes, packed; not always shorter. Planes other than those `coded`, if it is
    given, stay as they are."""
    count = len(data) // width
    whole = count * width
    planes = []
    for number in range(width):
        plane = data[number:whole:width]
        planes.append(_pack_plane(plane) if coded is None or number in coded else (_RAW, plane))
    heads = b"".join(_PLANE.pack(kind, len(body)) for kind, body in planes)
    return b"".join((bytes((width,)), heads, *(body for _, body in planes), data[whole:]))


def unpack(body: Union[bytes, memoryview], length: int, into: Optional[bytearray] = None) -> memoryview:
    """The `length` bytes that were packed, at the start of `into` if it is given, which is no shorter. Raises
    `WireError` for anything else."""
    width = body[0] if body else 0
    if width not in WIDTHS or len(body) < 1 + width * _PLANE.size:
        raise WireError("a packed chunk has no head")
    count, rest = divmod(length, width)
    view = memoryview(body)
    at = 1 + width * _PLANE.size
    data = bytearray(length) if into is None else into
    for plane in range(width):
        kind, packed_bytes = _PLANE.unpack_from(body, 1 + plane * _PLANE.size)
        if packed_bytes > len(body) - at:
            raise WireError("a packed chunk is shorter than it says")
        done = 0
        # In pieces that stay in the processor's cache, and for which no new pages are needed.
        for piece in _pieces(kind, view[at : at + packed_bytes], count):
            begin, done = done, done + len(piece)
            if done > count:
                raise WireError("a plane is longer than its elements")
            data[plane + begin * width : plane + done * width : width] = piece
        if done != count:
            raise WireError("a plane is shorter than its elements")
        at += packed_bytes
    if len(body) - at != rest:
        raise WireError("a packed chunk has another length than it says")
    data[count * width : length] = view[at:]
    return memoryview(data)[:length]


def _pack_plane(plane: Union[bytes, bytearray]) -> tuple[int, Union[bytes, bytearray]]:
    first = plane[:1]
    # Counting would take as long as coding, comparing ends at the first difference.
    if plane and plane[:_LOOK_BYTES] == first * min(_LOOK_BYTES, len(plane)) and plane == first * len(plane):
        return _REPEATED, first
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(plane) + coder.flush()
    return (_DEFLATED, coded) if len(coded) < _WORTH * len(plane) else (_RAW, plane)


def _pieces(kind: int, packed: memoryview, count: int) -> Iterator[Union[bytes, bytearray, memoryview]]:
    """A plane, which should be of `count` bytes, in its order."""
    if kind == _RAW:
        for start in range(0, len(packed), _PIECE_BYTES):
            yield packed[start : start + _PIECE_BYTES]
    elif kind == _REPEATED and len(packed) == 1:
        for start in range(0, count, _PIECE_BYTES):
            yield bytearray(packed) * min(_PIECE_BYTES, count - start)
    elif kind == _DEFLATED and count:
        yield from _inflated(packed, count)
    else:
        raise WireError(f"a plane of unknown kind {kind}")


def _inflated(packed: memoryview, count: int) -> Iterator[bytes]:
    """As long as no more than `count` bytes were taken, no more than one beyond them are inflated."""
    decoder = zlib.decompressobj(-15)
    try:
        for start in range(0, len(packed), _PIECE_BYTES):
            piece = decoder.decompress(packed[start : start + _PIECE_BYTES], count + 1)
            count -= len(piece)
            yield piece
    except zlib.error as error:
        raise WireError(f"a plane is damaged: {error}") from None
    if not decoder.eof or decoder.unused_data:
        raise WireError("a plane does not end where it should")
