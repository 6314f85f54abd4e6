"""The one pass: every record read once, its checksum and its tensors' statistics from the same bytes.

Blocks are independent, so any thread may take any block; those of a unit are joined in their order, which makes results
the same from run to run. Memory is bounded by threads times block, whatever the file's size.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Callable, Optional, Protocol

import torch

from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.source import Source
from remote_payload.health.arrival import as_they_arrive
from remote_payload.health.ask_ahead import AskAhead
from remote_payload.health.blocks import Block, BlockCutter, Unit, plan_scan, plan_units
from remote_payload.health.distribution import Array
from remote_payload.health.facts import NativeUse, ScanResult
from remote_payload.health.joiner import Joiner
from remote_payload.health.native import MIN_BYTES, NativeFound, find_native
from remote_payload.health.native_worker import NATIVE_BLOCK_BYTES, NativeWorker
from remote_payload.health.worker import BATCH_BLOCKS, BATCH_BYTES, BlockOutcome, CpuWorker, ScanState
from remote_payload.wire.processors import usable_processors

CPU_BLOCK_BYTES = 6 * 1024 * 1024
CUDA_BLOCK_BYTES = 64 * 1024 * 1024 - 16 * 1024
"""With room for alignment a power of two, to which torch rounds pinned memory up."""
MAX_CPU_THREADS = 32
MAX_CUDA_READERS = 10
"""With 16 on as many processors the thread that joins the results gets none."""
_CUDA_WAITERS = 3
"""Threads that wait for the GPU while the readers read: it takes a tenth of the time that reading takes."""
_BATCHES_IN_FLIGHT_PER_THREAD = 2
_SWITCH_INTERVAL_S = 0.001

Progress = Callable[[int, int], None]


class Worker(Protocol):
    """Reads and reduces blocks in the calling thread."""

    def __call__(self, blocks: Sequence[Block]) -> list[BlockOutcome]: ...

    def take_counts(self, group: int) -> Optional[Array]:
        """What it counted of a closed group and kept to itself."""


def scan(
    header: CheckpointHeader,
    device: str,
    progress: Progress,
    block_bytes: Optional[int] = None,
    by_native: Optional[bool] = None,
    await_more: Optional[Callable[[], bool]] = None,
) -> ScanResult:
    """Read every record of a checkpoint once. `progress(bytes_done, bytes_total)` is called as blocks are joined.

    A single file that is still being sent is read as it arrives, with `await_more` for `as_they_arrive`, until it
    stands in full. Raises `BytesNotSentError`, and whatever `await_more` does.
    Bytes that cannot be read are reported in the result, not raised. `device` is `cpu` or a CUDA device. `by_native`:
    on the CPU, whether compiled kernels are used where they can be made; None leaves it to the checkpoint's size.
    """
    plan = plan_scan(header)
    on_cuda = torch.device(device).type == "cuda"
    readers = _thread_count(MAX_CUDA_READERS if on_cuda else MAX_CPU_THREADS)
    threads = readers + _CUDA_WAITERS if on_cuda else readers
    joiner = Joiner(header, plan)
    with ExitStack() as stack:
        stack.enter_context(_one_thread_per_worker())
        sources = [stack.enter_context(Source(f.path)) for f in header.files]
        state = ScanState(header, plan, sources, joiner.rows, joiner.shapes)
        units: Iterable[Optional[Unit]] = plan_units(header, plan)
        ahead: Optional[AskAhead] = None
        if await_more is not None and not all(source.is_whole for source in sources):
            units = as_they_arrive(header, plan_units(header, plan), sources[0], await_more)
        else:
            ahead = stack.enter_context(AskAhead(header, plan, sources))
        worker, size, native = _make_worker(state, device, threads, readers, block_bytes, by_native)
        joiner.take_counts = worker.take_counts
        done = 0
        for block, outcome in _in_order(worker, _blocks_of(units, BlockCutter(header, plan, size)), threads):
            joiner.join(block, outcome)
            done += block.length
            if ahead is not None:
                ahead.joined(done)
            progress(done, plan.total_bytes)
        joiner.take_counts = _nothing_kept
        del worker
        if on_cuda:
            # A GPU may be shared: what the allocator keeps for later is nobody's.
            torch.cuda.empty_cache()
    for tensor in plan.strided:
        joiner.add_strided(tensor)
    return dataclasses.replace(joiner.result(), native=native)


def _blocks_of(units: Iterable[Optional[Unit]], cutter: BlockCutter) -> Iterator[Optional[Block]]:
    for unit in units:
        if unit is None:
            yield None
        else:
            yield from cutter.blocks_of(unit)


def _nothing_kept(_group: int) -> Optional[Array]:
    return None


def _make_worker(
    state: ScanState, device: str, threads: int, readers: int, block_bytes: Optional[int], by_native: Optional[bool]
) -> tuple[Worker, int, NativeUse]:
    """The worker, the size of the blocks that it takes, and whether it uses the kernels compiled for a CPU."""
    if torch.device(device).type == "cuda":
        from remote_payload.health.cuda_worker import CudaWorker

        size = block_bytes or CUDA_BLOCK_BYTES
        worker = CudaWorker(state, torch.device(device), threads, readers, size)
        return worker, size, NativeUse(False, "the GPU's own kernels were used")
    if by_native is None:
        by_native = state.plan.total_bytes >= MIN_BYTES
    found = find_native() if by_native else NativeFound(why_not="a file this small is read before a compiler has ended")
    size = block_bytes or (CPU_BLOCK_BYTES if found.kernels is None else NATIVE_BLOCK_BYTES)
    by_torch = CpuWorker(state, threads, size)
    if found.kernels is None:
        return by_torch, size, NativeUse(False, found.why_not)
    return NativeWorker(state, found.kernels, threads, by_torch), size, NativeUse(True)


def _in_order(
    worker: Callable[[Sequence[Block]], list[BlockOutcome]], blocks: Iterator[Optional[Block]], threads: int
) -> Iterator[tuple[Block, BlockOutcome]]:
    """Outcomes in the blocks' order, with a bounded number of blocks under way, and none while there is no block."""
    waiting: deque[tuple[Sequence[Block], Future[list[BlockOutcome]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="health") as pool:
        try:
            for batch in in_batches(blocks):
                if batch:
                    waiting.append((batch, pool.submit(worker, batch)))
                most = threads * _BATCHES_IN_FLIGHT_PER_THREAD - 1 if batch else 0
                while len(waiting) > most:
                    first, outcomes = waiting.popleft()
                    yield from zip(first, outcomes.result())
            while waiting:
                first, outcomes = waiting.popleft()
                yield from zip(first, outcomes.result())
        finally:
            for _, outcomes in waiting:
                outcomes.cancel()


def in_batches(blocks: Iterator[Optional[Block]]) -> Iterator[list[Block]]:
    """Small neighbours together: whatever its size, a block takes as long to hand over as a megabyte to reduce.

    Where there is no block for now, an empty batch says so.
    """
    batch: list[Block] = []
    size = 0
    for block in blocks:
        if block is None:
            if batch:
                yield batch
            yield []
            batch, size = [], 0
            continue
        if batch and (size + block.length > BATCH_BYTES or len(batch) == BATCH_BLOCKS):
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += block.length
    if batch:
        yield batch


def _thread_count(most: int) -> int:
    return max(1, min(usable_processors(), most))


@contextmanager
def _one_thread_per_worker() -> Iterator[None]:
    """Every worker computes on its own block; torch's own threads would only fight over the same cores."""
    before, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    # A worker that has its data must not wait 5 ms, Python's own interval, for another to let go of the interpreter.
    sys.setswitchinterval(min(interval, _SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        torch.set_num_threads(before)
        sys.setswitchinterval(interval)
