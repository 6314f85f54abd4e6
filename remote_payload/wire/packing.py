"""Floats in fewer bytes: an element's bytes are split into planes, and those that hold exponents are Huffman-coded.

A packed chunk: element width u8; for each plane, the first bytes of all elements first: kind u8, length u32 big-endian;
then the planes in that order; then the bytes that fill no element. A plane is raw, a raw deflate stream, one byte that
is repeated, or paired: 15 common values, how many others there are (u32), those in their order, and a raw deflate
stream of a byte for two elements, the upper half for the first: its value's place among the common ones, 15 for others.
Exponents have few values, and zlib takes its time for each byte. Only the standard library is needed to unpack it, and
nothing larger than the chunk ever arises.
"""

from __future__ import annotations

import binascii
import collections
import struct
import zlib
from collections.abc import Collection, Iterator
from typing import NamedTuple, Optional, Union

from remote_payload.wire.codec import WireError

WIDTHS = (1, 2, 4, 8)
_RAW, _DEFLATED, _REPEATED, _PAIRED = 0, 1, 2, 3
_PLANE = struct.Struct(">BI")
_COMMON = 15
_DIGITS, _OTHER = b"0123456789abcde", b"f"
_PAIRED_HEAD = struct.Struct(f">{_COMMON}sI")
_FEW = 64
"""Of so many values of a paired plane no more than one is another than the common ones."""
_WORTH = 0.95
"""What shrinks to no less than this, a plane or a sample of a chunk, is left as it is."""
_SAMPLE_BYTES = 8 * 1024
_SAMPLES = 4
_LOOK_BYTES = 64
_LOOKED_AT_VALUES = 4096
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
    packed = [_pack_plane(sample[start::width], in_pairs=False) for start in range(width)]
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


def _pack_plane(plane: Union[bytes, bytearray], *, in_pairs: bool = True) -> tuple[int, Union[bytes, bytearray]]:
    first = plane[:1]
    # Counting would take as long as coding, comparing ends at the first difference.
    if plane and plane[:_LOOK_BYTES] == first * min(_LOOK_BYTES, len(plane)) and plane == first * len(plane):
        return _REPEATED, first
    coded = _paired(plane) if in_pairs else None
    kind = _DEFLATED if coded is None else _PAIRED
    if coded is None:
        coder = _new_coder()
        coded = coder.compress(plane) + coder.flush()
    return (kind, coded) if len(coded) < _WORTH * len(plane) else (_RAW, plane)


def _paired(plane: Union[bytes, bytearray]) -> Optional[bytes]:
    """A paired plane; None for one of too many values."""
    counts = collections.Counter(plane[:: len(plane) // _LOOKED_AT_VALUES + 1])
    common = bytes(value for value, _ in counts.most_common(_COMMON))
    table = bytearray(_OTHER * 256)
    for digit, value in zip(_DIGITS, common):
        table[value] = digit
    coder, others, parts = _new_coder(), bytearray(), []
    for start in range(0, len(plane), 2 * _PIECE_BYTES):
        piece = plane[start : start + 2 * _PIECE_BYTES]
        digits = piece.translate(table)
        place = digits.find(_OTHER)
        while place >= 0:
            others.append(piece[place])
            place = digits.find(_OTHER, place + 1)
        if len(others) * _FEW > len(plane):
            return None
        parts.append(coder.compress(binascii.unhexlify(digits if len(digits) % 2 == 0 else digits + _DIGITS[:1])))
    return b"".join((_PAIRED_HEAD.pack(common, len(others)), others, *parts, coder.flush()))


def _new_coder() -> zlib._Compress:
    return zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)


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
    elif kind == _PAIRED and count and len(packed) >= _PAIRED_HEAD.size:
        yield from _unpaired(packed, count)
    else:
        raise WireError(f"a plane of unknown kind {kind}")


def _unpaired(packed: memoryview, count: int) -> Iterator[Union[bytes, bytearray]]:
    common, other_count = _PAIRED_HEAD.unpack_from(packed)
    begin = _PAIRED_HEAD.size
    if other_count * _FEW > count or other_count > len(packed) - begin:
        raise WireError("a paired plane has too many other values")
    others = iter(packed[begin : begin + other_count])
    table = bytearray(256)
    for digit, value in zip(_DIGITS, common):
        table[digit] = value
    left = count
    for pairs in _inflated(packed[begin + other_count :], (count + 1) // 2):
        digits = binascii.hexlify(pairs)
        if len(digits) == left + 1:
            digits = digits[:left]
        left -= len(digits)
        values = bytearray(digits.translate(table))
        place = digits.find(_OTHER)
        while place >= 0:
            value = next(others, None)
            if value is None:
                raise WireError("a paired plane lacks values")
            values[place] = value
            place = digits.find(_OTHER, place + 1)
        yield values


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
