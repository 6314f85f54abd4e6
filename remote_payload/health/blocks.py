"""Which bytes are read in which order, and which tensors each block holds: decided before anything is read."""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Optional

from remote_payload.checkpoint.dtypes import ITEM_BYTES
from remote_payload.checkpoint.header import CheckpointHeader, TensorEntry
from remote_payload.checkpoint.placement import is_dense
from remote_payload.checkpoint.tensor_bytes import pieces_are_row_ranges
from remote_payload.health.joint import Trio, find_trios
from remote_payload.health.stats import Misalignment

MAX_OVERLAP = 32
"""Views of one storage that are measured at once. Real files share a storage between two or three tensors; a file
made to be slow could lay 100,000 over each other."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors that are the same dense span of bytes read as the same type, or the same part of one: measured once.

    A tensor in pieces is `parts` groups of the same names; each begins `base` bytes into the tensor, where its pieces
    stand one behind the other.
    """

    index: int
    file: int
    offset: int
    length: int
    dtype: str
    names: tuple[str, ...]
    base: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a group that lies in a span: `start` in the span, `position` in the tensor, all in bytes."""

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
class Unit:
    """Records that are read one behind the other, or with `trios` together. What is measured of a single file depends
    on nothing outside its unit; of a folder a tensor's pieces may lie in several."""

    records: tuple[int, ...]
    trios: tuple[int, ...] = ()


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
    shards: dict[tuple[object, ...], list[TensorEntry]] = {}
    strided, not_measured = [], {}
    for tensor in header.tensors:
        if tensor.pieces:
            reason = _unfit_pieces(kept_spans, tensor)
            if reason is None:
                shards.setdefault((tensor.pieces, tensor.dtype), []).append(tensor)
            else:
                not_measured[tensor.name] = reason
        elif tensor.file_offset is None:
            not_measured[tensor.name] = tensor.unreadable or "its bytes are not in the file"
        elif tensor.numel == 0:
            not_measured[tensor.name] = "it has no elements"
        elif not _inside_one(kept_spans, tensor.file, tensor.file_offset, tensor.span_bytes):
            not_measured[tensor.name] = "its record overlaps another"
        elif not tensor.is_dense:
            strided.append(tensor)
        else:
            spans.setdefault((tensor.file, tensor.file_offset, tensor.span_bytes, tensor.dtype), []).append(tensor.name)
    groups = [Group(0, *place, tuple(names)) for place, names in spans.items()]
    groups += [g for tensors in shards.values() for g in _groups_of_pieces(tensors)]
    kept = _limit_overlap(sorted(groups, key=lambda g: (g.file, g.offset, g.length, g.dtype)), not_measured)
    total = sum(size for _, _, size in kept_spans)
    trios, reasons, misaligned = find_trios(header)
    together = _place_trios(header, records, kept, trios, reasons)
    return ScanPlan(records, tuple(kept), tuple(strided), not_measured, total, together, reasons, misaligned)


def iter_blocks(header: CheckpointHeader, plan: ScanPlan, block_bytes: int) -> Iterator[Block]:
    """Every record of the plan in blocks, in the order of its units."""
    cut = BlockCutter(header, plan, block_bytes)
    for unit in plan_units(header, plan):
        yield from cut.blocks_of(unit)


def plan_units(header: CheckpointHeader, plan: ScanPlan) -> Iterator[Unit]:
    """Every record of the plan once. A parameter's moments come with it and a tensor's other pieces behind the first,
    wherever they lie; the rest is in file order."""
    trios: dict[str, list[int]] = {}
    for number, place in enumerate(plan.trios):
        trios.setdefault(place.trio.parameter, []).append(number)
    parameter_of = {record: t.trio.parameter for t in plan.trios for record in t.records}
    together = _records_together(header, plan)
    done: set[int] = set()
    for index in plan.records:
        if index in done:
            continue
        if index in parameter_of:
            numbers = tuple(trios[parameter_of[index]])
            unit = Unit(tuple(record for number in numbers for record in plan.trios[number].records), numbers)
        else:
            unit = Unit(together.get(index, (index,)))
        done.update(unit.records)
        yield unit


class BlockCutter:
    """Cuts units into blocks of at most `block_bytes` (a multiple of 16, so that no element is cut)."""

    def __init__(self, header: CheckpointHeader, plan: ScanPlan, block_bytes: int) -> None:
        self._header, self._plan, self._block_bytes = header, plan, block_bytes
        self._starts = [(g.file, g.offset) for g in plan.groups]

    def blocks_of(self, unit: Unit) -> Iterator[Block]:
        for number in unit.trios:
            yield from _trio_blocks(self._plan, number, self._block_bytes)
        for record in () if unit.trios else unit.records:
            yield from _record_blocks(self._header, self._plan, record, self._starts, self._block_bytes)


def _records_together(header: CheckpointHeader, plan: ScanPlan) -> dict[int, tuple[int, ...]]:
    """The records that hold nothing but a tensor's pieces, all of them for each."""
    record_at = {(header.records[i].file, header.records[i].offset, header.records[i].size): i for i in plan.records}
    found: dict[tuple[str, ...], list[int]] = {}
    for group in plan.groups:
        record = record_at.get((group.file, group.offset, group.length))
        if group.parts > 1 and record is not None:
            found.setdefault(group.names, []).append(record)
    return {record: tuple(dict.fromkeys(records)) for records in found.values() for record in records}


def _record_blocks(
    header: CheckpointHeader, plan: ScanPlan, index: int, starts: list[tuple[int, int]], block_bytes: int
) -> Iterator[Block]:
    groups, record = plan.groups, header.records[index]
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
            piece = Piece(group.index, 0, size, group.base + at)
            ends = start + length == count
            spans.append(Span(record, group.file, group.offset + at, size, (piece,), ends))
        yield Block(tuple(spans), number)


def _place_trios(
    header: CheckpointHeader, records: tuple[int, ...], groups: list[Group], trios: list[Trio], reasons: dict[str, str]
) -> tuple[GroupTrio, ...]:
    """The trios whose three tensors, or their pieces one by one, are each alone in a record of their own."""
    groups_of: dict[str, list[Group]] = {}
    for group in groups:
        for name in group.names:
            groups_of.setdefault(name, []).append(group)
    record_at = {(header.records[i].file, header.records[i].offset): i for i in records if header.records[i].size}
    begins = [(header.records[i].file, header.records[i].offset) for i in records]
    inside = Counter(records[bisect.bisect_right(begins, (g.file, g.offset)) - 1] for g in groups)
    placed: list[GroupTrio] = []
    taken: set[int] = set()
    for trio in trios:
        columns = [sorted(groups_of.get(n, ()), key=lambda g: g.base) for n in trio.names]
        if len({tuple(g.base // ITEM_BYTES[g.dtype] for g in c) for c in columns}) != 1:
            reasons[trio.parameter] = "its pieces are not cut as those of its moments are"
            continue
        found: list[GroupTrio] = []
        mine: set[int] = set()
        for members in zip(*columns):
            indices = [record_at.get((g.file, g.offset)) for g in members]
            alone = [i for g, i in zip(members, indices) if i is not None and header.records[i].size == g.length]
            if (
                len(alone) < 3
                or any(inside[i] != 1 for i in alone)
                or len(set(alone)) < 3
                or (taken | mine) & set(alone)
            ):
                break
            mine.update(alone)
            first, second, third = members
            found.append(GroupTrio(trio, (first.index, second.index, third.index), (alone[0], alone[1], alone[2])))
        if not found or len(found) < len(columns[0]):
            reasons[trio.parameter] = "it or a moment shares its bytes with other tensors"
            continue
        taken |= mine
        placed += found
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


def _inside_one(spans: list[tuple[int, int, int]], file: int, offset: int, length: int) -> bool:
    at = bisect.bisect_right(spans, (file, offset, 1 << 62)) - 1
    if at < 0:
        return False
    found, start, size = spans[at]
    return found == file and offset + length <= start + size


def _unfit_pieces(spans: list[tuple[int, int, int]], tensor: TensorEntry) -> Optional[str]:
    if not tensor.numel:
        return "it has no elements"
    if not pieces_are_row_ranges(tensor) and not all(is_dense(p.shape, p.stride) for p in tensor.pieces):
        return "a piece of it is no dense span"
    if any(not _inside_one(spans, p.file, p.file_offset, p.span_bytes) for p in tensor.pieces):
        return "a record of its pieces overlaps another"
    return None


def _groups_of_pieces(tensors: list[TensorEntry]) -> Iterator[Group]:
    names, pieces = tuple(t.name for t in tensors), [p for p in tensors[0].pieces if p.span_bytes]
    base = 0
    for piece in pieces:
        yield Group(0, piece.file, piece.file_offset, piece.span_bytes, tensors[0].dtype, names, base, len(pieces))
        base += piece.span_bytes


def _piece(group: Group, at: int, length: int) -> Optional[Piece]:
    start, end = max(group.offset, at), min(group.offset + group.length, at + length)
    if start >= end:
        return None
    return Piece(group.index, start - at, end - start, group.base + start - group.offset)


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
