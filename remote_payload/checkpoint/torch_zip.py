"""What torch.save has written since 1.6: a zip of one pickle and one stored record per storage."""

from __future__ import annotations

import zlib
from typing import Optional

from remote_payload.checkpoint import zip_directory
from remote_payload.checkpoint.errors import MalformedCheckpointError, NotACheckpointError, TruncatedCheckpointError
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.records import DataFile, RawCheckpoint, Record, integrity_problem
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.unpickle import unpickle
from remote_payload.checkpoint.zip_directory import Directory, Member
from remote_payload.checkpoint.zip_recovery import surviving_records
from remote_payload.wire.results import Finding

_PICKLE = "data.pkl"


class TorchZipReader:
    """Reads the directory, the pickle and nothing else; a file cut short is described as far as its pickle goes."""

    def recognises(self, head: bytes) -> bool:
        return head.startswith(zip_directory.LOCAL_MAGIC)

    def read(self, source: Source, limits: Limits) -> RawCheckpoint:
        directory = zip_directory.read_directory(source, limits)
        if directory is None:
            return _read_without_directory(source, limits)
        return _read_archive(source, directory, limits)


def _read_archive(source: Source, directory: Directory, limits: Limits) -> RawCheckpoint:
    pickles = [m for m in directory.members if m.name == _PICKLE or m.name.endswith("/" + _PICKLE)]
    if not pickles:
        raise NotACheckpointError(f"{source.path} is a zip archive without {_PICKLE}: torch.save did not write it")
    prefix = pickles[0].name[: -len(_PICKLE)]
    by_name = {m.name: m for m in reversed(directory.members)}
    unpickled = unpickle(_member_bytes(source, pickles[0], limits.pickle_bytes), limits)
    records = tuple(_record(m, directory.offset) for m in directory.members)
    raw = RawCheckpoint(
        format="torch_zip",
        root=unpickled.value,
        files=(DataFile(source.path, source.size),),
        records=records,
        storages=_storages(records, f"{prefix}data/"),
        symbols=unpickled.symbols,
        storage_refs=unpickled.storage_refs,
        cost=unpickled.cost,
        byte_order=_text(source, by_name.get(f"{prefix}byteorder")) or "little",
        format_version=_text(source, by_name.get(f"{prefix}version")),
    )
    if raw.byte_order not in ("little", "big"):
        raise MalformedCheckpointError(f"the record byteorder says {raw.byte_order[:40]!r}")
    if f"{prefix}constants.pkl" in by_name:
        raw.notes.append("A TorchScript archive: its code is not looked at, its tensors are.")
    if len(pickles) > 1:
        raw.notes.append(f"{len(pickles)} records are called {_PICKLE}; the first is read.")
    raw.problems.extend(_directory_problems(directory, source.size, f"{prefix}data/"))
    return raw


def _storages(records: tuple[Record, ...], folder: str) -> dict[str, Record]:
    storages: dict[str, Record] = {}
    for record in records:
        if record.name.startswith(folder):
            storages.setdefault(record.name[len(folder) :], record)
    return storages


def _record(member: Member, directory_offset: int) -> Record:
    offset = member.data_offset
    inside = offset is not None and offset + member.compressed_size <= directory_offset
    # The checksum of nothing is 0; a writer that skips checksums leaves 0 beside real bytes.
    crc = member.crc32 if member.crc32 or not member.size else None
    return Record(member.name, 0, offset or 0, member.size, crc, inside and member.is_stored)


def _directory_problems(directory: Directory, size: int, tensor_folder: str) -> list[Finding]:
    problems = []
    misplaced = [m for m in directory.members if m.data_offset is None]
    outside = [
        m
        for m in directory.members
        if m.data_offset is not None and m.data_offset + m.compressed_size > directory.offset
    ]
    if directory.missing_bytes > 0 or outside:
        beyond = max((m.header_offset + m.compressed_size for m in outside), default=0)
        problems.append(
            integrity_problem(
                "integrity.truncated",
                f"Bytes are missing: {len(outside) + len(misplaced)} records do not lie inside the file",
                tuple(m.name[:200] for m in outside),
                {"file_bytes": size, "missing_bytes": directory.missing_bytes, "needed_to": beyond},
                "The archive's directory places records beyond the bytes that precede it.",
            )
        )
    if misplaced:
        problems.append(
            integrity_problem(
                "integrity.record_misplaced",
                f"{len(misplaced)} records are not where the archive's directory says",
                tuple(m.name[:200] for m in misplaced),
                {"records": len(misplaced), "first_offset": misplaced[0].header_offset, "file_bytes": size},
                "At a record's stated offset there is no header of that record, so its bytes cannot be told.",
            )
        )
    # TorchScript compresses its code; only what should be a tensor's bytes has to be stored.
    packed = [m for m in directory.members if not m.is_stored and m.name.startswith(tensor_folder)]
    if packed:
        problems.append(
            integrity_problem(
                "integrity.record_packed",
                f"{len(packed)} tensor records are compressed or encrypted",
                tuple(m.name[:200] for m in packed),
                {"records": len(packed), "stated_bytes": sum(m.size for m in packed)},
                "torch.save stores every tensor as it is. Packed records are not inflated, since what they grow to is "
                "bounded by nothing; their tensors are not read.",
                "Unpack the archive and save the checkpoint again with torch.save.",
            )
        )
    problems.extend(_overlap_problems(directory))
    if directory.trailing_bytes:
        problems.append(
            integrity_problem(
                "integrity.trailing_bytes",
                f"{directory.trailing_bytes} bytes follow the archive's end",
                (),
                {"trailing_bytes": directory.trailing_bytes},
                "Something was appended after the archive was complete; nothing of it is read.",
            )
        )
    return problems


def _overlap_problems(directory: Directory) -> list[Finding]:
    placed = sorted(
        (m.header_offset, m.data_offset + m.compressed_size, m.name)
        for m in directory.members
        if m.data_offset is not None
    )
    overlapping = []
    reach, owner = 0, ""
    for start, end, name in placed:
        if start < reach:
            overlapping.append(f"{owner[:100]} and {name[:100]}")
        if end > reach:
            reach, owner = end, name
    repeated = len(directory.members) - len({m.name for m in directory.members})
    if not overlapping and not repeated:
        return []
    return [
        integrity_problem(
            "integrity.record_overlap",
            f"{len(overlapping)} records overlap, {repeated} names are repeated",
            tuple(overlapping),
            {"overlapping": len(overlapping), "repeated_names": repeated},
            "Two records claim the same bytes or the same name, which no writer of checkpoints does: the directory is "
            "forged or damaged.",
        )
    ]


def _member_bytes(source: Source, member: Member, limit: int) -> bytes:
    if member.data_offset is None:
        raise MalformedCheckpointError(f"record {member.name[:200]!r} is not where the archive's directory says")
    if max(member.size, member.compressed_size) > limit:
        raise MalformedCheckpointError(f"record {member.name[:200]!r} claims {member.size} bytes; {limit} are allowed")
    data = source.read(member.data_offset, member.compressed_size)
    if member.is_stored:
        return data
    if member.method != zlib.DEFLATED or member.encrypted:
        raise MalformedCheckpointError(f"record {member.name[:200]!r} is packed by method {member.method}")
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    except zlib.error:
        raise MalformedCheckpointError(f"record {member.name[:200]!r} does not inflate") from None


def _text(source: Source, member: Optional[Member]) -> Optional[str]:
    if member is None or member.size > 64 or not member.is_stored or member.data_offset is None:
        return None
    return source.read(member.data_offset, member.size).decode("latin-1").strip()


def _read_without_directory(source: Source, limits: Limits) -> RawCheckpoint:
    """A file whose end is lost: torch writes the pickle first, so names, shapes and types may still be there."""
    first = zip_directory.local_member(source, 0)
    lost = f"{source.path} ends before its archive's directory: {source.size} bytes are there"
    if first is None or not (first[0] == _PICKLE or first[0].endswith("/" + _PICKLE)):
        raise TruncatedCheckpointError(lost)
    name, offset = first
    data = source.read(offset, min(source.size - offset, limits.pickle_bytes))
    try:
        unpickled = unpickle(data, limits)
    except (MalformedCheckpointError, TruncatedCheckpointError) as error:
        raise TruncatedCheckpointError(f"{lost}, and its pickle is incomplete ({error})", error.findings) from None
    prefix = name[: -len(_PICKLE)]
    found = surviving_records(source, offset + unpickled.end, prefix, unpickled.storages, limits.records)
    raw = RawCheckpoint(
        format="torch_zip",
        root=unpickled.value,
        files=(DataFile(source.path, source.size),),
        records=tuple(found.values()),
        storages=found,
        symbols=unpickled.symbols,
        storage_refs=unpickled.storage_refs,
        cost=unpickled.cost,
        directory_lost=True,
    )
    total = len(unpickled.storages)
    raw.problems.append(
        integrity_problem(
            "integrity.truncated",
            f"The file ends before the archive's directory; {len(found)} of {total} storages are whole",
            (),
            {"file_bytes": source.size, "storages": total, "recovered_storages": len(found)},
            "The directory that says where each tensor lies is the last thing that torch.save writes, and it is not "
            "there. Names, shapes and types come from the pickle at the file's start, the places of the tensors that "
            "are still there from the header in front of each; the others cannot be read.",
            "Copy the file again; if the original is as short, the save was interrupted: use the checkpoint before it.",
        )
    )
    return raw
