"""The GPU's part of `benchmarks.health`: writes a checkpoint of the reference architecture and measures on it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import queue
import struct
import subprocess
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.health import child, ignore_progress


def measure(path: Path, steps: str) -> None:
    """Equality of CPU and GPU, kernels alone, warm and cold passes, each as a JSON line on standard output."""
    run = ["-m", "benchmarks.health", "pass", str(path)]
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "equal": lambda: compare_devices(path.parent / "small.pt"),
        "kernels": compare_kernels,
        "write": lambda: write_reference(path),
        "warm": lambda: child([*run, "--repeats", "5"]),
        "warm 32": lambda: child([*run, "--repeats", "3", "--block-mib", "32"]),
        "stages": lambda: stages(path),
        "by hand": lambda: by_hand(path),
        "cold": lambda: cold(path),
        "cpu warm": lambda: child([*run, "--device", "cpu"]),
        "naive": lambda: child(["-m", "benchmarks.health", "naive", str(path)]),
    }
    for name in steps.split(","):
        began = time.perf_counter()
        try:
            found = known[name]()
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            found = {"error": f"{type(error).__name__}: {error}"[-3000:]}
        print(json.dumps({"step": name, "took_s": round(time.perf_counter() - began, 2), **found}), flush=True)
        if name == "equal" and "error" in found:
            return


def write_reference(path: Path) -> dict[str, Any]:
    """The reference file as `torch.save` lays it out, with random bfloat16 weights and moments and true checksums.

    Written by all cores at once: `torch.save` alone takes most of a minute.
    """
    from remote_payload.checkpoint import read_header
    from remote_payload.health.crc import crc32_join
    from tests.support.checkpoints import write_sparse_reference

    write_sparse_reference(path)
    header = read_header(str(path))
    at_record = {t.file_offset: t for t in header.tensors}
    step = 32 << 20
    chunks = [
        (n, at, min(step, r.size - at))
        for n, r in enumerate(header.records)
        if r.offset in at_record
        for at in range(0, r.size, step)
    ]
    file = os.open(path, os.O_RDWR)

    def write(chunk: tuple[int, int, int]) -> int:
        number, at, length = chunk
        data = _random_bytes(at_record[header.records[number].offset], length, number * 1000003 + at)
        os.pwrite(file, data, header.records[number].offset + at)
        return zlib.crc32(data)

    crcs: dict[int, int] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for (number, _, length), crc in zip(chunks, pool.map(write, chunks), strict=True):
            crcs[number] = crc32_join(crcs.get(number, 0), crc, length)
    _patch_directory(file, path.stat().st_size, {header.records[n].name: c for n, c in crcs.items()})
    # Pages that are still being written to the disk would slow every reader.
    os.fsync(file)
    os.close(file)
    return {"gigabytes": path.stat().st_size / 1e9}


def _random_bytes(tensor: Any, length: int, seed: int) -> bytes:
    import torch

    if tensor.dtype != "bfloat16":
        value = torch.full((length // 4,), 1363.0) if tensor.dtype == "float32" else torch.full((length // 8,), 1363)
        return bytes(value.view(torch.uint8).numpy().data)
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(length // 2, device="cuda", generator=generator).mul_(0.03)
    if tensor.role.value == "second_moment":
        values = values.square_().mul_(1e-3)
    elif tensor.role.value == "first_moment":
        values.mul_(1e-3)
    elif tensor.role.value in ("norm_scale", "running_var"):
        values.abs_().add_(1)
    return bytes(values.to(torch.bfloat16).view(torch.uint8).cpu().numpy().data)


def _patch_directory(file: int, size: int, crcs: dict[str, int]) -> None:
    """Put checksums into the archive's central directory."""
    start = max(0, size - (1 << 20))
    tail = os.pread(file, size - start, start)
    at = tail.find(b"PK\x01\x02")
    while at >= 0 and tail[at : at + 4] == b"PK\x01\x02":
        name, extra, comment = struct.unpack_from("<HHH", tail, at + 28)
        crc = crcs.get(tail[at + 46 : at + 46 + name].decode())
        if crc is not None:
            os.pwrite(file, struct.pack("<I", crc), start + at + 16)
        at += 46 + name + extra + comment


def stages(path: Path) -> dict[str, Any]:
    """GB/s of the same blocks and threads, only read; and read and copied to the GPU."""
    import torch

    from remote_payload.checkpoint import read_header
    from remote_payload.checkpoint.source import Source
    from remote_payload.health.blocks import Block, iter_blocks, plan_scan
    from remote_payload.health.scan import CUDA_BLOCK_BYTES
    from remote_payload.health.worker import ALIGNMENT

    header = read_header(str(path))
    blocks = list(iter_blocks(header, plan_scan(header), CUDA_BLOCK_BYTES))
    rates: dict[str, Any] = {}
    with Source(str(path)) as source:
        for threads in (8, 12, 16):
            slots: queue.SimpleQueue[Any] = queue.SimpleQueue()
            for _ in range(threads):
                host = torch.empty(CUDA_BLOCK_BYTES + 3 * ALIGNMENT, dtype=torch.uint8, pin_memory=True)
                slots.put((host, torch.empty_like(host, device="cuda"), torch.cuda.Stream()))  # type: ignore[no-untyped-call]

            def move(block: Block, copies: bool, slots: Any = slots) -> None:
                host, device, stream = slot = slots.get()
                at = 0
                for span in block.spans:
                    source.read_into(span.offset, host[at : at + span.length].numpy().data)
                    at += span.length
                if copies:
                    with torch.cuda.stream(stream):
                        device[:at].copy_(host[:at], non_blocking=True)
                    stream.synchronize()
                slots.put(slot)

            for copies in (False, True):
                began = time.perf_counter()
                with ThreadPoolExecutor(threads) as pool:
                    for _ in pool.map(move, blocks, [copies] * len(blocks)):
                        pass
                name = f"{'read and copy' if copies else 'read'} {threads}"
                rates[name] = header.size_bytes / 1e9 / (time.perf_counter() - began)
    return rates


def by_hand(path: Path) -> dict[str, Any]:
    """The whole command, interpreter, torch, checks and document included; twice, for byte-identical documents."""
    seconds, documents = [], []
    for number in range(2):
        out = path.parent / f"out{number}"
        began = time.perf_counter()
        child(["-c", _BY_HAND, str(path), str(out)])
        seconds.append(time.perf_counter() - began)
        documents.append((out / "health.json").read_bytes())
    verdict = json.loads(documents[0])["verdict"]
    return {"seconds": seconds, "same": documents[0] == documents[1], "verdict": verdict["dimensions"]}


_BY_HAND = """
import sys
from remote_payload.health.__main__ import main
sys.stdout = open("/dev/null", "w")
sys.exit(main([sys.argv[1], "--out", sys.argv[2], "--device", "auto"]))
"""


def cold(path: Path) -> dict[str, Any]:
    """The disk's speed by `dd` and by the pass in turn, each after the page cache was dropped, each first as often as
    the other: what is below a virtual disk may keep what was just read."""

    def theirs() -> float:
        began = time.perf_counter()
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=64M"], check=True, capture_output=True, timeout=200)
        return path.stat().st_size / 1e9 / (time.perf_counter() - began)

    def ours() -> float:
        rate: float = child(["-m", "benchmarks.health", "pass", str(path)])["gigabytes_per_s"][0]
        return rate

    rates: dict[str, list[float]] = {"ours": [], "dd": []}
    for turn in range(4):
        pair = [("ours", ours), ("dd", theirs)]
        for name, measure_rate in pair if turn % 2 else reversed(pair):
            _drop_cache()
            rates[name].append(measure_rate())
    ratios = [a / b for a, b in zip(rates["ours"], rates["dd"], strict=True)]
    return {f"{name}_gigabytes_per_s": found for name, found in rates.items()} | {"ratios": ratios}


def _drop_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def compare_devices(path: Path) -> dict[str, Any]:
    """The same file on both devices: what differs, and the largest relative difference of any float."""
    import torch

    from remote_payload.checkpoint import read_header
    from remote_payload.health.scan import scan
    from tests.support.hard_values import flat, hard_checkpoint

    torch.save(hard_checkpoint(((700, 4099), (3, 500000), (50000, 33), (1, 7), (2048, 1))), path)
    header = read_header(str(path))
    results = [scan(header, d, ignore_progress, b) for d, b in (("cpu", None), ("cuda", None), ("cuda", 1 << 20))]
    again = scan(header, "cuda", ignore_progress)
    values = [flat(dataclasses.asdict(dataclasses.replace(r, native=None))) for r in results]
    differences, largest = [], 0.0
    for other in values[1:]:
        for key in values[0].keys() | other.keys():
            a, b = values[0].get(key), other.get(key)
            if a == b:
                continue
            if isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-300):
                largest = max(largest, abs(a - b) / max(abs(a), abs(b)))
            else:
                differences.append([key, repr(a), repr(b)])
    return {
        "values": len(values[0]),
        "differences": differences[:20],
        "largest_relative": largest,
        "repeatable": dataclasses.asdict(again) == dataclasses.asdict(results[1]),
        "mismatches": len(results[1].checksums.mismatches),
        "joint": len(results[1].joint),
    }


_NAIVE = r"""
extern "C" __global__ void naive(const unsigned short* data, unsigned long long n, unsigned int* out) {
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < n;
         i += (unsigned long long)gridDim.x * blockDim.x) atomicAdd(&out[data[i]], 1u);
}
"""


def compare_kernels() -> dict[str, Any]:
    """The histogram alone on data in device memory, in GB/s: ours, one global atomic per element, and bincount."""
    import ctypes

    import torch

    from remote_payload.health import cuda_source
    from remote_payload.health.cuda_worker import load_kernels
    from remote_payload.health.nvrtc import CudaModule

    device = torch.device("cuda:0")
    began = time.perf_counter()
    ours, _ = load_kernels(device)
    compile_s = time.perf_counter() - began
    naive = CudaModule(_NAIVE, ["naive"], device)
    stream = int(torch.cuda.current_stream().cuda_stream)
    rates: dict[str, Any] = {"compile_s": compile_s}
    count = 132 * cuda_source.ELEMENTS_PER_HISTOGRAM
    for kind in ("normal", "constant"):
        values = torch.randn(count, device=device).mul_(0.02) if kind == "normal" else torch.ones(count, device=device)
        data = values.to(torch.bfloat16).view(torch.int16)
        # Ours counts in 64 bits, the naive one in the lower halves of the same words.
        out = torch.zeros(1 << 16, dtype=torch.int64, device=device)
        seen = torch.zeros(1, dtype=torch.int32, device=device)
        flag = ctypes.c_void_p(seen.data_ptr())
        address = (ctypes.c_void_p(data.data_ptr()), ctypes.c_uint64(count))
        result = ctypes.c_void_p(out.data_ptr())
        share = (ctypes.c_uint64(cuda_source.ELEMENTS_PER_HISTOGRAM), ctypes.c_int32(0), ctypes.c_uint32(0))

        arguments = (*address, *share, ctypes.c_uint32(1 << 16), ctypes.c_uint32(0x7F80), flag, result)
        candidates: dict[str, Callable[[], object]] = {
            "ours": partial(ours.launch, "histogram", 132, 1024, arguments, stream, cuda_source.HISTOGRAM_BYTES),
            "naive": partial(naive.launch, "naive", 132 * 8, 256, (*address, result), stream),
            "bincount": partial(_bincount, data),
        }
        expected = _bincount(data)
        candidates["ours"]()
        rates[f"{kind}_equal"] = bool((out == expected).all())
        for name, function in candidates.items():
            rates[f"{kind}_{name}"] = 2 * count / 1e9 / _median_s(function)
    return rates


def _bincount(data: Any) -> Any:
    import torch

    return torch.bincount(data.to(torch.int32).bitwise_and_(0xFFFF), minlength=1 << 16)


def _median_s(function: Any, repeats: int = 15) -> float:
    import torch

    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]
