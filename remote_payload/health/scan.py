"""The one pass: every record read once, its checksum and its tensors' statistics from the same bytes.

Blocks are independent, so any thread may take any block; results are joined in the plan's order, which makes them the
same from run to run. Memory is bounded by threads times block, whatever the file's size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Callable, Optional

import torch

from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.source import Source
from remote_payload.health.blocks import Block, iter_blocks, plan_scan
from remote_payload.health.facts import ScanResult
from remote_payload.health.joiner import Joiner
from remote_payload.health.worker import BlockOutcome, CpuWorker, ScanState

CPU_BLOCK_BYTES = 6 * 1024 * 1024
CUDA_BLOCK_BYTES = 60 * 1024 * 1024
MAX_CPU_THREADS = 32
MAX_CUDA_THREADS = 16
_BLOCKS_IN_FLIGHT_PER_THREAD = 2

Progress = Callable[[int, int], None]


def scan(header: CheckpointHeader, device: str, progress: Progress, block_bytes: Optional[int] = None) -> ScanResult:
    """Read every record of a checkpoint once. `progress(bytes_done, bytes_total)` is called as blocks are joined.

    Bytes that cannot be read are reported in the result, not raised. `device` is `cpu` or a CUDA device.
    """
    plan = plan_scan(header)
    on_cuda = torch.device(device).type == "cuda"
    size = block_bytes or (CUDA_BLOCK_BYTES if on_cuda else CPU_BLOCK_BYTES)
    threads = _thread_count(MAX_CUDA_THREADS if on_cuda else MAX_CPU_THREADS)
    joiner = Joiner(header, plan)
    with ExitStack() as stack:
        stack.enter_context(_one_thread_per_worker())
        sources = [stack.enter_context(Source(f.path)) for f in header.files]
        state = ScanState(header, plan, sources, joiner.rows, joiner.shapes)
        worker: Callable[[Block], BlockOutcome]
        worker = CpuWorker(state, threads, size)
        done = 0
        for block, outcome in _in_order(worker, iter_blocks(header, plan, size), threads):
            joiner.join(block, outcome)
            done += block.length
            progress(done, plan.total_bytes)
    for tensor in plan.strided:
        joiner.add_strided(tensor)
    return joiner.result()


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
