"""Reads one block, copies it to the GPU and reduces it there; what has no kernel is reduced on the CPU. Needs CUDA."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Optional, Union

import numpy as np
import torch

from remote_payload.checkpoint.dtypes import ITEM_BYTES
from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.health import cuda_source as source
from remote_payload.health import kernels
from remote_payload.health.blocks import Block, Piece
from remote_payload.health.crc import crc32_join, crc32_of_remainder, power_of_x8
from remote_payload.health.cuda_buffers import Arena, Buffer, Buffers, Counters
from remote_payload.health.distribution import Array
from remote_payload.health.joint import JointPart
from remote_payload.health.kernels import Part
from remote_payload.health.nvrtc import CompilerUnavailableError, CudaModule
from remote_payload.health.rows import RowPart, RowShape
from remote_payload.health.stats import Moments
from remote_payload.health.worker import (
    ALIGNMENT,
    BATCH_ROOM_BYTES,
    BlockOutcome,
    ScanState,
    SpanOutcome,
    buffer_bytes,
    reduce_piece,
    reduce_trio,
)

_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
_POWERS = 32
_ROW_BLOCKS = 1024
_SEGMENT_ELEMENTS = 4096
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80}
_TILE_VALUES = ("finite", "mean", "squares", "cubes", "fourths", "minimum", "maximum")
_TILE_COUNTS = ("nan", "positive_inf", "negative_inf", "zeros", "ones", "over_fp16", "denormals", "saturated")
TILE_FIELDS = (*_TILE_VALUES, *_TILE_COUNTS)


@functools.lru_cache(maxsize=8)
def load_kernels(device: torch.device) -> tuple[CudaModule, int]:
    """The kernels, and into how many parts a histogram must be cut for this GPU's shared memory.

    Raises `CompilerUnavailableError`.
    """
    module = CudaModule(source.SOURCE, source.KERNELS, device)
    properties = torch.cuda.get_device_properties(device)
    available = int(getattr(properties, "shared_memory_per_block_optin", 48 * 1024))
    parts = 1
    while source.HISTOGRAM_BYTES // parts > available:
        parts *= 2
    if source.HISTOGRAM_BYTES // parts > 48 * 1024:
        module.allow_shared_bytes("histogram", source.HISTOGRAM_BYTES // parts)
    return module, parts


@dataclasses.dataclass
class _RowJob:
    shape: RowShape
    first: int
    count: int
    segments: int
    """Parts of each row, so that few long rows keep the whole GPU busy."""
    wants_columns: bool
    at: int

    @property
    def results(self) -> int:
        return self.count * self.segments


@dataclasses.dataclass
class _PieceJob:
    """What the GPU was asked for one piece; None for a piece that the CPU reduces."""

    piece: Piece
    dtype: str
    elements: int
    offset: int
    flag_at: int
    tiles_at: Optional[int]
    rows: Optional[_RowJob]


@dataclasses.dataclass
class _BlockJob:
    """A block that lies in a buffer, each span at its offset, and where the GPU's results for it will be.

    `pieces` and `crcs` stay empty where the GPU was asked for nothing.
    """

    block: Block
    offsets: list[int] = dataclasses.field(default_factory=list)
    pieces: list[list[Optional[_PieceJob]]] = dataclasses.field(default_factory=list)
    crcs: list[Optional[int]] = dataclasses.field(default_factory=list)
    joint_at: Optional[int] = None


class CudaWorker:
    """Callable from any thread; each call takes one of a bounded set of pinned buffers and streams.

    A GPU whose code cannot be compiled here only holds the buffers: the CPU does the rest.
    """

    def __init__(self, state: ScanState, device: torch.device, threads: int, readers: int, block_bytes: int) -> None:
        """`readers`: how many of the `threads` read at a time; the others wait for the GPU."""
        self._state = state
        self._device = device
        self._swap = state.header.byte_order == "big"
        self._reading = threading.Semaphore(readers)
        self._counters = Counters(device)
        room = max(buffer_bytes(state.header, state.plan, block_bytes), BATCH_ROOM_BYTES)
        self._buffers = Buffers(threads, room, device)
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        powers = [power_of_x8(source.CRC_CHUNK_BYTES << k) for k in range(_POWERS)]
        self._powers = torch.from_numpy(np.asarray(powers, dtype=np.uint32).view(np.int32)).to(device)
        # Compiling takes a good part of a second, in which much can be read.
        compiler = ThreadPoolExecutor(1, thread_name_prefix="health-compile")
        self._kernels: Future[tuple[CudaModule, int]] = compiler.submit(load_kernels, device)
        compiler.shutdown(wait=False)

    def _has_kernels(self) -> bool:
        """False where this GPU's code cannot be compiled: then the CPU reduces, with the same numbers."""
        try:
            self._module, self._histogram_parts = self._kernels.result()
        except CompilerUnavailableError:
            return False
        return True

    def take_counts(self, group: int) -> Optional[Array]:
        """The counts of a group whose every block was reduced; None if the CPU counted it. They are forgotten here."""
        return self._counters.take(group)

    def __call__(self, blocks: Sequence[Block]) -> list[BlockOutcome]:
        with torch.cuda.device(self._device), self._buffers.one() as buffer:
            read: list[Union[_BlockJob, BlockOutcome]] = []
            at = 0
            with self._reading:
                for block in blocks:
                    job = _BlockJob(block)
                    try:
                        at = self._read(job, buffer, at)
                    except CheckpointError as error:
                        read.append(BlockOutcome(error=str(error)))
                    else:
                        read.append(job)
            arena = Arena(buffer)
            if self._has_kernels():
                self._run([job for job in read if isinstance(job, _BlockJob)], at, buffer, arena)
            return [self._collect(job, buffer, arena) if isinstance(job, _BlockJob) else job for job in read]

    def _read(self, job: _BlockJob, buffer: Buffer, at: int) -> int:
        """Fill the buffer from `at` on; where the next block may begin. Raises `CheckpointError`."""
        for span in job.block.spans:
            self._state.read(span, memoryview(buffer.data.view[at : at + span.length]))
            job.offsets.append(at)
            at += -(-span.length // ALIGNMENT) * ALIGNMENT
        return at

    def _run(self, jobs: Sequence[_BlockJob], length: int, buffer: Buffer, arena: Arena) -> None:
        """Have the GPU do what it can for each job, and wait for it."""
        module, stream = self._module, buffer.stream
        module.copy_in(buffer.data.device_address, buffer.data.host_address, length, stream)
        for job in jobs:
            self._plan(job, arena)
        buffer.make_room(arena.size)
        module.clear(buffer.results.device_address, arena.size, stream)
        for job in jobs:
            self._launch(job, buffer, arena)
        module.copy_out(buffer.results.host_address, buffer.results.device_address, arena.size, stream)
        buffer.synchronize()

    def _plan(self, job: _BlockJob, arena: Arena) -> None:
        block = job.block
        for number, (span, at) in enumerate(zip(block.spans, job.offsets)):
            job.pieces.append([self._plan_piece(p, at + p.start, arena) for p in span.pieces])
            job.crcs.append(self._plan_crc(block, number, arena))
        if block.trio is not None and all(p is not None for pieces in job.pieces for p in pieces):
            job.joint_at = arena.reserve(7 * 8)

    def _launch(self, job: _BlockJob, buffer: Buffer, arena: Arena) -> None:
        for piece in (p for pieces in job.pieces for p in pieces):
            if piece is not None:
                self._launch_piece(piece, buffer, arena)
        for number, crc_at in enumerate(job.crcs):
            if crc_at is not None:
                self._launch_crc(job.block.spans[number].length, job.offsets[number], crc_at, buffer, arena)
        if job.joint_at is not None:
            self._launch_joint(job.block, job.offsets, job.joint_at, buffer, arena)

    def _collect(self, job: _BlockJob, buffer: Buffer, arena: Arena) -> BlockOutcome:
        """The GPU's results; what it was not asked for is reduced here."""
        block, outcome = job.block, BlockOutcome()
        for number, (span, at) in enumerate(zip(block.spans, job.offsets)):
            asked = job.pieces[number] if job.pieces else [None] * len(span.pieces)
            parts = [
                reduce_piece(self._state, p, buffer.data.host[at : at + span.length], self._swap)
                if j is None
                else self._part(j, buffer, arena)
                for p, j in zip(span.pieces, asked)
            ]
            crc = self._crc(job, number, buffer, arena)
            outcome.spans.append(SpanOutcome(crc, parts))
        if job.joint_at is not None:
            outcome.joint = JointPart(*arena.get(job.joint_at, np.uint64, 7).astype(np.int64).tolist())
            return outcome
        constants = self._state.constants(block)
        if constants is not None:
            data = [buffer.data.host[at : at + s.length] for s, at in zip(block.spans, job.offsets)]
            outcome.joint = reduce_trio(self._state, block, data, constants, self._swap)
        return outcome

    def _plan_piece(self, piece: Piece, offset: int, arena: Arena) -> Optional[_PieceJob]:
        group = self._state.group(piece)
        if group.dtype not in _KINDS or self._swap or offset % 16:
            return None
        elements = piece.length // ITEM_BYTES[group.dtype]
        flag_at = arena.reserve(4)
        tiles_at = None
        if group.dtype == "float32":
            tiles_at = arena.reserve(8 * source.TILE_VALUES * -(-elements // source.TILE_ELEMENTS))
        shape = self._state.shapes.get(group.index)
        rows = None if shape is None else self._plan_rows(piece, group.dtype, elements, shape, arena)
        return _PieceJob(piece, group.dtype, elements, offset, flag_at, tiles_at, rows)

    def _plan_rows(self, piece: Piece, dtype: str, elements: int, shape: RowShape, arena: Arena) -> _RowJob:
        position = piece.position // ITEM_BYTES[dtype]
        first = position // shape.columns
        count = (position + elements - 1) // shape.columns - first + 1
        wants = shape.has_columns and self._state.wants_columns(piece.group)
        segments = max(1, min(_ROW_BLOCKS // count, shape.columns // _SEGMENT_ELEMENTS))
        room = 24 * count * segments + (shape.columns if wants else 0)
        return _RowJob(shape, first, count, segments, wants, arena.reserve(room))

    def _plan_crc(self, block: Block, number: int, arena: Arena) -> Optional[int]:
        span = block.spans[number]
        if self._state.header.records[span.record].crc32 is None or span.length < source.CRC_CHUNK_BYTES:
            return None
        return arena.reserve(4)

    def _launch_piece(self, job: _PieceJob, buffer: Buffer, arena: Arena) -> None:
        stream = buffer.stream
        data = ctypes.c_void_p(buffer.data.device_address + job.offset)
        wide = job.dtype == "float32"
        share = self._histogram_share(job.elements)
        bins = (1 << 16) // self._histogram_parts
        counts = ctypes.c_void_p(self._counters.address(job.piece.group))
        for part in range(self._histogram_parts):
            cut = (_u32(part * bins), _u32(bins), _u32(_EXPONENTS[job.dtype]))
            arguments = (data, _u64(job.elements), _u64(share), _i32(wide), *cut)
            self._module.launch(
                "histogram",
                -(-job.elements // share),
                source.HISTOGRAM_THREADS,
                (*arguments, arena.address(job.flag_at), counts),
                stream,
                2 * bins,
            )
        if job.tiles_at is not None:
            tiles = -(-job.elements // source.TILE_ELEMENTS)
            self._module.launch("tiles", tiles, 256, (data, _u64(job.elements), arena.address(job.tiles_at)), stream)
        if job.rows is not None:
            self._launch_rows(job, job.rows, data, buffer, arena)

    def _histogram_share(self, elements: int) -> int:
        """Elements of each thread block, a multiple of 8: whole rounds of all multiprocessors, no counter too full."""
        rounds = -(-elements // (self._processors * source.ELEMENTS_PER_HISTOGRAM))
        return max(8, -(-elements // (8 * self._processors * rounds)) * 8)

    def _launch_rows(self, job: _PieceJob, rows: _RowJob, data: ctypes.c_void_p, buffer: Buffer, arena: Arena) -> None:
        position = job.piece.position // ITEM_BYTES[job.dtype]
        at, stream = rows.at, buffer.stream
        results = [arena.address(at + n * rows.results) for n in (0, 16, 20, 8)]
        alive = arena.address(at + 24 * rows.results) if rows.wants_columns else ctypes.c_void_p(0)
        numbers = (position, job.elements, rows.shape.columns, rows.first, rows.count, rows.segments)
        threads = 256 if rows.shape.columns >= 512 else 32
        self._module.launch(
            "rows",
            min(rows.results, 1 << 16),
            threads,
            (data, _i32(_KINDS[job.dtype]), *(_u64(n) for n in numbers), *results, alive),
            stream,
        )

    def _launch_joint(self, block: Block, offsets: list[int], at: int, buffer: Buffer, arena: Arena) -> None:
        constants = self._state.constants(block)
        if constants is None:
            return
        stream = buffer.stream
        types = [self._state.group(s.pieces[0]).dtype for s in block.spans]
        elements = block.spans[0].length // ITEM_BYTES[types[0]]
        numbers = (constants.rate, constants.rate_at_peak, constants.root, constants.eps)
        arguments = (
            *(ctypes.c_void_p(buffer.data.device_address + o) for o in offsets),
            *(_i32(_KINDS[t]) for t in types),
            _u64(elements),
            *(ctypes.c_float(n) for n in numbers),
            arena.address(at),
        )
        blocks = min(8 * self._processors, -(-elements // 256))
        self._module.launch("joint", blocks, 256, arguments, stream)

    def _launch_crc(self, length: int, offset: int, at: int, buffer: Buffer, arena: Arena) -> None:
        chunks, stream = length // source.CRC_CHUNK_BYTES, buffer.stream
        arguments = (
            ctypes.c_void_p(buffer.data.device_address + offset),
            _u64(chunks),
            ctypes.c_void_p(self._powers.data_ptr()),
            arena.address(at),
        )
        self._module.launch("crc", -(-chunks // source.CRC_THREADS), source.CRC_THREADS, arguments, stream)

    def _crc(self, job: _BlockJob, number: int, buffer: Buffer, arena: Arena) -> Optional[int]:
        span, start = job.block.spans[number], job.offsets[number]
        if self._state.header.records[span.record].crc32 is None:
            return None
        at = job.crcs[number] if job.crcs else None
        whole = span.length // source.CRC_CHUNK_BYTES * source.CRC_CHUNK_BYTES if at is not None else 0
        rest = zlib.crc32(buffer.data.view[start + whole : start + span.length])
        if at is None:
            return rest
        found = crc32_of_remainder(int(arena.get(at, np.uint32, 1)[0]), whole)
        return crc32_join(found, rest, span.length - whole)

    def _part(self, job: _PieceJob, buffer: Buffer, arena: Arena) -> Part:
        part = Part()
        bad = bool(arena.get(job.flag_at, np.uint32, 1)[0])
        if job.tiles_at is not None:
            tiles = -(-job.elements // source.TILE_ELEMENTS)
            table = arena.get(job.tiles_at, np.float64, tiles * source.TILE_VALUES).reshape(tiles, -1)
            part.moments = _join_tiles(table)
        if bad:
            host = buffer.data.host[job.offset : job.offset + job.piece.length]
            part.nan, part.inf = kernels.locations(host, job.dtype)
        if job.rows is not None:
            part.rows = _row_part(job.rows, arena)
        return part


def _row_part(rows: _RowJob, arena: Arena) -> RowPart:
    n, at, shape = rows.results, rows.at, (rows.count, rows.segments)
    alive = arena.get(at + 24 * n, np.uint8, rows.shape.columns).astype(bool) if rows.wants_columns else None
    return RowPart(
        rows.first,
        arena.get(at, np.float64, n).reshape(shape).sum(axis=1),
        arena.get(at + 16 * n, np.uint32, n).reshape(shape).min(axis=1),
        arena.get(at + 20 * n, np.uint32, n).reshape(shape).max(axis=1),
        arena.get(at + 8 * n, np.uint64, n).reshape(shape).sum(axis=1, dtype=np.uint64),
        alive,
    )


def _join_tiles(table: Array) -> Moments:
    """All tiles at once, about their common mean (Chan, Golub and LeVeque 1983; Pebay 2008)."""
    columns = dict(zip(TILE_FIELDS, table.T))
    finite = columns["finite"]
    total = float(finite.sum())
    counts = {n: int(columns[n].sum()) for n in _TILE_COUNTS}
    result = Moments(**counts)
    result.count = int(total) + result.nan + result.positive_inf + result.negative_inf
    if not total:
        return result
    mean = float((finite * columns["mean"]).sum() / total)
    d = columns["mean"] - mean
    result.minimum, result.maximum = float(columns["minimum"].min()), float(columns["maximum"].max())
    if result.minimum == result.maximum:
        result.mean = result.minimum
        return result
    result.mean = mean
    result.squares = float((columns["squares"] + finite * d * d).sum())
    result.cubes = float((columns["cubes"] + 3 * d * columns["squares"] + finite * d**3).sum())
    result.fourths = float(
        (columns["fourths"] + 4 * d * columns["cubes"] + 6 * d * d * columns["squares"] + finite * d**4).sum()
    )
    return result


def _u64(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


def _u32(value: int) -> ctypes.c_uint32:
    return ctypes.c_uint32(value)


def _i32(value: int) -> ctypes.c_int32:
    return ctypes.c_int32(int(value))
