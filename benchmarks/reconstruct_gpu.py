"""`python -m benchmarks.reconstruct_gpu PATH [--scale 1] [--steps a,b]`: the reconstruct job on a GPU.

PATH is a checkpoint of the reference architecture as `python -m benchmarks.health gpu PATH --steps write` leaves it
(with `--scale`, one of that scale). Needs the demonstration's data packages. Each step prints a JSON line. On several
GPUs: `--steps "data,device rate,devices"`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.health import HostMemory, child

_BATCH = 8
_PASSES, _TURNS = 10, 5


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.reconstruct_gpu", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", default="data,load warm,rate,evaluate,load cold")
    parser.add_argument("--one", choices=("ours", "theirs", "rate", "device rate"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        one = {"ours": load_ours, "theirs": load_theirs, "rate": rates, "device rate": device_rates}[options.one]
        print(json.dumps(one(options.path, options.scale, options.device)))
        return 0
    data = data_folder(options.path)
    again = ["-m", "benchmarks.reconstruct_gpu", str(options.path), "--scale", str(options.scale)]
    again += ["--device", options.device, "--one"]
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "data": lambda: prepare(data, options.scale),
        "load warm": lambda: {"ours": child([*again, "ours"]), "theirs": child([*again, "theirs"])},
        "load cold": lambda: {name: cold(partial(child, [*again, name])) for name in ("ours", "theirs")},
        "rate": lambda: child([*again, "rate"]),
        "evaluate": lambda: evaluate(options.path, options.scale, options.device),
        "device rate": lambda: child([*again, "device rate"]),
        "devices": lambda: compare_devices(options.path, options.scale),
    }
    for name in options.steps.split(","):
        began = time.perf_counter()
        try:
            found = known[name]()
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            found = {"error": f"{type(error).__name__}: {error}"[-3000:]}
        print(json.dumps({"step": name, "took_s": round(time.perf_counter() - began, 2), **found}), flush=True)
    return 0


def data_folder(path: Path) -> Path:
    return path.parent / "film"


def prepare(folder: Path, scale: int) -> dict[str, Any]:
    return child(["-m", "remote_payload.reference", "prepare", "--out", str(folder), "--scale", str(scale)])


def cold(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """With the page cache dropped first; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    return run()


def load_ours(path: Path, scale: int, device: str) -> dict[str, Any]:
    """From the header to the model on the device."""
    import torch

    from remote_payload.checkpoint import read_header
    from remote_payload.reconstruct.loading import choose_dtype, load_model
    from remote_payload.reconstruct.protocol import AdapterConfig
    from remote_payload.reference.adapter import ReferenceAdapter

    target = start(device)
    with HostMemory() as memory:
        idle, before = memory.resident_bytes(), bytes_from_disk()
        began = time.perf_counter()
        header = read_header(str(path))
        config = AdapterConfig({"scale": scale}, checkpoint=header.config)
        dtype = choose_dtype("auto", header, target)
        adapter: Any = ReferenceAdapter()
        loaded = load_model(adapter, config, header, target, dtype)
        finish(target)
        seconds = time.perf_counter() - began
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    return {
        "seconds": seconds,
        "parameters": loaded.parameters,
        "weights_gb": weights / 1e9,
        "host_over_idle_mib": (memory.peak_bytes - idle) / 2**20,
        "read_from_disk_gb": (bytes_from_disk() - before) / 1e9,
        "device_peak_gb": torch.cuda.max_memory_allocated() / 1e9 if target.type == "cuda" else None,
    }


def load_theirs(path: Path, scale: int, device: str) -> dict[str, Any]:
    """`torch.load`, `load_state_dict` and `.to(device)`. The model's construction, which takes longer, is not timed."""
    import torch

    from remote_payload.reference.model import FilmAutoencoder
    from remote_payload.reference.sizes import ReferenceSizes

    target = start(device)
    with HostMemory() as memory:
        idle, before = memory.resident_bytes(), bytes_from_disk()
        with torch.device("meta"):
            model = FilmAutoencoder(ReferenceSizes.at_scale(scale)).to(torch.bfloat16)
        model = model.to_empty(device="cpu")
        began = time.perf_counter()
        document = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(document["model_state_dict"])
        model = model.to(target)
        finish(target)
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "host_over_idle_mib": (memory.peak_bytes - idle) / 2**20,
        "read_from_disk_gb": (bytes_from_disk() - before) / 1e9,
    }


def rates(path: Path, scale: int, device: str) -> dict[str, Any]:
    """Samples per second of the runner, and of a plain loop over a DataLoader of the same samples and batches."""
    import torch
    from torch.utils.data import DataLoader

    from remote_payload.checkpoint import read_header
    from remote_payload.reconstruct.loading import choose_dtype, load_model
    from remote_payload.reconstruct.protocol import AdapterConfig
    from remote_payload.reconstruct.runner import BatchRunner, cut, make_deterministic, predict, to_device
    from remote_payload.reference.adapter import ReferenceAdapter

    make_deterministic(0)
    target = start(device)
    header = read_header(str(path))
    config = AdapterConfig({"scale": scale}, checkpoint=header.config)
    adapter: Any = ReferenceAdapter()
    loaded = load_model(adapter, config, header, target, choose_dtype("auto", header, target))
    data = {"film": str(data_folder(path))}
    samples = adapter.samples(adapter.split, data, config)
    modalities = adapter.modalities(data, config)
    predict(adapter, loaded.model, [samples[0]], target, loaded.dtype)

    def ours() -> None:
        runner = BatchRunner(adapter, loaded.model, samples, modalities, target, loaded.dtype)
        for _ in range(_PASSES):
            taken = [runner.batch(batch).predicted for batch in cut(range(len(samples)), _BATCH)]
            assert len(taken) == -(-len(samples) // _BATCH)

    def theirs() -> None:
        with torch.inference_mode():
            for _ in range(_PASSES):
                taken = []
                for batch in DataLoader(samples, batch_size=_BATCH, collate_fn=adapter.collate):
                    out = adapter.predict(loaded.model, to_device(batch, target, loaded.dtype))
                    taken.append({n: t.float().cpu() for n, t in out.items()})

    return alternate({"ours": ours, "plain_loop": theirs}, _PASSES * len(samples), target)


def device_rates(path: Path, scale: int, device: str) -> dict[str, Any]:
    """Samples per second through one process on one device, and through one on each, their results read back.

    Loading and each process's first batches are not timed. `--device cpu` takes two processes.
    """
    import torch

    from remote_payload.checkpoint import read_header
    from remote_payload.reconstruct.devices import DeviceProcesses
    from remote_payload.reconstruct.prediction import PredictionStore
    from remote_payload.reconstruct.protocol import AdapterConfig
    from remote_payload.reconstruct.runner import cut, make_deterministic, pick_devices
    from remote_payload.reference.adapter import ReferenceAdapter
    from remote_payload.wire.codec import from_json
    from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy

    make_deterministic(0)
    settings = from_json(EvaluationSettings, job_settings(path, scale))
    jobs, policy = (JobSpec("reconstruct"),), GpuPolicy(device)
    plan = NodePlan("benchmark", "0" * 64, jobs, str(path), settings, policy, OverrunPolicy())
    devices = pick_devices(device, 2 if device == "cpu" else 1024)
    adapter = ReferenceAdapter()
    config = AdapterConfig({"scale": scale}, checkpoint=read_header(str(path)).config)
    batches = cut(range(len(adapter.samples(adapter.split, settings.data, config))), _BATCH)
    with contextlib.ExitStack() as stack:
        loops: dict[str, Callable[[], None]] = {}
        for count in sorted({1, len(devices)}):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent)))
            store = PredictionStore(folder, "benchmark")
            processes = stack.enter_context(DeviceProcesses(plan, devices[:count], store))

            def through(processes: DeviceProcesses = processes) -> None:
                given = sum(len(result.samples) for result in processes.results(batches * _PASSES))
                assert given == _PASSES * sum(map(len, batches))

            through()
            loops[f"devices_{count}"] = through
        found = alternate(loops, sum(map(len, batches)) * _PASSES, torch.device("cpu"))
    return {"devices": [str(d) for d in devices], **found}


def alternate(loops: dict[str, Callable[[], None]], samples: int, target: Any) -> dict[str, Any]:
    """Samples per second of loops over as many samples each, run in turns; the medians and how they compare."""
    rates_of: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(_TURNS):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            finish(target)
            rates_of[name].append(round(samples / (time.perf_counter() - began), 2))
    medians = {name: statistics.median(found) for name, found in rates_of.items()}
    first, *_, last = medians
    ratio = round(medians[last] / medians[first], 3)
    return {"samples": samples, "samples_per_s": rates_of, "medians": medians, f"{last}/{first}": ratio}


def compare_devices(path: Path, scale: int) -> dict[str, Any]:
    """The whole job by hand on one of the visible GPUs and on all of them; whether every artifact is the same."""
    import torch

    count = torch.cuda.device_count()
    found: dict[str, Any] = {"gpus": count}
    artifacts = []
    for visible in ("0", ",".join(str(n) for n in range(count))):
        out = path.parent / f"on-{len(visible.split(','))}"
        found[f"on {visible}"] = evaluate(path, scale, "cuda", out, {"CUDA_VISIBLE_DEVICES": visible})
        artifacts.append({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    first, second = artifacts
    names = first.keys() | second.keys()
    return {**found, "files": len(names), "different": sorted(n for n in names if first.get(n) != second.get(n))}


def job_settings(path: Path, scale: int) -> dict[str, Any]:
    adapter = "remote_payload.reference.adapter:ReferenceAdapter"
    data = {"film": str(data_folder(path))}
    return {"adapter": adapter, "data": data, "batch_size": _BATCH, "user_config": {"scale": scale}}


def evaluate(
    path: Path, scale: int, device: str, out: Path | None = None, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The whole job by hand over the demonstration's test split."""
    config, out = path.parent / "eval.json", out or path.parent / "reconstruct"
    config.write_text(json.dumps({"remote_eval": job_settings(path, scale)}))
    command = ["-m", "remote_payload.reconstruct", "--checkpoint", str(path), "--config", str(config)]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out), "--device", device],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    found: dict[str, Any] = {"seconds": time.perf_counter() - began, "status": done.returncode}
    if done.returncode:
        return {**found, "error": done.stderr[-2000:]}
    document = json.loads((out / "reconstruct.json").read_text())
    bits = {m["id"]: m["value"] for m in document["metrics"] if m["value"] is not None}
    return {
        **found,
        "headline": document["headline"],
        "model": document["model"],
        "samples": document["samples"],
        "metrics": dict(list(bits.items())[:12]),
        "pictures": len(document["pictures"]),
    }


def start(device: str) -> Any:
    """The device with its context made, which is no part of any load."""
    import torch

    target = torch.device(device)
    torch.zeros(1, device=target)
    return target


def finish(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    sys.exit(main(sys.argv[1:]))
