"""The records of a torch zip whose end is lost, found by walking from one local header to the next."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Optional

from remote_payload.checkpoint.dtypes import item_bytes
from remote_payload.checkpoint.inert import StorageRef
from remote_payload.checkpoint.records import Record
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.zip_directory import LOCAL_MAGIC, local_member

_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_DESCRIPTORS = (struct.Struct("<4sIII"), struct.Struct("<4sIQQ"))
"""Behind a record: magic, CRC, and both sizes in 32 or, beyond 4 GiB, 64 bits."""
_SMALL_RECORD_BYTES = 4096
"""Records beside the tensors (version, byte order and their like) are shorter than this."""


def surviving_records(
    source: Source, start: int, prefix: str, storages: Mapping[str, StorageRef], limit: int
) -> dict[str, Record]:
    """Records of tensors that are complete, by storage key. `start` is behind the pickle's last byte.

    torch leaves sizes out of its local headers; a storage's own claim says where its record must end, and only a
    descriptor or another header there is believed. The walk ends at the first place that does not fit.
    """
    return dict(_walk(source, start, prefix, storages, limit))


def _walk(
    source: Source, at: int, prefix: str, storages: Mapping[str, StorageRef], limit: int
) -> Iterator[tuple[str, Record]]:
    folder = f"{prefix}data/"
    for _ in range(limit):
        start = _next_header(source, at)
        member = local_member(source, start) if start is not None else None
        if member is None:
            return
        name, offset = member
        key = name[len(folder) :] if name.startswith(folder) else ""
        storage = storages.get(key)
        width = item_bytes(storage.dtype) if storage is not None else None
        if storage is None or width is None:
            if name == f"{prefix}byteorder" and source.read(offset, min(3, source.size - offset)) == b"big":
                return
            at = offset
            continue
        size = storage.numel * width
        if offset + size > source.size or not _ends_at(source, offset + size):
            return
        crc = _stated_crc(source, offset + size, size)
        yield key, Record(name, 0, offset, size, crc)
        at = offset + size


def _ends_at(source: Source, at: int) -> bool:
    """Whether something that follows a record stands there, as far as the file goes."""
    behind = source.read(at, min(4, source.size - at))
    return _DESCRIPTOR_MAGIC.startswith(behind) or LOCAL_MAGIC.startswith(behind)


def _next_header(source: Source, at: int) -> Optional[int]:
    """The next local header, which is right behind a record or behind its descriptor, or behind a small record."""
    length = min(_SMALL_RECORD_BYTES, source.size - at)
    if length <= 0:
        return None
    found = source.read(at, length).find(LOCAL_MAGIC)
    return at + found if found >= 0 else None


def _stated_crc(source: Source, at: int, size: int) -> Optional[int]:
    """The checksum in the descriptor at `at`, None without one that fits, or where the writer left it out."""
    for form in _DESCRIPTORS:
        if at + form.size <= source.size:
            magic, crc, packed, plain = form.unpack(source.read(at, form.size))
            if magic == _DESCRIPTOR_MAGIC and packed == plain == size:
                return int(crc) if crc or not size else None
    return None
