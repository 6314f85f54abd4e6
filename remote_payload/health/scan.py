"""The one pass: every record read once, its checksum and its tensors' statistics from the same bytes.

Blocks are independent, so any thread may take any block; results are joined in the plan's order, which makes them the
same from run to run. Memory is bounded by threads times block, whatever the file's size.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Callable, Optional, Protocol

import torch

from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.source import Source
from remote_payload.health.blocks import Block, ScanPlan, iter_blocks, plan_scan
from remote_payload.health.distribution import Array
from remote_payload.health.facts import ScanResult
from remote_payload.health.joiner import Joiner
from remote_payload.health.native import MIN_BYTES, load_native
from remote_payload.health.native_worker import NATIVE_BLOCK_BYTES, NativeWorker
from remote_payload.health.worker import BlockOutcome, CpuWorker, ScanState

CPU_BLOCK_BYTES = 6 * 1024 * 1024
CUDA_BLOCK_BYTES = 64 * 1024 * 1024 - 16 * 1024
"""With room for alignment a power of two, to which torch rounds pinned memory up."""
MAX_CPU_THREADS = 32
MAX_CUDA_THREADS = 12
"""With 16 on as many processors the thread that joins the results gets none."""
_BLOCKS_IN_FLIGHT_PER_THREAD = 2
_ASKED_AHEAD_BYTES = 2 << 30
"""What the disk is asked for while kernels are compiled and buffers made."""
_ASKED_AT_ONCE_BYTES = 16 << 20

_SWITCH_INTERVAL_S = 0.0001

Progress = Callable[[int, int], None]


class Worker(Protocol):
    """Reads and reduces a block in the calling thread."""

    def __call__(self, block: Block) -> BlockOutcome: ...

    def take_counts(self, group: int) -> Optional[Array]:
        """What it counted of a closed group and kept to itself."""


def scan(
    header: CheckpointHeader,
    device: str,
    progress: Progress,
    block_bytes: Optional[int] = None,
    by_native: Optional[bool] = None,
) -> ScanResult:
    """Read every record of a checkpoint once. `progress(bytes_done, bytes_total)` is called as blocks are joined.

    Bytes that cannot be read are reported in the result, not raised. `device` is `cpu` or a CUDA device. `by_native`:
    on the CPU, whether compiled kernels are used where they can be made; None leaves it to the checkpoint's size.
    """
    plan = plan_scan(header)
    on_cuda = torch.device(device).type == "cuda"
    threads = _thread_count(MAX_CUDA_THREADS if on_cuda else MAX_CPU_THREADS)
    joiner = Joiner(header, plan)
    with ExitStack() as stack:
        stack.enter_context(_one_thread_per_worker())
        sources = [stack.enter_context(Source(f.path)) for f in header.files]
        state = ScanState(header, plan, sources, joiner.rows, joiner.shapes)
        stack.enter_context(_asking_ahead(header, plan, sources))
        worker, size = _make_worker(state, device, threads, block_bytes, by_native)
        joiner.take_counts = worker.take_counts
        done = 0
        for block, outcome in _in_order(worker, iter_blocks(header, plan, size), threads):
            joiner.join(block, outcome)
            done += block.length
            progress(done, plan.total_bytes)
        joiner.take_counts = _nothing_kept
        del worker
        if on_cuda:
            # A GPU may be shared: what the allocator keeps for later is nobody's.
            torch.cuda.empty_cache()
    for tensor in plan.strided:
        joiner.add_strided(tensor)
    return joiner.result()


@contextmanager
def _asking_ahead(header: CheckpointHeader, plan: ScanPlan, sources: Sequence[Source]) -> Iterator[None]:
    """Have the disk read what will be wanted first, in a thread: it would stand idle until the workers are made."""
    enough = threading.Event()

    def ask() -> None:
        left = _ASKED_AHEAD_BYTES
        for block in iter_blocks(header, plan, _ASKED_AT_ONCE_BYTES):
            for span in block.spans:
                sources[span.file].ask_ahead(span.offset, span.length)
            left -= block.length
            if left <= 0 or enough.is_set():
                return

    thread = threading.Thread(target=ask, name="health-ahead")
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def _nothing_kept(_group: int) -> Optional[Array]:
    return None


def _make_worker(
    state: ScanState, device: str, threads: int, block_bytes: Optional[int], by_native: Optional[bool]
) -> tuple[Worker, int]:
    """The worker and the size of the blocks that it takes."""
    if torch.device(device).type == "cuda":
        from remote_payload.health.cuda_worker import CudaWorker

        size = block_bytes or CUDA_BLOCK_BYTES
        return CudaWorker(state, torch.device(device), threads, size), size
    if by_native is None:
        by_native = state.plan.total_bytes >= MIN_BYTES
    kernels = load_native() if by_native else None
    size = block_bytes or (CPU_BLOCK_BYTES if kernels is None else NATIVE_BLOCK_BYTES)
    worker = CpuWorker(state, threads, size)
    return (worker if kernels is None else NativeWorker(state, kernels, threads, worker)), size


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
    before, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    # A worker that has its data must not wait 5 ms, Python's own interval, for another to let go of the interpreter.
    sys.setswitchinterval(min(interval, _SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        torch.set_num_threads(before)
        sys.setswitchinterval(interval)
