"""A zip archive's directory, read with every claim checked against the file. Tensors are never inflated."""

from __future__ import annotations

import dataclasses
import struct
from typing import Optional

from remote_payload.checkpoint.errors import MalformedCheckpointError
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.source import Source

LOCAL_MAGIC = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s5HIIIHH")
_CENTRAL = struct.Struct("<4s6HIIIHHHHHII")
_END = struct.Struct("<4s4HIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_MAX_COMMENT = 65535
_ENCRYPTED = 0x1


@dataclasses.dataclass(frozen=True)
class Member:
    """One entry. `data_offset` is None when its local header is not where the directory says."""

    name: str
    crc32: int
    size: int
    compressed_size: int
    method: int
    encrypted: bool
    header_offset: int
    data_offset: Optional[int]

    @property
    def is_stored(self) -> bool:
        return self.method == 0 and not self.encrypted and self.size == self.compressed_size


@dataclasses.dataclass(frozen=True)
class Directory:
    """All members in the directory's order. `missing_bytes`: what it promises beyond what is there."""

    members: tuple[Member, ...]
    offset: int
    missing_bytes: int
    trailing_bytes: int


def read_directory(source: Source, limits: Limits) -> Optional[Directory]:
    """The archive's directory; None if the file has no end record, as one cut short. Raises `CheckpointError`."""
    # No writer of checkpoints adds a comment; only where the end record is not last is a longer tail searched.
    for comment_bytes in (0, _MAX_COMMENT):
        tail_offset = max(0, source.size - _END.size - comment_bytes)
        tail = source.read(tail_offset, source.size - tail_offset)
        at = tail.rfind(b"PK\x05\x06", 0, max(0, len(tail) - _END.size + 4))
        if 0 <= at <= len(tail) - _END.size:
            break
    else:
        return None
    end_offset = tail_offset + at
    _, disk, directory_disk, _, count, size, offset, comment = _END.unpack_from(tail, at)
    trailing = source.size - end_offset - _END.size - comment
    if disk not in (0, 0xFFFF) or directory_disk not in (0, 0xFFFF):
        raise MalformedCheckpointError("the archive spans several disks")
    directory_end = end_offset
    # torch writes a zip64 end record whether or not the sizes need one.
    wide = _read_end64(source, end_offset)
    if wide is not None:
        directory_end, count, size, offset = wide
    elif 0xFFFFFFFF in (size, offset):
        raise MalformedCheckpointError("the archive's zip64 end record is missing")
    if count > limits.records or size > limits.directory_bytes:
        raise MalformedCheckpointError(f"the archive's directory claims {count} records in {size} bytes")
    missing = offset + size - directory_end
    # Bytes lost in the middle move the directory; it still lies right in front of its end record.
    start = directory_end - size
    if start < 0:
        raise MalformedCheckpointError(f"the archive's directory of {size} bytes does not fit into the file")
    members = _read_members(source, source.read(start, size), count, start)
    return Directory(members, start, missing, max(0, trailing))


def local_data_offset(source: Source, header_offset: int, name: Optional[bytes] = None) -> Optional[int]:
    """Where a member's data begins; None if there is no local header there, or one of another name."""
    if header_offset + _LOCAL.size > source.size:
        return None
    fixed = _LOCAL.unpack(source.read(header_offset, _LOCAL.size))
    name_length, extra_length = fixed[-2], fixed[-1]
    start = header_offset + _LOCAL.size
    if fixed[0] != LOCAL_MAGIC or start + name_length + extra_length > source.size:
        return None
    if name is not None and source.read(start, name_length) != name:
        return None
    return int(start + name_length + extra_length)


def local_member(source: Source, header_offset: int) -> Optional[tuple[str, int]]:
    """Name and data offset by the local header there, for files whose directory is lost; None without one."""
    offset = local_data_offset(source, header_offset)
    if offset is None:
        return None
    length = _LOCAL.unpack(source.read(header_offset, _LOCAL.size))[-2]
    return source.read(header_offset + _LOCAL.size, length).decode("utf-8", "replace"), offset


def _read_end64(source: Source, end_offset: int) -> Optional[tuple[int, int, int, int]]:
    """(offset of the zip64 end record, count, size, offset) or None when the archive is no zip64."""
    locator_offset = end_offset - _LOCATOR.size
    if locator_offset < 0:
        return None
    magic, _, stated, _ = _LOCATOR.unpack(source.read(locator_offset, _LOCATOR.size))
    if magic != b"PK\x06\x07":
        return None
    # Lost bytes move it: then it lies right in front of its locator.
    for offset in (stated, locator_offset - _END64.size):
        if 0 <= offset <= locator_offset - _END64.size:
            values = _END64.unpack(source.read(offset, _END64.size))
            if values[0] == b"PK\x06\x06":
                return offset, values[7], values[8], values[9]
    raise MalformedCheckpointError("the archive's zip64 end record is missing")


def _read_members(source: Source, directory: bytes, count: int, directory_offset: int) -> tuple[Member, ...]:
    members: list[Member] = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory):
            raise MalformedCheckpointError(f"the archive's directory ends after {len(members)} of {count} records")
        fields = _CENTRAL.unpack_from(directory, at)
        flags, method, crc = fields[3], fields[4], fields[7]
        packed, size, name_length, extra_length, comment_length = fields[8:13]
        header_offset = fields[16]
        if fields[0] != b"PK\x01\x02":
            raise MalformedCheckpointError(f"record {len(members)} of the archive's directory is damaged")
        at += _CENTRAL.size
        raw_name = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        size, packed, header_offset = _widen(extra, size, packed, header_offset)
        in_front = 0 <= header_offset < directory_offset
        data_offset = local_data_offset(source, header_offset, raw_name) if in_front else None
        name = raw_name.decode("utf-8", "replace")
        encrypted = bool(flags & _ENCRYPTED)
        members.append(Member(name, crc, size, packed, method, encrypted, header_offset, data_offset))
    return tuple(members)


def _widen(extra: bytes, size: int, packed: int, header_offset: int) -> tuple[int, int, int]:
    """Replace the fields that are all ones by those of the zip64 extra field, in the format's order."""
    if 0xFFFFFFFF not in (size, packed, header_offset):
        return size, packed, header_offset
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            values = []
            for value in (size, packed, header_offset):
                values.append(wide.pop(0) if value == 0xFFFFFFFF and wide else value)
            return values[0], values[1], values[2]
        at += 4 + length
    return size, packed, header_offset
