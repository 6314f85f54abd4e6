"""Reductions of one block on a device. Needs torch; the same numbers on a CPU and on CUDA."""

from __future__ import annotations

import functools
from typing import Optional

import torch

from remote_payload.health.stats import FP16_MAX, MAX_LOCATIONS, Moments

HISTOGRAM_TYPES = {
    "bfloat16": 16,
    "float16": 16,
    "float8_e4m3fn": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2": 8,
    "float8_e5m2fnuz": 8,
}
"""Bits of the types for which counting every bit pattern is exact and cheaper than arithmetic."""
_DIRECT_FLOATS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_DIRECT_FLOATS["float16"] = torch.float16
_COMPLEX = {"complex64": torch.float32, "complex128": torch.float64}
_INTEGERS = {"int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8}
_INTEGERS.update({"uint8": torch.uint8, "bool": torch.uint8})

CPU_STEP = 1 << 18
"""Elements at once on a CPU: their float64 copy stays in the second-level cache."""
CUDA_STEP = 1 << 21
"""Bounds what bincount takes beside the block, for each of a dozen streams."""
_SMALL = 1 << 16
"""Below as many elements as a histogram has bins, arithmetic is cheaper."""


def is_supported(dtype: str) -> bool:
    """Whether this torch can measure tensors of that type."""
    if dtype in HISTOGRAM_TYPES:
        return hasattr(torch, dtype)
    return dtype in _DIRECT_FLOATS or dtype in _COMPLEX or dtype in _INTEGERS


def uses_histogram(dtype: str, elements: int) -> bool:
    """Decided by the whole tensor, so that all its blocks are reduced alike."""
    return dtype in HISTOGRAM_TYPES and (HISTOGRAM_TYPES[dtype] == 8 or elements >= _SMALL)


def in_native_order(data: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes of big-endian elements of `width` bytes, turned round."""
    return data.reshape(-1, width).flip(1).reshape(-1)


def histogram(data: torch.Tensor, dtype: str) -> torch.Tensor:
    """How often each bit pattern occurs in a block of bytes, as int64 on the CPU."""
    bits = HISTOGRAM_TYPES[dtype]
    patterns = data.view(torch.int16) if bits == 16 else data
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=data.device)
    for part in torch.split(patterns, _step(data)):
        # bincount takes no negative numbers, and int16 is the only 16-bit type that every torch widens.
        counts += torch.bincount(part.to(torch.int32).bitwise_and_((1 << bits) - 1), minlength=1 << bits)
    return counts.cpu()


def moments_of_histogram(counts: torch.Tensor, dtype: str) -> Moments:
    """Everything that the distribution of a whole tensor says, from the counts of its bit patterns."""
    values = _pattern_values(dtype)
    present = counts > 0
    finite = torch.isfinite(values)
    weights = torch.where(finite, counts, 0).to(torch.float64)
    safe = torch.where(finite, values, 0.0)
    total = float(weights.sum())
    mean = float(torch.dot(weights, safe)) / total if total else 0.0
    seen = values[present & finite]
    return Moments(
        count=int(counts.sum()),
        nan=int(counts[torch.isnan(values)].sum()),
        positive_inf=int(counts[values == torch.inf].sum()),
        negative_inf=int(counts[values == -torch.inf].sum()),
        zeros=int(counts[values == 0].sum()),
        ones=int(counts[values == 1].sum()),
        over_fp16=int(counts[finite & (values.abs() > FP16_MAX)].sum()),
        minimum=float(seen.min()) if seen.numel() else None,
        maximum=float(seen.max()) if seen.numel() else None,
        mean=mean,
        squares=float(torch.dot(weights, (safe - mean) ** 2)),
    )


def has_non_finite(counts: torch.Tensor, dtype: str) -> bool:
    """Whether a block's histogram holds a NaN or an infinity, which is when it is worth looking for where."""
    return bool((counts[~torch.isfinite(_pattern_values(dtype))] > 0).any())


@functools.cache
def _pattern_values(dtype: str) -> torch.Tensor:
    """The value of each bit pattern, in float64."""
    bits = HISTOGRAM_TYPES[dtype]
    patterns = torch.arange(1 << bits, dtype=torch.int32)
    element_type: torch.dtype = getattr(torch, dtype)
    narrow = patterns.to(torch.int16) if bits == 16 else patterns.to(torch.uint8)
    return narrow.view(element_type).to(torch.float64)


def moments(data: torch.Tensor, dtype: str) -> Moments:
    """The sums over a block of bytes, in float64."""
    total = Moments()
    integral = _INTEGERS.get(dtype)
    element_type = integral or _DIRECT_FLOATS.get(dtype) or _COMPLEX[dtype]
    for part in torch.split(data.view(element_type), _step(data)):
        total.add(_integer_part(part) if integral else _float_part(part))
    return total


def locations(data: torch.Tensor, dtype: str) -> tuple[list[int], list[int]]:
    """Positions (in elements of the block) of the first NaNs and infinities."""
    element_type = _DIRECT_FLOATS.get(dtype) or _COMPLEX.get(dtype) or getattr(torch, dtype)
    values = data.view(element_type)
    per_element = 2 if dtype in _COMPLEX else 1
    if dtype.startswith("float8"):
        values = values.to(torch.float32)
    nan = _first(torch.isnan(values), per_element)
    return nan, _first(torch.isinf(values), per_element)


def _first(mask: torch.Tensor, per_element: int) -> list[int]:
    found = torch.nonzero(mask).flatten()[: MAX_LOCATIONS * per_element]
    return list(dict.fromkeys(int(i) // per_element for i in found.tolist()))[:MAX_LOCATIONS]


def _step(data: torch.Tensor) -> int:
    return CPU_STEP if data.device.type == "cpu" else CUDA_STEP


def _integer_part(part: torch.Tensor) -> Moments:
    smallest, largest = torch.aminmax(part)
    exact = part.to(torch.float64)
    mean = exact.mean()
    return Moments(
        count=part.numel(),
        zeros=int((part == 0).sum()),
        ones=int((part == 1).sum()),
        minimum=float(smallest),
        maximum=float(largest),
        mean=float(mean),
        squares=float(((exact - mean) ** 2).sum()),
    )


def _float_part(part: torch.Tensor) -> Moments:
    smallest, largest = (float(v) for v in torch.aminmax(part))
    result = Moments(count=part.numel())
    if not _is_finite(smallest) or not _is_finite(largest):
        result.nan = int(torch.isnan(part).sum())
        result.positive_inf = int((part == torch.inf).sum())
        result.negative_inf = int((part == -torch.inf).sum())
        part = part[torch.isfinite(part)]
        if not part.numel():
            return result
        smallest, largest = (float(v) for v in torch.aminmax(part))
    result.minimum, result.maximum = smallest, largest
    if smallest <= 0 <= largest:
        result.zeros = part.numel() - int(torch.count_nonzero(part))
    if smallest <= 1 <= largest:
        result.ones = int(torch.count_nonzero(part == 1))
    if max(-smallest, largest) > FP16_MAX:
        result.over_fp16 = int((part.abs() > FP16_MAX).sum())
    exact = part.to(torch.float64)
    result.mean = float(exact.mean())
    # A constant's rounded mean may differ from it; its spread is 0 all the same.
    if smallest == largest:
        result.mean = smallest
        return result
    centred = exact.sub_(result.mean) if exact is not part else exact - result.mean
    # On CUDA a dot product takes cuBLAS, which keeps 32 MiB of workspace for every thread and stream.
    on_cpu = part.device.type == "cpu"
    result.squares = float(torch.dot(centred, centred) if on_cpu else centred.square_().sum())
    return result


def _is_finite(value: float) -> bool:
    return value - value == 0


def strided_parts(tensor: torch.Tensor, step: int = CPU_STEP) -> Optional[list[torch.Tensor]]:
    """A view's distinct elements in parts that are small to copy; None for views whose elements overlap."""
    for dimension in reversed(range(tensor.dim())):
        if tensor.stride(dimension) == 0:
            tensor = tensor.select(dimension, 0)
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    if tensor.numel() > reach:
        return None
    parts, pending = [], [tensor]
    while pending:
        view = pending.pop()
        if view.numel() <= step:
            parts.append(view)
            continue
        widest = max(range(view.dim()), key=lambda d: view.shape[d])
        pending.extend(torch.split(view, (view.shape[widest] + 1) // 2, widest))
    return parts
