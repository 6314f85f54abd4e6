"""Which bytes are read in which order, and which tensors each block holds: decided before anything is read."""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Optional

from remote_payload.checkpoint.dtypes import ITEM_BYTES
from remote_payload.checkpoint.header import CheckpointHeader, TensorEntry
from remote_payload.health.joint import Trio, find_trios
from remote_payload.health.stats import Misalignment

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
    """The part of a group that lies in a span: `start` in the span, `position` in the group, all in bytes."""

    group: int
    start: int
    length: int
    position: int


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes of one record that are read at once. `record` indexes the header's records."""

    record: int
    file: int
    offset: int
    length: int
    pieces: tuple[Piece, ...]
    ends_record: bool


@dataclasses.dataclass(frozen=True)
class Block:
    """What is read and reduced in one go: one span, or the same elements of a parameter and its two moments."""

    spans: tuple[Span, ...]
    trio: Optional[int] = None
    """Index of the plan's trio, whose parameter and moments the three spans are."""

    @property
    def length(self) -> int:
        return sum(s.length for s in self.spans)


@dataclasses.dataclass(frozen=True)
class GroupTrio:
    """Groups that are read together, each alone in its record."""

    trio: Trio
    groups: tuple[int, int, int]
    records: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ScanPlan:
    """What is read: records (by index, in file order), the groups in them, and the tensors that are no dense span."""

    records: tuple[int, ...]
    groups: tuple[Group, ...]
    strided: tuple[TensorEntry, ...]
    not_measured: dict[str, str]
    total_bytes: int
    trios: tuple[GroupTrio, ...] = ()
    joint_not_measured: dict[str, str] = dataclasses.field(default_factory=dict)
    misaligned: tuple[Misalignment, ...] = ()


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
    trios, reasons, misaligned = find_trios(header)
    together = _place_trios(header, records, kept, trios, reasons)
    return ScanPlan(records, tuple(kept), tuple(strided), not_measured, total, together, reasons, misaligned)


def iter_blocks(header: CheckpointHeader, plan: ScanPlan, block_bytes: int) -> Iterator[Block]:
    """Every record of the plan in blocks of at most `block_bytes` (a multiple of 16, so that no element is cut).

    A parameter's moments come with it, wherever they lie; the rest is in file order.
    """
    groups = plan.groups
    starts = [(g.file, g.offset) for g in groups]
    together = {record: n for n, trio in enumerate(plan.trios) for record in trio.records}
    done: set[int] = set()
    for index in plan.records:
        if index in together:
            number = together[index]
            if number not in done:
                done.add(number)
                yield from _trio_blocks(plan, number, block_bytes)
            continue
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
            yield Block((Span(index, record.file, at, length, pieces, at + length >= end),))
            at += length
            if record.size == 0:
                break


def _trio_blocks(plan: ScanPlan, number: int, block_bytes: int) -> Iterator[Block]:
    trio = plan.trios[number]
    groups = [plan.groups[g] for g in trio.groups]
    widths = [ITEM_BYTES[g.dtype] for g in groups]
    count = groups[0].length // widths[0]
    # Each span begins at a multiple of 16 bytes of its tensor.
    step = max(16, block_bytes // sum(widths) // 16 * 16)
    for start in range(0, count, step):
        length = min(step, count - start)
        spans = []
        for group, record, width in zip(groups, trio.records, widths):
            at, size = start * width, length * width
            piece = Piece(group.index, 0, size, at)
            ends = start + length == count
            spans.append(Span(record, group.file, group.offset + at, size, (piece,), ends))
        yield Block(tuple(spans), number)


def _place_trios(
    header: CheckpointHeader, records: tuple[int, ...], groups: list[Group], trios: list[Trio], reasons: dict[str, str]
) -> tuple[GroupTrio, ...]:
    """The trios whose three tensors are each alone in a record of their own."""
    group_of = {name: g for g in groups for name in g.names}
    record_at = {(header.records[i].file, header.records[i].offset): i for i in records if header.records[i].size}
    begins = [(header.records[i].file, header.records[i].offset) for i in records]
    inside = Counter(records[bisect.bisect_right(begins, (g.file, g.offset)) - 1] for g in groups)
    placed: list[GroupTrio] = []
    taken: set[int] = set()
    for trio in trios:
        found = [group_of.get(n) for n in (trio.parameter, trio.first_moment, trio.second_moment)]
        members = [g for g in found if g is not None]
        indices = [record_at.get((g.file, g.offset)) for g in members]
        alone = [i for g, i in zip(members, indices) if i is not None and header.records[i].size == g.length]
        if len(alone) < 3 or any(inside[i] != 1 for i in alone) or len(set(alone)) < 3 or taken & set(alone):
            reasons[trio.parameter] = "it or a moment shares its bytes with other tensors"
            continue
        taken.update(alone)
        first, second, third = members
        placed.append(GroupTrio(trio, (first.index, second.index, third.index), (alone[0], alone[1], alone[2])))
    return tuple(placed)


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
