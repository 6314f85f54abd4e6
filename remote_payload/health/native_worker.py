"""Reads one block and reduces it by the compiled kernels; what they have no kernel for is `CpuWorker`'s."""

from __future__ import annotations

import ctypes
import dataclasses
import queue
from collections.abc import Sequence
from typing import Optional

import numpy as np

from remote_payload.checkpoint.dtypes import ITEM_BYTES
from remote_payload.health import native_source as source
from remote_payload.health.blocks import Block, Piece, Span
from remote_payload.health.distribution import Array
from remote_payload.health.joint import JointPart
from remote_payload.health.kernels import Part
from remote_payload.health.native import KINDS, JobArguments, NativeKernels, PieceArguments, SpanArguments
from remote_payload.health.rows import RowPart, RowShape, multipliers
from remote_payload.health.stats import Moments
from remote_payload.health.worker import BlockOutcome, CpuWorker, ScanState, SpanOutcome

NATIVE_BLOCK_BYTES = 64 * 1024 * 1024
"""Only what is returned takes memory: a block is read tile by tile."""


@dataclasses.dataclass
class _PieceRoom:
    """What the kernels write for one piece; kept alive here while they run."""

    arguments: PieceArguments
    counts: Array
    moments: Optional[Array] = None
    rows: Optional[RowPart] = None
    multipliers: Optional[Array] = None


class NativeWorker:
    """Callable from any thread; each call takes one of a fixed set of scratch buffers."""

    def __init__(self, state: ScanState, kernels: NativeKernels, threads: int, fallback: CpuWorker) -> None:
        self._state = state
        self._kernels = kernels
        self._fallback = fallback
        self._scratch: queue.SimpleQueue[Array] = queue.SimpleQueue()
        for _ in range(threads):
            self._scratch.put(np.zeros(source.SCRATCH_BYTES + 64, dtype=np.uint8))

    def take_counts(self, _group: int) -> None:
        """Every part brought its counts along."""

    def __call__(self, blocks: Sequence[Block]) -> list[BlockOutcome]:
        return [self._reduce(block) for block in blocks]

    def _reduce(self, block: Block) -> BlockOutcome:
        if not self._fits(block):
            return self._fallback.reduce(block)
        scratch = self._scratch.get()
        try:
            outcome = self._run(block, scratch)
        finally:
            self._scratch.put(scratch)
        # Whatever went wrong, the other way meets it again and says it in the checkpoint's own terms.
        return self._fallback.reduce(block) if outcome is None else outcome

    def _fits(self, block: Block) -> bool:
        if self._state.header.byte_order == "big":
            return False
        weight = block.spans[0].pieces[0] if block.trio is not None else None
        if weight is not None and not self._kernels.rounds_half and self._state.group(weight).dtype == "float16":
            return False
        return all(self._has_kernel(p) for s in block.spans for p in s.pieces)

    def _has_kernel(self, piece: Piece) -> bool:
        dtype = self._state.group(piece).dtype
        return dtype in KINDS and not piece.start % ITEM_BYTES[dtype] and not piece.position % ITEM_BYTES[dtype]

    def _run(self, block: Block, scratch: Array) -> Optional[BlockOutcome]:
        rooms = [[self._room(p) for p in s.pieces] for s in block.spans]
        pieces = [(PieceArguments * len(r))(*(room.arguments for room in r)) for r in rooms]
        spans = (SpanArguments * len(rooms))(*(self._span(s, p) for s, p in zip(block.spans, pieces)))
        job = JobArguments(spans=len(rooms), span=spans)
        job.scratch = -(-scratch.ctypes.data // 64) * 64
        constants = self._state.constants(block)
        if constants is not None:
            job.has_joint = 1
            job.rate, job.rate_at_peak = constants.rate, constants.rate_at_peak
            job.root, job.eps = constants.root, constants.eps
        if self._kernels.run(job):
            scratch[:] = 0
            return None
        outcome = BlockOutcome()
        for span, found, written in zip(spans, rooms, pieces):
            parts = [_part(room, piece) for room, piece in zip(found, written)]
            outcome.spans.append(SpanOutcome(span.crc if span.wants_crc else None, parts))
        if constants is not None:
            outcome.joint = JointPart(*(int(n) for n in job.joint))
        return outcome

    def _span(self, span: Span, pieces: ctypes.Array[PieceArguments]) -> SpanArguments:
        has_checksum = self._state.header.records[span.record].crc32 is not None
        return SpanArguments(
            offset=span.offset,
            length=span.length,
            file=self._state.sources[span.file].descriptor_for(span.offset, span.length),
            wants_crc=int(has_checksum),
            pieces=len(pieces),
            piece=ctypes.cast(pieces, ctypes.POINTER(PieceArguments)),
        )

    def _room(self, piece: Piece) -> _PieceRoom:
        group = self._state.group(piece)
        counts = np.zeros(1 << 16, dtype=np.int64)
        arguments = PieceArguments(start=piece.start, length=piece.length, position=piece.position)
        arguments.kind = KINDS[group.dtype]
        arguments.counts = counts.ctypes.data
        room = _PieceRoom(arguments, counts)
        if group.dtype == "float32":
            room.moments = np.zeros(1 + len(source.MOMENT_COUNTS) + len(source.MOMENT_VALUES))
            arguments.moments = room.moments.ctypes.data
        shape = self._state.shapes.get(group.index)
        if shape is not None:
            self._add_rows(room, piece, ITEM_BYTES[group.dtype], shape)
        return room

    def _add_rows(self, room: _PieceRoom, piece: Piece, width: int, shape: RowShape) -> None:
        position, count = piece.position // width, piece.length // width
        first = position // shape.columns
        rows = (position + count - 1) // shape.columns - first + 1
        wants = shape.has_columns and self._state.wants_columns(piece.group)
        room.rows = RowPart(
            first,
            np.zeros(rows),
            np.full(rows, 0xFFFFFFFF, dtype=np.uint32),
            np.zeros(rows, dtype=np.uint32),
            np.zeros(rows, dtype=np.uint64),
            np.zeros(shape.columns, dtype=bool) if wants else None,
        )
        room.multipliers = multipliers(shape.columns)
        arguments = room.arguments
        arguments.columns, arguments.first = shape.columns, first
        for name in ("squares", "low", "high", "hashes", "alive"):
            array = getattr(room.rows, name)
            setattr(arguments, name, None if array is None else array.ctypes.data)
        arguments.multipliers = room.multipliers.ctypes.data


def _part(room: _PieceRoom, written: PieceArguments) -> Part:
    return Part(
        counts=room.counts,
        moments=None if room.moments is None else _moments(room.moments),
        rows=room.rows,
        nan=tuple(written.nan[: written.nan_count]),
        inf=tuple(written.inf[: written.inf_count]),
    )


def _moments(numbers: Array) -> Moments:
    counts = {n: int(v) for n, v in zip(source.MOMENT_COUNTS, numbers[1:])}
    finite = int(numbers[0])
    result = Moments(**counts, count=finite + counts["nan"] + counts["positive_inf"] + counts["negative_inf"])
    if finite:
        for name, value in zip(source.MOMENT_VALUES, numbers[1 + len(counts) :]):
            setattr(result, name, float(value))
    return result
