"""Runs the model over the split, batch by batch. Knows nothing of verdicts and pictures."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional

import numpy as np
import torch
from torch import nn

from remote_payload.reconstruct.adapters import calling, is_out_of_memory
from remote_payload.reconstruct.collect import check_predictions
from remote_payload.reconstruct.protocol import Adapter, Modality, Sample

OnBatch = Callable[[Sequence[int], Sequence[Sample], dict[str, Any]], None]
OnLatents = Callable[[Sequence[Sample], Mapping[str, Any]], None]


@dataclasses.dataclass
class RunFacts:
    """What the run came to: the batch size it ended with and how often memory ran out."""

    batch_size: int
    halvings: int = 0


def make_deterministic(seed: int) -> None:
    """Fix every seed and ask for algorithms that give the same numbers each time. Before the first CUDA call."""
    # cuBLAS reads it when its first handle is made; without it two runs on one GPU may differ in the last bits.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def pick_device(wanted: str) -> torch.device:
    """cpu, cuda, or auto: CUDA where there is one. Raises `RuntimeError` when CUDA is wanted and there is none."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        torch.zeros(1, device=device)
        return device
    if wanted == "cuda":
        raise RuntimeError("a CUDA device is wanted, and torch finds none on this node")
    return torch.device("cpu")


def choose_positions(available: int, wanted: Optional[int]) -> list[int]:
    """Which samples are evaluated: all, or `wanted` of them spread evenly over the split, in order."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return [int(i) for i in np.unique(np.linspace(0, available - 1, wanted).round().astype(int))]


def run_over(
    adapter: Adapter,
    model: nn.Module,
    samples: Sequence[Sample],
    positions: Sequence[int],
    modalities: Sequence[Modality],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    on_batch: OnBatch,
    on_latents: Optional[OnLatents] = None,
) -> RunFacts:
    """Predict the samples at `positions` in order and hand each batch to `on_batch`.

    Where the adapter has latents, `on_latents` gets each batch's before `on_batch` does.

    When the device's memory runs out the batch is halved, down to one sample, and the run goes on.
    """
    facts = RunFacts(max(1, batch_size))
    done = 0
    while done < len(positions):
        chosen = positions[done : done + facts.batch_size]
        with calling("samples"):
            items = [samples[p] for p in chosen]
        ran: Optional[tuple[dict[str, Any], Optional[Mapping[str, Any]]]]
        try:
            ran = _forward(adapter, model, items, device, dtype, on_latents is not None)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or facts.batch_size == 1:
                raise
            facts.batch_size //= 2
            facts.halvings += 1
            ran = None
        if ran is None:
            # Outside the handler: its traceback would keep the failed batch's tensors alive.
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        predicted, latents = ran
        check_predictions(predicted, modalities)
        if on_latents is not None and latents is not None:
            on_latents(items, latents)
        on_batch(chosen, items, predicted)
        done += len(chosen)
    return facts


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
    with calling("predict"), torch.inference_mode():
        moved = to_device(batch, device, dtype)
        predicted: Any = adapter.predict(model, moved)
    if isinstance(predicted, dict):
        predicted = dict(predicted)
    # Optional: classes that are no AdapterBase need not have it.
    hook = getattr(adapter, "latents", None) if with_latents else None
    if hook is None or not isinstance(predicted, dict):
        return predicted, None
    with calling("latents"), torch.inference_mode():
        return predicted, hook(model, moved, predicted)
