"""Where the tensors of a checkpoint stand in its file, as far as that is needed to cut it by content.

Nothing here is trusted: a damaged or hostile file has no records, or wrong ones, and is cut at other places for it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

MIN_RECORD_BYTES = 64 * 1024
"""Records below this are no chunks of their own: thousands of tiny ones would only cost round trips."""
MAX_RECORDS = 200_000
MAX_HEADER_BYTES = 32 * 1024 * 1024
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_HEADER_LENGTH = struct.Struct("<Q")


def record_cuts(file: BinaryIO, size: int) -> list[int]:
    """Where large records begin and end, ascending, each once and strictly within the file; empty for an unknown kind
    of file and for a damaged one.

    What lies between two large records (headers, padding, small records) is a piece of its own: it changes whenever
    the offsets shift, and must not change the digest of a tensor's last bytes with it.
    """
    file.seek(0)
    start = file.read(8)
    spans = _zip_records(file, size) if start[:4] == _ZIP_MAGIC else _safetensors_records(file, start, size)
    cuts: set[int] = set()
    reached = 0
    for begin, length in sorted(spans):
        if length >= MIN_RECORD_BYTES and begin >= reached and begin + length <= size:
            reached = begin + length
            cuts.update((begin, reached))
    return sorted(cuts - {0, size})


def _zip_records(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """(offset, stored length) of every large member's data."""
    import zipfile  # only here: most of what imports this module cuts nothing

    damaged = (zipfile.BadZipFile, struct.error, ValueError, OverflowError, EOFError, OSError, NotImplementedError)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except damaged:
        return
    if len(members) > MAX_RECORDS:
        return
    for member in members:
        last_start = size - _LOCAL_HEADER.size
        if member.compress_size < MIN_RECORD_BYTES or not 0 <= member.header_offset <= last_start:
            continue
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size:
            continue
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if magic == _ZIP_MAGIC:
            yield member.header_offset + _LOCAL_HEADER.size + name_length + extra_length, member.compress_size


def _safetensors_records(file: BinaryIO, start: bytes, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of every tensor that the header of a safetensors file speaks of."""
    if len(start) < _HEADER_LENGTH.size:
        return
    header_bytes = _HEADER_LENGTH.unpack(start)[0]
    data_start = _HEADER_LENGTH.size + header_bytes
    if not 2 <= header_bytes <= MAX_HEADER_BYTES or data_start > size or file.read(1) != b"{":
        return
    file.seek(_HEADER_LENGTH.size)
    try:
        header: Any = json.loads(file.read(header_bytes))
    except (ValueError, RecursionError):
        return
    if not isinstance(header, dict) or len(header) > MAX_RECORDS:
        return
    for entry in header.values():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
            begin, end = offsets
            if 0 <= begin < end:
                yield data_start + begin, end - begin
