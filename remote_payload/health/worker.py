"""Reads one block and reduces it on the CPU, in the calling thread. Needs torch."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Mapping, Sequence
from typing import Optional

import torch

from remote_payload.checkpoint.dtypes import ITEM_BYTES
from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.torch_tensors import memory_of
from remote_payload.health import kernels
from remote_payload.health.blocks import Block, Group, Piece, ScanPlan, Span
from remote_payload.health.checksum import crc32
from remote_payload.health.joint import JointPart, StepConstants, reduce_joint, step_constants
from remote_payload.health.kernels import Part
from remote_payload.health.rows import RowAccumulator, RowShape, reduce_rows

ALIGNMENT = 4096
"""Where a span begins in a buffer: for any element type, and for what reads whole cache lines."""

BATCH_BYTES = 1 << 20
BATCH_BLOCKS = 32
BATCH_ROOM_BYTES = BATCH_BYTES + BATCH_BLOCKS * 3 * ALIGNMENT
"""What a worker gets at once: one block, or small ones up to this; with each of their spans aligned."""


@dataclasses.dataclass
class SpanOutcome:
    """A span's checksum, None where its record has none, and what its pieces came to, in their order."""

    crc32: Optional[int]
    parts: list[Part]


@dataclasses.dataclass
class BlockOutcome:
    """What a block came to: `spans` in its order, empty after an `error`."""

    spans: list[SpanOutcome] = dataclasses.field(default_factory=list)
    joint: Optional[JointPart] = None
    error: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class ScanState:
    """What all workers share. `rows` is written by whoever joins and only read here."""

    header: CheckpointHeader
    plan: ScanPlan
    sources: list[Source]
    rows: Mapping[int, RowAccumulator]
    shapes: Mapping[int, RowShape]

    def group(self, piece: Piece) -> Group:
        return self.plan.groups[piece.group]

    def constants(self, block: Block) -> Optional[StepConstants]:
        return None if block.trio is None else step_constants(self.plan.trios[block.trio].trio.settings)

    def wants_columns(self, group: int) -> bool:
        accumulator = self.rows.get(group)
        return accumulator is None or accumulator.wants_columns

    def read(self, span: Span, target: memoryview) -> None:
        """Fill `target`, as long as the span, with its bytes. Raises `CheckpointError`."""
        self.sources[span.file].read_into(span.offset, target)


def buffer_bytes(header: CheckpointHeader, plan: ScanPlan, block_bytes: int) -> int:
    """Room for any block with each of its spans aligned."""
    largest = max((header.records[i].size for i in plan.records), default=1)
    if plan.trios:
        largest = max(largest, max(sum(header.records[i].size for i in t.records) for t in plan.trios))
    return max(16, min(block_bytes, largest)) + 3 * ALIGNMENT


class CpuWorker:
    """Callable from any thread; one of a fixed set of buffers is taken for the time of a call."""

    def __init__(self, state: ScanState, threads: int, block_bytes: int) -> None:
        self._state = state
        self._swap = state.header.byte_order == "big"
        self._buffer_bytes = buffer_bytes(state.header, state.plan, block_bytes)
        self._buffers: queue.SimpleQueue[Optional[torch.Tensor]] = queue.SimpleQueue()
        for _ in range(threads):
            # Made where it is first used: the compiled kernels leave little to this worker.
            self._buffers.put(None)

    def __call__(self, blocks: Sequence[Block]) -> list[BlockOutcome]:
        return [self.reduce(block) for block in blocks]

    def reduce(self, block: Block) -> BlockOutcome:
        """Read and reduce one block."""
        buffer = self._buffers.get()
        if buffer is None:
            buffer = torch.empty(self._buffer_bytes, dtype=torch.uint8)
        try:
            return self._reduce(block, buffer)
        except CheckpointError as error:
            return BlockOutcome(error=str(error))
        finally:
            self._buffers.put(buffer)

    def take_counts(self, _group: int) -> None:
        """Every part brought its counts along."""

    def _reduce(self, block: Block, buffer: torch.Tensor) -> BlockOutcome:
        outcome, at, data = BlockOutcome(), 0, []
        for span in block.spans:
            target = buffer[at : at + span.length]
            view = memory_of(target) if span.length else memoryview(b"")
            self._state.read(span, view)
            has_checksum = self._state.header.records[span.record].crc32 is not None
            parts = [reduce_piece(self._state, p, target, self._swap) for p in span.pieces]
            outcome.spans.append(SpanOutcome(crc32(view) if has_checksum else None, parts))
            data.append(target)
            at += -(-span.length // ALIGNMENT) * ALIGNMENT
        constants = self._state.constants(block)
        if constants is not None:
            outcome.joint = reduce_trio(self._state, block, data, constants, self._swap)
        return outcome


def reduce_piece(state: ScanState, piece: Piece, span: torch.Tensor, swap: bool) -> Part:
    """One piece of a span that lies in host memory."""
    group = state.group(piece)
    if not kernels.is_supported(group.dtype):
        return Part()
    width = ITEM_BYTES[group.dtype]
    data = _native(span[piece.start : piece.start + piece.length], group.dtype, swap)
    part = kernels.reduce_values(data, group.dtype)
    shape = state.shapes.get(group.index)
    if shape is not None:
        wants = shape.has_columns and state.wants_columns(group.index)
        part.rows = reduce_rows(data.numpy(), group.dtype, piece.position // width, shape, wants)
    return part


def reduce_trio(
    state: ScanState, block: Block, data: list[torch.Tensor], constants: StepConstants, swap: bool
) -> JointPart:
    """The joint counts of a block whose three spans lie in host memory."""
    types = [state.group(span.pieces[0]).dtype for span in block.spans]
    w, m, v = (_native(d, t, swap).view(getattr(torch, t)) for d, t in zip(data, types))
    return reduce_joint(w, m, v, constants)


def _native(data: torch.Tensor, dtype: str, swap: bool) -> torch.Tensor:
    width = ITEM_BYTES[dtype]
    if swap and width > 1:
        return kernels.in_native_order(data, width // (2 if dtype.startswith("complex") else 1))
    return data.clone() if data.data_ptr() % width else data
