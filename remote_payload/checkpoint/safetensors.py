"""safetensors: a JSON header, then one buffer; alone or as shards listed in an index file."""

from __future__ import annotations

import json
import math
import os
import struct
from typing import Any, Optional

from remote_payload.checkpoint.dtypes import SAFETENSORS_DTYPES, item_bytes
from remote_payload.checkpoint.errors import MalformedCheckpointError, MissingCheckpointError, TruncatedCheckpointError
from remote_payload.checkpoint.inert import StorageRef, TensorRef
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.placement import contiguous_stride
from remote_payload.checkpoint.records import DataFile, RawCheckpoint, Record, integrity_problem
from remote_payload.checkpoint.source import Source
from remote_payload.wire.codec import WireError
from remote_payload.wire.names import check_artifact_path

INDEX_SUFFIX = ".safetensors.index.json"
_LENGTH = struct.Struct("<Q")
_MAX_DIMENSIONS = 64


class SafetensorsReader:
    """One file. Every offset is checked against the shape, its neighbours and the file's end."""

    def recognises(self, head: bytes) -> bool:
        return len(head) > _LENGTH.size and head[_LENGTH.size : _LENGTH.size + 1] == b"{" and head[:1] != b"{"

    def read(self, source: Source, limits: Limits) -> RawCheckpoint:
        raw = RawCheckpoint("safetensors", {}, (DataFile(source.path, source.size),), (), {})
        tree: dict[str, object] = {}
        _add_file(raw, tree, source, 0, limits)
        raw.root = tree
        return raw


def read_index(path: str, limits: Limits) -> RawCheckpoint:
    """A sharded checkpoint from its index file. Raises `CheckpointError`; shards lie beside the index."""
    weight_map = read_weight_map(path, limits)
    names = sorted(set(weight_map.values()))
    raw = RawCheckpoint("safetensors_sharded", {}, (), (), {})
    tree: dict[str, object] = {}
    files = []
    for index, name in enumerate(names):
        with _open_shard(path, name) as shard:
            files.append(DataFile(shard.path, shard.size))
            _add_file(raw, tree, shard, index, limits)
    raw.files = tuple(files)
    raw.root = {name: tree[name] for name in weight_map if name in tree}
    compare_with_index(raw, tree, weight_map)
    return raw


def read_weight_map(path: str, limits: Limits) -> dict[str, str]:
    """The index's map of tensor names to file names. Raises `CheckpointError`."""
    with Source(path) as source:
        document = _json_object(source.read(0, source.size)) if source.size <= limits.safetensors_header_bytes else None
    weight_map = document.get("weight_map") if document else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise MalformedCheckpointError(f"{path} has no weight_map of names to files")
    files = len(set(weight_map.values()))
    if files > limits.shards:
        raise MalformedCheckpointError(f"{path} names {files} files; {limits.shards} are allowed")
    return weight_map


def _open_shard(index_path: str, name: str) -> Source:
    try:
        check_artifact_path(name)
    except WireError:
        raise MalformedCheckpointError(f"the index names {name[:200]!r}, which is no plain file name") from None
    try:
        return Source(os.path.join(os.path.dirname(index_path), name))
    except MissingCheckpointError:
        raise TruncatedCheckpointError(f"the shard {name!r} that the index names does not exist") from None


def compare_with_index(raw: RawCheckpoint, tree: dict[str, object], weight_map: dict[str, str]) -> None:
    """A problem where the index and the shards beside it do not name the same tensors."""
    absent = [n for n in weight_map if n not in tree]
    extra = [n for n in tree if n not in weight_map]
    if absent or extra:
        raw.problems.append(
            integrity_problem(
                "integrity.shard_mismatch",
                f"{len(absent)} tensors of the index are in no shard, {len(extra)} of the shards in no index",
                tuple((absent + extra)[:50]),
                {"absent": len(absent), "extra": len(extra)},
                "Index and shards do not belong together: one of them comes from another save.",
            )
        )


def _add_file(raw: RawCheckpoint, tree: dict[str, object], source: Source, index: int, limits: Limits) -> None:
    if source.size < _LENGTH.size:
        raise TruncatedCheckpointError(f"{source.path} ends inside its first eight bytes")
    length = _LENGTH.unpack(source.read(0, _LENGTH.size))[0]
    if length > limits.safetensors_header_bytes:
        raise MalformedCheckpointError(f"{source.path} claims a header of {length} bytes")
    if _LENGTH.size + length > source.size:
        raise TruncatedCheckpointError(f"{source.path} ends inside its header of {length} bytes")
    document = _json_object(source.read(_LENGTH.size, length))
    start = _LENGTH.size + length
    metadata = document.pop("__metadata__", None)
    if isinstance(metadata, dict):
        raw.metadata.update(metadata)
    records = [_record(raw, tree, name, entry, index, start, source.size) for name, entry in document.items()]
    _check_coverage(raw, records, start, source)
    raw.records += tuple(records)


def _record(
    raw: RawCheckpoint, tree: dict[str, object], name: str, entry: Any, index: int, start: int, file_size: int
) -> Record:
    dtype, shape, offsets = _entry_fields(name, entry)
    if name in tree:
        raise MalformedCheckpointError(f"tensor {name[:200]!r} is in two shards")
    begin, end = offsets
    numel = math.prod(shape)
    width = item_bytes(dtype)
    inside = start + end <= file_size
    record = Record(name, index, start + begin, end - begin, None, inside)
    if width is not None and numel * width != end - begin:
        raw.problems.append(
            integrity_problem(
                "integrity.record_size",
                f"Tensor {name[:200]} needs {numel * width} bytes and is given {end - begin}",
                (name[:200],),
                {"expected_bytes": numel * width, "record_bytes": end - begin},
                "Shape times element size does not give the tensor's span of bytes.",
            )
        )
    raw.storages[name] = record
    tree[name] = TensorRef(StorageRef(name, dtype, numel), dtype, 0, shape, contiguous_stride(shape))
    return record


def _entry_fields(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if isinstance(entry, dict):
        dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
        if isinstance(dtype, str) and shape is not None and offsets and len(offsets) == 2 and offsets[0] <= offsets[1]:
            return SAFETENSORS_DTYPES.get(dtype, dtype[:40]), shape, (offsets[0], offsets[1])
    raise MalformedCheckpointError(f"the header's entry for {name[:200]!r} lacks dtype, shape or data_offsets")


def _sizes(value: object) -> Optional[tuple[int, ...]]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return None
    return tuple(value) if all(type(n) is int and 0 <= n < 1 << 62 for n in value) else None


def _check_coverage(raw: RawCheckpoint, records: list[Record], start: int, source: Source) -> None:
    """The format leaves no gap, no overlap and nothing behind the last tensor."""
    reach = start
    overlapping, gaps = [], 0
    for record in sorted(records, key=lambda r: (r.offset, r.size)):
        if record.offset < reach and record.size:
            overlapping.append(record.name[:200])
        gaps += max(0, record.offset - reach)
        reach = max(reach, record.offset + record.size)
    outside = [r.name[:200] for r in records if not r.readable]
    if reach > source.size:
        raw.problems.append(
            integrity_problem(
                "integrity.truncated",
                f"{os.path.basename(source.path)} ends {reach - source.size} bytes before its last tensor",
                tuple(outside),
                {"file_bytes": source.size, "needed_bytes": reach, "missing_bytes": reach - source.size},
                "The header places tensors beyond the end of the file.",
            )
        )
    if overlapping or gaps or reach < source.size:
        raw.problems.append(
            integrity_problem(
                "integrity.record_overlap",
                f"{len(overlapping)} tensors overlap; {gaps + max(0, source.size - reach)} bytes belong to none",
                tuple(overlapping),
                {"overlapping": len(overlapping), "bytes_in_gaps": gaps, "bytes_behind": max(0, source.size - reach)},
                "safetensors allows neither overlap nor gap: the header is forged or damaged.",
            )
        )


def _bounded_integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("an integer beyond 64 bits")
    return int(digits)


def _json_object(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise MalformedCheckpointError("a name appears twice in the header")
        return made

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_int=_bounded_integer)
    except (ValueError, RecursionError):
        raise MalformedCheckpointError("the header is not JSON") from None
    if not isinstance(document, dict):
        raise MalformedCheckpointError("the header is no JSON object")
    return document
