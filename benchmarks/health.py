"""`python -m benchmarks.health COMMAND`: the health pass against what a user would do instead.

`cpu [--gigabytes N]` compares on this machine's processors, `gpu PATH [--steps a,b]` on its GPU with a checkpoint of
the reference architecture that it writes to PATH. Each measurement is a process of its own and prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_BYTES_PER_GB = 1e9


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.health")
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu")
    cpu.add_argument("--gigabytes", type=float, default=1.0)
    cpu.add_argument("--runs", type=int, default=3)
    gpu = commands.add_parser("gpu")
    gpu.add_argument("path")
    gpu.add_argument("--steps", default="equal,kernels,write,warm,by hand,cold,cpu warm,naive")
    one = commands.add_parser("pass")
    one.add_argument("path")
    one.add_argument("--device", default="auto")
    one.add_argument("--repeats", type=int, default=1)
    one.add_argument("--threads", type=int)
    one.add_argument("--block-mib", type=int)
    naive = commands.add_parser("naive")
    naive.add_argument("path")
    options = parser.parse_args(arguments)
    if options.command == "cpu":
        compare_on_cpu(options.gigabytes, options.runs)
    elif options.command == "gpu":
        from benchmarks import health_gpu

        health_gpu.measure(Path(options.path), options.steps)
    elif options.command == "pass":
        print(
            json.dumps(measure_pass(options.path, options.device, options.repeats, options.block_mib, options.threads))
        )
    else:
        print(json.dumps(measure_naive(options.path)))
    return 0


def measure_pass(
    path: str, device: str, repeats: int, block_mib: int | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Header and pass, with everything included but the interpreter's and torch's own start."""
    import torch

    from remote_payload.checkpoint import read_header
    from remote_payload.health.device import choose_device
    from remote_payload.health.scan import scan

    if threads:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    chosen = choose_device(device)
    on_cuda = chosen.startswith("cuda")
    # Room for alignment, since torch rounds pinned memory up to a power of two.
    block_bytes = block_mib * 2**20 - 2**14 if block_mib else None
    idle = _resident_bytes()
    with _DeviceMemory(on_cuda) as device_memory, HostMemory() as host_memory:
        seconds, header_seconds = [], []
        for _ in range(repeats):
            began = time.perf_counter()
            header = read_header(path)
            header_seconds.append(time.perf_counter() - began)
            result = scan(header, chosen, ignore_progress, block_bytes)
            seconds.append(time.perf_counter() - began)
    size = sum(f.size for f in header.files)
    return {
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "gigabytes": size / _BYTES_PER_GB,
        "seconds": seconds,
        "gigabytes_per_s": [size / _BYTES_PER_GB / s for s in seconds],
        "header_s": header_seconds,
        "host_over_idle_mib": (host_memory.peak_bytes - idle) / 2**20,
        "host_peak_mib": host_memory.peak_bytes / 2**20,
        "device_over_idle_mib": device_memory.taken_bytes / 2**20,
        "tensors": len(result.stats),
        "joint": len(result.joint),
        "checked": result.checksums.checked,
        "mismatches": len(result.checksums.mismatches),
    }


def ignore_progress(_done: int, _total: int) -> None:
    """Nobody watches."""


def measure_naive(path: str) -> dict[str, Any]:
    """What a user would write: load the file, then five questions to each tensor."""
    import torch

    began = time.perf_counter()
    with HostMemory() as memory:
        document = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in _tensors(document):
            if tensor.is_floating_point() and tensor.numel() > 1:
                answers = (
                    torch.isnan(tensor).any(),
                    torch.isinf(tensor).any(),
                    tensor.mean(),
                    tensor.std(),
                    tensor.min(),
                    tensor.max(),
                )
                [a.item() for a in answers]
    return {"seconds": time.perf_counter() - began, "host_peak_mib": memory.peak_bytes / 2**20}


def compare_on_cpu(gigabytes: float, runs: int) -> None:
    """Both in turn on a file in the page cache, in float32 and in bfloat16."""
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "checkpoint.pt")
            child(["-c", _WRITE, path, dtype, str(gigabytes)])
            rows = []
            for _ in range(runs):
                ours = child(["-m", "benchmarks.health", "pass", path, "--device", "cpu"])
                theirs = child(["-m", "benchmarks.health", "naive", path])
                rows.append((ours, theirs))
            ratio = statistics.median(t["seconds"] / o["seconds"][0] for o, t in rows)
            print(
                json.dumps(
                    {
                        "dtype": dtype,
                        "gigabytes": rows[0][0]["gigabytes"],
                        "ours_s": statistics.median(o["seconds"][0] for o, _ in rows),
                        "naive_s": statistics.median(t["seconds"] for _, t in rows),
                        "ratio": ratio,
                        "ours_host_over_idle_mib": max(o["host_over_idle_mib"] for o, _ in rows),
                        "naive_host_peak_mib": max(t["host_peak_mib"] for _, t in rows),
                    }
                ),
                flush=True,
            )


_WRITE = """
import sys, torch
path, dtype, gigabytes = sys.argv[1], getattr(torch, sys.argv[2]), float(sys.argv[3])
rows = int(gigabytes * 1e9 / 3 / dtype.itemsize / 4096 / 4)
weights = {f"layer{n}.weight": (torch.randn(rows, 4096) * 0.02).to(dtype) for n in range(4)}
state = {
    n: {"step": torch.tensor(100.0), "exp_avg": w * 0.01, "exp_avg_sq": (w * 0.01) ** 2}
    for n, w in enumerate(weights.values())
}
groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": list(state)}]
torch.save({"model_state_dict": weights, "optimizer_state_dict": {"state": state, "param_groups": groups}}, path)
"""


def child(arguments: list[str], timeout_s: float = 300.0) -> dict[str, Any]:
    """Run Python on `arguments`; its last line as JSON, empty if it said nothing. Raises `RuntimeError`."""
    process = subprocess.run(
        [sys.executable, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
    )
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}: {process.stderr[-3000:]}")
    lines = process.stdout.strip().splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


def _tensors(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _resident_bytes() -> int:
    """Resident memory that is this process's own: anonymous and pinned pages, not those of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(fields.get(n, "0 kB").split()[0]) for n in ("RssAnon", "RssShmem")) * 1024


class _Sampler:
    """Calls `sample` every few milliseconds while the context lasts."""

    def __enter__(self) -> Any:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            self.sample()

    def sample(self) -> None:
        raise NotImplementedError


class HostMemory(_Sampler):
    """The most that this process held at any time: anonymous and pinned pages, not those of mapped files."""

    peak_bytes = 0

    @staticmethod
    def resident_bytes() -> int:
        return _resident_bytes()

    def sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, _resident_bytes())


class _DeviceMemory(_Sampler):
    """What the device has less of than before: by all processes, so that nothing of ours can hide."""

    def __init__(self, on_cuda: bool) -> None:
        self._on_cuda = on_cuda
        self.taken_bytes = 0
        self._before = self._free()

    def sample(self) -> None:
        self.taken_bytes = max(self.taken_bytes, self._before - self._free())

    def _free(self) -> int:
        if not self._on_cuda:
            return 0
        import torch

        return int(torch.cuda.mem_get_info()[0])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    sys.exit(main(sys.argv[1:]))
