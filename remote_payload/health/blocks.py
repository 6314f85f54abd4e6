"""Which bytes are read in which order, and which tensors each block holds: decided before anything is read."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Optional

from remote_payload.checkpoint.header import CheckpointHeader, TensorEntry

MAX_OVERLAP = 32
"""Views of one storage that are measured at once. Real files share a storage between two or three tensors; a file
made to be slow could lay 100,000 over each other."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors that are the same dense span of bytes read as the same type: measured once."""

    index: int
    file: int
    offset: int
    length: int
    dtype: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a group that lies in a block: `start` in the block, `position` in the group, all in bytes."""

    group: int
    start: int
    length: int
    position: int


@dataclasses.dataclass(frozen=True)
class Block:
    """A span of one record that is read at once. `record` indexes the header's records."""

    record: int
    file: int
    offset: int
    length: int
    pieces: tuple[Piece, ...]
    ends_record: bool


@dataclasses.dataclass(frozen=True)
class ScanPlan:
    """What is read: records (by index, in file order), the groups in them, and the tensors that are no dense span."""

    records: tuple[int, ...]
    groups: tuple[Group, ...]
    strided: tuple[TensorEntry, ...]
    not_measured: dict[str, str]
    total_bytes: int


def plan_scan(header: CheckpointHeader) -> ScanPlan:
    """Group the tensors of a header by the bytes that they are.

    Records that overlap an earlier one are left out, so that no more is ever read than the file holds.
    """
    records = _disjoint_records(header)
    kept_spans = [(header.records[i].file, header.records[i].offset, header.records[i].size) for i in records]
    spans: dict[tuple[int, int, int, str], list[str]] = {}
    strided, not_measured = [], {}
    for tensor in header.tensors:
        if tensor.file_offset is None:
            not_measured[tensor.name] = tensor.unreadable or "its bytes are not in the file"
        elif tensor.numel == 0:
            not_measured[tensor.name] = "it has no elements"
        elif not _inside_one(kept_spans, tensor):
            not_measured[tensor.name] = "its record overlaps another"
        elif not tensor.is_dense:
            strided.append(tensor)
        else:
            spans.setdefault((tensor.file, tensor.file_offset, tensor.span_bytes, tensor.dtype), []).append(tensor.name)
    groups: list[Group] = []
    for (file, offset, length, dtype), names in sorted(spans.items()):
        groups.append(Group(len(groups), file, offset, length, dtype, tuple(names)))
    kept = _limit_overlap(groups, not_measured)
    total = sum(size for _, _, size in kept_spans)
    return ScanPlan(records, tuple(kept), tuple(strided), not_measured, total)


def iter_blocks(header: CheckpointHeader, plan: ScanPlan, block_bytes: int) -> Iterator[Block]:
    """Every record of the plan in blocks of `block_bytes` (a multiple of 16, so that no element is cut)."""
    groups = plan.groups
    starts = [(g.file, g.offset) for g in groups]
    for index in plan.records:
        record = header.records[index]
        first = bisect.bisect_left(starts, (record.file, record.offset))
        active: list[Group] = []
        at, end = record.offset, record.offset + record.size
        while at < end or record.size == 0:
            length = min(block_bytes, end - at)
            while first < len(groups) and starts[first] < (record.file, at + length):
                if groups[first].offset >= record.offset:
                    active.append(groups[first])
                first += 1
            active = [g for g in active if g.offset + g.length > at]
            pieces = tuple(p for p in (_piece(g, at, length) for g in active) if p is not None)
            yield Block(index, record.file, at, length, pieces, at + length >= end)
            at += length
            if record.size == 0:
                break


def _disjoint_records(header: CheckpointHeader) -> tuple[int, ...]:
    order = sorted(
        (i for i, r in enumerate(header.records) if r.readable),
        key=lambda i: (header.records[i].file, header.records[i].offset, header.records[i].size),
    )
    kept, reach = [], (-1, 0)
    for index in order:
        record = header.records[index]
        if (record.file, record.offset) >= reach or record.file > reach[0]:
            kept.append(index)
            reach = (record.file, record.offset + record.size)
    return tuple(kept)


def _inside_one(spans: list[tuple[int, int, int]], tensor: TensorEntry) -> bool:
    offset = tensor.file_offset or 0
    at = bisect.bisect_right(spans, (tensor.file, offset, 1 << 62)) - 1
    if at < 0:
        return False
    file, start, size = spans[at]
    return file == tensor.file and offset + tensor.span_bytes <= start + size


def _piece(group: Group, at: int, length: int) -> Optional[Piece]:
    start, end = max(group.offset, at), min(group.offset + group.length, at + length)
    if start >= end:
        return None
    return Piece(group.index, start - at, end - start, start - group.offset)


def _limit_overlap(groups: list[Group], not_measured: dict[str, str]) -> list[Group]:
    kept: list[Group] = []
    open_ends: list[tuple[int, int]] = []
    for group in groups:
        open_ends = [e for e in open_ends if e > (group.file, group.offset)]
        if len(open_ends) >= MAX_OVERLAP:
            for name in group.names:
                not_measured[name] = f"more than {MAX_OVERLAP} tensors overlap it"
            continue
        open_ends.append((group.file, group.offset + group.length))
        kept.append(dataclasses.replace(group, index=len(kept)))
    return kept
