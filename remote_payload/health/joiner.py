"""Adds up blocks, those of a unit in their order: the same numbers whichever thread was faster, or unit came first."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Callable, Optional

import numpy as np

from remote_payload.checkpoint.dtypes import ITEM_BYTES, is_floating
from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.header import CheckpointHeader, Role, TensorEntry
from remote_payload.checkpoint.tensor_bytes import map_tensor, pieces_are_row_ranges
from remote_payload.checkpoint.torch_tensors import tensor_from_map
from remote_payload.health import kernels
from remote_payload.health.blocks import Block, Group, ScanPlan, Span, plan_units
from remote_payload.health.crc import crc32_join
from remote_payload.health.distribution import (
    Array,
    Distribution,
    init_distances,
    moments_of,
    tally,
    within,
)
from remote_payload.health.facts import ChecksumFacts, ChecksumMismatch, ScanResult
from remote_payload.health.joint import JointPart, Trio, finish_joint
from remote_payload.health.kernels import Part
from remote_payload.health.rows import RowAccumulator, RowShape, row_shape
from remote_payload.health.stats import MAX_LOCATIONS, JointStats, Moments, TensorStats, finish, index_of
from remote_payload.health.worker import BlockOutcome

_MAX_READ_ERRORS = 50
_EMPTY = Distribution(np.zeros(0), np.zeros(0, dtype=np.int64))


class Joiner:
    """At any time only the tensors that the last block touched are open."""

    def __init__(self, header: CheckpointHeader, plan: ScanPlan) -> None:
        self.take_counts: Callable[[int], Optional[Array]] = lambda _: None
        """Gives the counts of a closed group that a worker kept on its device, and forgets them."""
        self.rows: dict[int, RowAccumulator] = {}
        """Of the open groups; workers look into it to see what still matters."""
        self.shapes = _row_shapes(header, plan)
        self._header = header
        self._plan = plan
        self._open: dict[tuple[str, ...], _OpenGroup] = {}
        self._joint_parts: dict[str, JointPart] = {}
        self._joint_left = Counter(t.trio.parameter for t in plan.trios)
        self._spreads: dict[str, Distribution] = {}
        self._in_trios = {n for t in plan.trios for n in t.trio.names}
        self._crcs: dict[int, Optional[int]] = {}
        self._stats: dict[str, TensorStats] = {}
        self._joint: dict[str, JointStats] = {}
        self._not_measured = dict(plan.not_measured)
        self._joint_not_measured = dict(plan.joint_not_measured)
        self._mismatches: list[tuple[int, ChecksumMismatch]] = []
        self._checked = 0
        self._errors: dict[int, str] = {}

    def join(self, block: Block, outcome: BlockOutcome) -> None:
        for number, span in enumerate(block.spans):
            if outcome.error is not None:
                self._fail(span, outcome.error)
            else:
                found = outcome.spans[number]
                self._add_checksum(span, found.crc32)
                for piece, part in zip(span.pieces, found.parts):
                    self._group(piece.group).add(piece.position, part)
            for piece in span.pieces:
                group = self._plan.groups[piece.group]
                if piece.position + piece.length == group.base + group.length:
                    self._close(group)
            if span.ends_record:
                self._end_record(span)
        if block.trio is not None:
            self._add_joint(block, outcome)

    def add_strided(self, tensor: TensorEntry) -> None:
        """Measure a view that is no dense span; small parts are copied out of the map."""
        if not kernels.is_supported(tensor.dtype) or self._header.byte_order == "big":
            self._not_measured[tensor.name] = f"a strided view of {tensor.dtype} values"
            return
        try:
            parts = kernels.strided_parts(tensor_from_map(map_tensor(self._header, tensor.name)))
        except CheckpointError as error:
            self._not_measured[tensor.name] = str(error)
            return
        if parts is None:
            self._not_measured[tensor.name] = "a view whose elements overlap"
            return
        total = _OpenGroup(tensor.dtype, None, 1)
        for part in parts:
            found = kernels.reduce_values(part.contiguous().reshape(-1).view(kernels.BYTES), tensor.dtype)
            found.nan = found.inf = ()
            total.add(0, found)
        self._stats[tensor.name] = total.finish(tensor)

    def result(self) -> ScanResult:
        records = self._header.records
        kept = set(self._plan.records)
        # In the plan's order, whatever the order in which units arrived.
        units = list(plan_units(self._header, self._plan))
        failed = [i for unit in units for i in unit.records if i in self._errors][:_MAX_READ_ERRORS]
        parameters = [self._plan.trios[unit.trios[0]].trio.parameter for unit in units if unit.trios]
        return ScanResult(
            stats=self._stats,
            not_measured=self._not_measured,
            checksums=ChecksumFacts(
                records=len(records),
                checked=self._checked,
                without=sum(1 for i, r in enumerate(records) if r.crc32 is None and i in kept),
                mismatches=tuple(m for _, m in sorted(self._mismatches, key=lambda m: m[0])),
            ),
            read_errors={records[i].name: self._errors[i] for i in failed},
            bytes_read=self._plan.total_bytes,
            joint={name: self._joint[name] for name in parameters if name in self._joint},
            joint_not_measured=self._joint_not_measured,
            misaligned=self._plan.misaligned,
        )

    def _group(self, index: int) -> _OpenGroup:
        group = self._plan.groups[index]
        state = self._open.get(group.names)
        if state is None:
            state = self._open[group.names] = _OpenGroup(group.dtype, self.shapes.get(index), group.parts)
        if state.rows is not None:
            self.rows[index] = state.rows
        return state

    def _fail(self, span: Span, error: str) -> None:
        self._crcs[span.record] = None
        self._errors.setdefault(span.record, error)
        for piece in span.pieces:
            self._group(piece.group).failed = error

    def _add_checksum(self, span: Span, crc: Optional[int]) -> None:
        before = self._crcs.get(span.record, 0)
        if before is not None and crc is not None:
            self._crcs[span.record] = crc32_join(before, crc, span.length)

    def _end_record(self, span: Span) -> None:
        record = self._header.records[span.record]
        computed = self._crcs.pop(span.record, 0)
        if record.crc32 is not None and computed is not None:
            self._checked += 1
            if computed != record.crc32:
                mismatch = ChecksumMismatch(record.name, record.crc32, computed, record.size)
                self._mismatches.append((span.record, mismatch))

    def _add_joint(self, block: Block, outcome: BlockOutcome) -> None:
        trio = self._plan.trios[block.trio or 0].trio
        part = self._joint_parts.setdefault(trio.parameter, JointPart())
        if outcome.joint is not None:
            part.add(outcome.joint)
        if not block.spans[0].ends_record:
            return
        self._joint_left[trio.parameter] -= 1
        if self._joint_left[trio.parameter]:
            return
        del self._joint_parts[trio.parameter]
        spreads = [self._spreads.pop(n, _EMPTY) for n in trio.names]
        if any(n not in self._stats for n in trio.names):
            self._joint_not_measured[trio.parameter] = "it or a moment could not be read"
            return
        self._joint[trio.parameter] = self._finish_joint(trio, part, spreads)

    def _finish_joint(self, trio: Trio, part: JointPart, spreads: list[Distribution]) -> JointStats:
        second = self._header.tensor(trio.second_moment)
        stats = self._stats[trio.second_moment]
        return finish_joint(trio, stats.count, part, spreads, stats.nan, second.dtype)

    def _close(self, group: Group) -> None:
        state = self._open[group.names]
        kept = self.take_counts(group.index)
        if kept is not None:
            state.add(0, Part(counts=kept))
        self.rows.pop(group.index, None)
        state.left -= 1
        if state.left:
            return
        del self._open[group.names]
        reason = state.failed or (None if kernels.is_supported(group.dtype) else f"{group.dtype} is not supported")
        if reason is not None:
            self._not_measured.update(dict.fromkeys(group.names, reason))
            return
        for name in self._in_trios.intersection(group.names):
            self._spreads[name] = state.spread()
        stats: dict[tuple[object, ...], TensorStats] = {}
        for name in group.names:
            tensor = self._header.tensor(name)
            key = (tensor.shape, tensor.stride, tensor.role)
            if key not in stats:
                stats[key] = state.finish(tensor)
            self._stats[name] = stats[key]


class _OpenGroup:
    """A group, or all `left` groups of a tensor in pieces, of which not every block has been joined."""

    def __init__(self, dtype: str, shape: Optional[RowShape], left: int) -> None:
        self.left = left
        self.nan: list[int] = []
        self.inf: list[int] = []
        self.failed: Optional[str] = None
        self.rows = RowAccumulator(shape) if shape is not None else None
        self._dtype = dtype
        self._moments: Optional[Moments] = None
        self._counts: Optional[Array] = None
        self._result: Optional[tuple[Moments, Distribution]] = None

    def add(self, position: int, part: Part) -> None:
        if part.nan or part.inf:
            first = position // ITEM_BYTES[self._dtype]
            # Sorted, since the pieces of a tensor need not lie in its order.
            self.nan = sorted([*self.nan, *(first + p for p in part.nan)])[:MAX_LOCATIONS]
            self.inf = sorted([*self.inf, *(first + p for p in part.inf)])[:MAX_LOCATIONS]
        if part.counts is not None:
            if self._counts is None:
                self._counts = part.counts
            else:
                self._counts += part.counts
        if part.moments is not None:
            self._moments = self._moments or Moments()
            self._moments.add(part.moments)
        if part.rows is not None and self.rows is not None:
            self.rows.add(part.rows)

    def spread(self) -> Distribution:
        return self._read()[1]

    def _read(self) -> tuple[Moments, Distribution]:
        """Moments and distribution, worked out once."""
        if self._result is None:
            table = kernels.table_of(self._dtype)
            if table is None or self._counts is None:
                self._result = self._moments or Moments(), _EMPTY
            else:
                found = tally(self._counts, table)
                moments = self._moments or moments_of(found, self._dtype)
                self._result = moments, within(found.spread, moments.minimum, moments.maximum)
        return self._result

    def finish(self, tensor: TensorEntry) -> TensorStats:
        moments, spread = self._read()
        stats = finish(
            moments,
            tuple(_index_in(tensor, p) for p in self.nan),
            tuple(_index_in(tensor, p) for p in self.inf),
            is_floating(self._dtype),
        )
        value, share = spread.most_frequent()
        is_matrix = tensor.role in (Role.WEIGHT_MATRIX, Role.EMBEDDING)
        return dataclasses.replace(
            stats,
            quantiles=spread.quantiles(),
            quantile_resolution=spread.resolution if spread.values.size else None,
            dominant_value=value,
            dominant_fraction=share,
            rows=self.rows.finish() if self.rows is not None else None,
            init=init_distances(spread, stats.mean, stats.std, tensor.shape) if is_matrix else (),
        )


def _index_in(tensor: TensorEntry, position: int) -> tuple[int, ...]:
    """Of the element at `position` of a tensor's bytes, or of its pieces one behind the other."""
    if tensor.pieces and not pieces_are_row_ranges(tensor):
        for piece in tensor.pieces:
            count = math.prod(piece.shape)
            if position < count:
                inside = index_of(position, piece.shape, piece.stride)
                return tuple(start + at for start, at in zip(piece.offsets, inside))
            position -= count
    return index_of(position, tensor.shape, tensor.stride)


def _row_shapes(header: CheckpointHeader, plan: ScanPlan) -> dict[int, RowShape]:
    """The rows of each group, by the first of its tensors that has any."""
    shapes = {}
    for group in plan.groups:
        found = (row_shape(header.tensor(n)) for n in group.names)
        shape = next((s for s in found if s is not None), None)
        if shape is not None:
            shapes[group.index] = shape
    return shapes
