"""The one pass: every record read once, its checksum and its tensors' statistics from the same bytes.

Blocks are independent, so any thread may take any block; results are joined in file order, which makes them the same
from run to run. Memory is bounded by threads times block, whatever the file's size.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import queue
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Callable, Optional

import torch

from remote_payload.checkpoint.dtypes import ITEM_BYTES
from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.header import CheckpointHeader, TensorEntry
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.tensor_bytes import map_tensor
from remote_payload.checkpoint.torch_tensors import tensor_from_map
from remote_payload.health import kernels
from remote_payload.health.blocks import Block, Group, ScanPlan, iter_blocks, plan_scan
from remote_payload.health.crc import crc32_join
from remote_payload.health.facts import ChecksumFacts, ChecksumMismatch, ScanResult
from remote_payload.health.stats import MAX_LOCATIONS, Moments, TensorStats, finish, index_of

CPU_BLOCK_BYTES = 8 * 1024 * 1024
CUDA_BLOCK_BYTES = 32 * 1024 * 1024
MAX_CPU_THREADS = 16
MAX_CUDA_THREADS = 12
_BLOCKS_IN_FLIGHT_PER_THREAD = 2
_MAX_READ_ERRORS = 50

Progress = Callable[[int, int], None]


def scan(header: CheckpointHeader, device: str, progress: Progress, block_bytes: Optional[int] = None) -> ScanResult:
    """Read every record of a checkpoint once. `progress(bytes_done, bytes_total)` is called as blocks are joined.

    Bytes that cannot be read are reported in the result, not raised. `device` is `cpu` or a CUDA device.
    """
    plan = plan_scan(header)
    on_cuda = torch.device(device).type == "cuda"
    size = block_bytes or (CUDA_BLOCK_BYTES if on_cuda else CPU_BLOCK_BYTES)
    threads = _thread_count(MAX_CUDA_THREADS if on_cuda else MAX_CPU_THREADS)
    joiner = _Joiner(header, plan)
    with ExitStack() as stack:
        stack.enter_context(_one_thread_per_worker())
        sources = [stack.enter_context(Source(f.path)) for f in header.files]
        worker = _Worker(header, plan, sources, device, threads, size)
        done = 0
        for block, outcome in _in_order(worker, iter_blocks(header, plan, size), threads):
            joiner.join(block, outcome)
            done += block.length
            progress(done, plan.total_bytes)
        if on_cuda:
            # A GPU may be shared: what the allocator keeps for later is nobody's.
            torch.cuda.empty_cache()
    for tensor in plan.strided:
        joiner.add_strided(tensor)
    return joiner.result()


@dataclasses.dataclass
class PieceOutcome:
    """What one piece of a group came to: moments, or counts of bit patterns, and where its first bad values are."""

    moments: Optional[Moments] = None
    counts: Optional[torch.Tensor] = None
    nan: tuple[int, ...] = ()
    inf: tuple[int, ...] = ()


@dataclasses.dataclass
class BlockOutcome:
    crc32: Optional[int]
    pieces: list[PieceOutcome]
    error: Optional[str] = None


@dataclasses.dataclass
class _Buffer:
    """Pinned memory and a stream of its own on CUDA, plain memory else."""

    memory: torch.Tensor
    stream: Optional[torch.cuda.Stream]


class _Worker:
    """Reads and reduces one block in the calling thread, with one of a fixed set of buffers."""

    def __init__(
        self, header: CheckpointHeader, plan: ScanPlan, sources: list[Source], device: str, threads: int, size: int
    ) -> None:
        self._header = header
        self._groups = plan.groups
        self._sources = sources
        self._device = torch.device(device)
        self._swap = header.byte_order == "big"
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        largest = max((r.size for r in header.records if r.readable), default=1)
        on_cuda = self._device.type == "cuda"
        for _ in range(threads):
            memory = torch.empty(max(16, min(size, largest)), dtype=torch.uint8, pin_memory=on_cuda)
            stream = torch.cuda.Stream(self._device) if on_cuda else None  # type: ignore[no-untyped-call]
            self._buffers.put(_Buffer(memory, stream))

    def __call__(self, block: Block) -> BlockOutcome:
        buffer = self._buffers.get()
        try:
            return self._reduce(block, buffer.memory[: block.length], buffer.stream)
        except CheckpointError as error:
            return BlockOutcome(None, [], str(error))
        finally:
            self._buffers.put(buffer)

    def _reduce(self, block: Block, buffer: torch.Tensor, stream: Optional[torch.cuda.Stream]) -> BlockOutcome:
        memory = (ctypes.c_char * block.length).from_address(buffer.data_ptr()) if block.length else b""
        view = memoryview(memory).cast("B")
        if block.length:
            self._sources[block.file].read_into(block.offset, view)
        crc = zlib.crc32(view) if self._header.records[block.record].crc32 is not None else None
        if stream is None or not block.pieces:
            return BlockOutcome(crc, self._reduce_pieces(block, buffer))
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            # Reading results back waits for the copy, hence the buffer is free when this returns.
            return BlockOutcome(crc, self._reduce_pieces(block, buffer.to(self._device, non_blocking=True)))

    def _reduce_pieces(self, block: Block, data: torch.Tensor) -> list[PieceOutcome]:
        outcomes = []
        for piece in block.pieces:
            group = self._groups[piece.group]
            part = data[piece.start : piece.start + piece.length]
            outcomes.append(self._reduce_piece(group, part))
        return outcomes

    def _reduce_piece(self, group: Group, data: torch.Tensor) -> PieceOutcome:
        width = ITEM_BYTES[group.dtype]
        if not kernels.is_supported(group.dtype):
            return PieceOutcome()
        if self._swap and width > 1:
            data = kernels.in_native_order(data, width // (2 if group.dtype.startswith("complex") else 1))
        elif data.storage_offset() % width:
            data = data.clone()
        if kernels.uses_histogram(group.dtype, group.length // width):
            counts = kernels.histogram(data, group.dtype)
            outcome = PieceOutcome(counts=counts)
            bad = kernels.has_non_finite(counts, group.dtype)
        else:
            moments = kernels.moments(data, group.dtype)
            outcome = PieceOutcome(moments=moments)
            bad = moments.finite < moments.count
        if bad:
            nan, inf = kernels.locations(data, group.dtype)
            outcome.nan, outcome.inf = tuple(nan), tuple(inf)
        return outcome


class _Joiner:
    """Adds up blocks in file order; at any time only the groups that the last block touched are open."""

    def __init__(self, header: CheckpointHeader, plan: ScanPlan) -> None:
        self._header = header
        self._plan = plan
        self._tensors = {t.name: t for t in header.tensors}
        self._open: dict[int, _OpenGroup] = {}
        self._crc: Optional[int] = 0
        self._stats: dict[str, TensorStats] = {}
        self._not_measured = dict(plan.not_measured)
        self._mismatches: list[ChecksumMismatch] = []
        self._checked = 0
        self._errors: dict[str, str] = {}

    def join(self, block: Block, outcome: BlockOutcome) -> None:
        record = self._header.records[block.record]
        if outcome.error is not None:
            self._crc = None
            if len(self._errors) < _MAX_READ_ERRORS:
                self._errors.setdefault(record.name, outcome.error)
            for piece in block.pieces:
                self._group(piece.group).failed = outcome.error
        elif self._crc is not None and outcome.crc32 is not None:
            self._crc = crc32_join(self._crc, outcome.crc32, block.length)
        for piece, part in zip(block.pieces, outcome.pieces):
            self._group(piece.group).add(piece.position, part)
        for piece in block.pieces:
            group = self._plan.groups[piece.group]
            if piece.position + piece.length == group.length:
                self._close(group)
        if block.ends_record:
            self._end_record(block)

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
        total = Moments()
        for part in parts:
            data = part.contiguous().reshape(-1).view(torch.uint8)
            if kernels.uses_histogram(tensor.dtype, tensor.numel) and ITEM_BYTES[tensor.dtype] == 1:
                total.add(kernels.moments_of_histogram(kernels.histogram(data, tensor.dtype), tensor.dtype))
            else:
                total.add(kernels.moments(data, tensor.dtype))
        self._stats[tensor.name] = finish(total, (), ())

    def result(self) -> ScanResult:
        records = self._header.records
        kept = set(self._plan.records)
        return ScanResult(
            stats=self._stats,
            not_measured=self._not_measured,
            checksums=ChecksumFacts(
                records=len(records),
                checked=self._checked,
                without=sum(1 for i, r in enumerate(records) if r.crc32 is None and i in kept),
                mismatches=tuple(self._mismatches),
            ),
            read_errors=self._errors,
            bytes_read=self._plan.total_bytes,
        )

    def _group(self, index: int) -> _OpenGroup:
        return self._open.setdefault(index, _OpenGroup(self._plan.groups[index].dtype))

    def _end_record(self, block: Block) -> None:
        record = self._header.records[block.record]
        if record.crc32 is not None and self._crc is not None:
            self._checked += 1
            if self._crc != record.crc32:
                self._mismatches.append(ChecksumMismatch(record.name, record.crc32, self._crc, record.size))
        self._crc = 0

    def _close(self, group: Group) -> None:
        state = self._open.pop(group.index)
        reason = state.failed or (None if kernels.is_supported(group.dtype) else f"{group.dtype} is not supported")
        for name in group.names:
            if reason is not None:
                self._not_measured[name] = reason
                continue
            tensor = self._tensors[name]
            self._stats[name] = finish(
                state.total(),
                tuple(index_of(p, tensor.shape, tensor.stride) for p in state.nan),
                tuple(index_of(p, tensor.shape, tensor.stride) for p in state.inf),
            )


class _OpenGroup:
    """A group of which not every block has been joined."""

    def __init__(self, dtype: str) -> None:
        self.nan: list[int] = []
        self.inf: list[int] = []
        self.failed: Optional[str] = None
        self._dtype = dtype
        self._moments = Moments()
        self._counts: Optional[torch.Tensor] = None

    def add(self, position: int, part: PieceOutcome) -> None:
        first = position // ITEM_BYTES[self._dtype]
        self.nan = [*self.nan, *(first + p for p in part.nan)][:MAX_LOCATIONS]
        self.inf = [*self.inf, *(first + p for p in part.inf)][:MAX_LOCATIONS]
        if part.counts is not None:
            self._counts = part.counts if self._counts is None else self._counts + part.counts
        elif part.moments is not None:
            self._moments.add(part.moments)

    def total(self) -> Moments:
        if self._counts is None:
            return self._moments
        return kernels.moments_of_histogram(self._counts, self._dtype)


def _in_order(
    worker: Callable[[Block], BlockOutcome], blocks: Iterator[Block], threads: int
) -> Iterator[tuple[Block, BlockOutcome]]:
    """Outcomes in the blocks' order, with a bounded number of blocks under way."""
    waiting: deque[tuple[Block, Future[BlockOutcome]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="health") as pool:
        try:
            for block in blocks:
                waiting.append((block, pool.submit(worker, block)))
                if len(waiting) >= threads * _BLOCKS_IN_FLIGHT_PER_THREAD:
                    first, outcome = waiting.popleft()
                    yield first, outcome.result()
            while waiting:
                first, outcome = waiting.popleft()
                yield first, outcome.result()
        finally:
            for _, outcome in waiting:
                outcome.cancel()


def _thread_count(most: int) -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    available = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(available, most))


@contextmanager
def _one_thread_per_worker() -> Iterator[None]:
    """Every worker computes on its own block; torch's own threads would only fight over the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
