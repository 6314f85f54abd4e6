"""Runs the model on one device, batch by batch. Knows nothing of verdicts and pictures."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from remote_payload.reconstruct.adapters import calling, is_out_of_memory
from remote_payload.reconstruct.collect import check_predictions, latents_pair
from remote_payload.reconstruct.prediction import BatchResult, as_array, without_inputs
from remote_payload.reconstruct.protocol import Adapter, Modality, Sample

ARITHMETIC = {
    "tf32": False,
    "reduced_precision_sums": False,
    "autocast": "off outside the adapter's own code",
    "deterministic_algorithms": True,
}
"""What `make_deterministic` and `predict` see to, as the results record it."""


def make_deterministic(seed: int) -> None:
    """Fix every seed and ask for algorithms that give the same numbers each time. Before the first CUDA call."""
    # cuBLAS reads it when its first handle is made; without it two runs on one GPU may differ in the last bits.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seed_all(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    _ask_for_deterministic_algorithms()


def _ask_for_deterministic_algorithms() -> None:
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(True, warn_only=True)
        return
    # That would import the compiler, as much again as torch itself, to tell it the same. If an adapter comes to need
    # it, it reads this variable.
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    torch.set_deterministic_debug_mode("warn")


def seed_all(seed: int) -> None:
    """Python's, NumPy's and torch's generators, those of GPUs included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_devices(wanted: str, count: int) -> list[torch.device]:
    """Where samples are evaluated: `count` visible GPUs, or the CPU, `count` times if it is asked for by name.

    `wanted` is cpu, cuda, or auto. A GPU of another model than the first is left out, and told of: numbers would depend
    on which one a sample came to. Raises `RuntimeError` when CUDA is wanted and there is none.
    """
    if wanted == "cpu":
        return [torch.device("cpu")] * max(1, count)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found = [torch.device("cuda", index) for index, name in enumerate(names) if name == names[0]]
        if len(found) < min(count, len(names)):
            print(f"of the GPUs {', '.join(names)} only those of the first's model are used")
        found = found[: max(1, count)]
        if len(found) == 1:
            # One that does not work is seen here; several are used by processes of their own.
            torch.zeros(1, device=found[0])
        return found
    if wanted == "cuda":
        raise RuntimeError("a CUDA device is wanted, and torch finds none on this node")
    return [torch.device("cpu")]


def choose_positions(available: int, wanted: Optional[int]) -> list[int]:
    """Which samples are evaluated: all, or `wanted` of them spread evenly over the split, in order."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return [int(i) for i in np.unique(np.linspace(0, available - 1, wanted).round().astype(int))]


def cut(positions: Sequence[int], batch_size: int) -> list[tuple[int, ...]]:
    """Batches of the positions, in order: the same ones on however many devices they are evaluated."""
    size = max(1, batch_size)
    return [tuple(positions[start : start + size]) for start in range(0, len(positions), size)]


class MemoryRanOutError(Exception):
    """The device's memory (or the host's) does not hold a batch of this many samples."""

    def __init__(self, samples: int) -> None:
        super().__init__(f"memory ran out at {samples} samples at once")


class BatchRunner:
    """The model on one device. Each batch begins with the seeds of its first position, wherever it runs and when."""

    def __init__(
        self,
        adapter: Adapter,
        model: nn.Module,
        samples: Sequence[Sample],
        modalities: Sequence[Modality],
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        self._adapter, self._model, self._samples = adapter, model, samples
        self._modalities = modalities
        self._device, self._dtype = device, dtype
        self._seed = seed

    def batch(self, positions: Sequence[int]) -> BatchResult:
        """The samples at `positions`, all at once.

        Raises what the adapter raises, told as its own; `MemoryRanOutError` for several samples that do not fit, and
        what torch raises for a single one.
        """
        seed_all(self._seed + positions[0])
        with calling("samples"):
            items = [self._samples[p] for p in positions]
        try:
            return self._evaluated(positions, items)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(items) == 1:
                raise
        # Outside the handler: its traceback would keep the failed batch's tensors alive.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise MemoryRanOutError(len(items))

    def _evaluated(self, positions: Sequence[int], items: Sequence[Sample]) -> BatchResult:
        predicted, latents = _forward(self._adapter, self._model, items, self._device, self._dtype, True)
        check_predictions(predicted, self._modalities)
        names = [m.name for m in self._modalities]
        pairs = {
            name: latents_pair(name, pair, len(items)) for name, pair in (latents or {}).items() if pair is not None
        }
        arrays = {name: as_array(predicted[name]) for name in names}
        dtypes = {name: str(getattr(predicted[name], "dtype", "")).replace("torch.", "") for name in names}
        with calling("samples"):
            bare = tuple(without_inputs(item, names) for item in items)
        return BatchResult(tuple(positions), bare, arrays, pairs, dtypes)


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Every tensor of a nested batch on the device; floating ones in the model's type."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device=device, dtype=dtype if batch.is_floating_point() else None)
    if isinstance(batch, dict):
        return {key: to_device(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [to_device(value, device, dtype) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def predict(
    adapter: Adapter, model: nn.Module, items: Sequence[Sample], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One batch, without gradients. Out of memory passes through as torch raises it."""
    return _forward(adapter, model, items, device, dtype, False)[0]


def _forward(
    adapter: Adapter,
    model: nn.Module,
    items: Sequence[Sample],
    device: torch.device,
    dtype: torch.dtype,
    with_latents: bool,
) -> tuple[dict[str, Any], Optional[Mapping[str, Any]]]:
    with calling("collate"):
        batch = adapter.collate(items)
    with calling("predict"), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        moved = to_device(batch, device, dtype)
        predicted: Any = adapter.predict(model, moved)
    if isinstance(predicted, dict):
        predicted = dict(predicted)
    # Optional: classes that are no AdapterBase need not have it.
    hook = getattr(adapter, "latents", None) if with_latents else None
    if hook is None or not isinstance(predicted, dict):
        return predicted, None
    with calling("latents"), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        return predicted, hook(model, moved, predicted)
