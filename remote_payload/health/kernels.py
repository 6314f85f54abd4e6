"""Reductions of one piece on the CPU, in parts that stay in the cache. Needs torch and numpy."""

from __future__ import annotations

import dataclasses
from typing import Optional

import numpy as np
import torch

from remote_payload.health.distribution import PATTERN_BITS, Array, non_finite_patterns, type_limits
from remote_payload.health.rows import RowPart
from remote_payload.health.stats import FP16_MAX, MAX_LOCATIONS, Moments

_FLOATS = {"float32": torch.float32, "float64": torch.float64}
_COMPLEX = {"complex64": torch.float32, "complex128": torch.float64}
_INTEGERS = {"int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8}
_INTEGERS.update({"uint8": torch.uint8, "bool": torch.uint8})

BYTES = torch.uint8
CPU_STEP = 1 << 17
"""Elements at once: their float64 copies stay in the second-level cache."""


@dataclasses.dataclass
class Part:
    """What one piece came to. `counts`: of bit patterns, of float32's and float64's high halves; None for other types.

    `moments`: None where the counts give them. `nan` and `inf`: positions in the piece of the first bad elements.
    """

    counts: Optional[Array] = None
    moments: Optional[Moments] = None
    rows: Optional[RowPart] = None
    nan: tuple[int, ...] = ()
    inf: tuple[int, ...] = ()


def is_supported(dtype: str) -> bool:
    """Whether this torch can measure tensors of that type."""
    if dtype in PATTERN_BITS:
        return hasattr(torch, dtype)
    return dtype in _FLOATS or dtype in _COMPLEX or dtype in _INTEGERS


def table_of(dtype: str) -> Optional[str]:
    """The type whose patterns a tensor's counts are of; None for types that are not counted."""
    if dtype in PATTERN_BITS:
        return dtype
    return "float32_high" if dtype in _FLOATS else None


def in_native_order(data: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes of big-endian elements of `width` bytes, turned round."""
    return data.reshape(-1, width).flip(1).reshape(-1)


def reduce_values(data: torch.Tensor, dtype: str) -> Part:
    """A piece of bytes (uint8, aligned to its elements): everything but its rows."""
    if dtype in PATTERN_BITS:
        counts = histogram(data, dtype)
        part = Part(counts=counts)
        bad = bool(counts[non_finite_patterns(dtype)].any())
    elif dtype in _FLOATS:
        part = _reduce_wide(data, dtype)
        bad = part.moments is not None and part.moments.finite < part.moments.count
    else:
        total = _moments(data, dtype)
        part, bad = Part(moments=total), total.finite < total.count
    if bad:
        part.nan, part.inf = locations(data, dtype)
    return part


def histogram(data: torch.Tensor, dtype: str) -> Array:
    """How often each bit pattern occurs in a piece of bytes, as int64."""
    bits = PATTERN_BITS[dtype]
    patterns = data.view(torch.int16) if bits == 16 else data
    return _count(patterns, bits)


def _count(patterns: torch.Tensor, bits: int) -> Array:
    counts = torch.zeros(1 << bits, dtype=torch.int64)
    for part in torch.split(patterns, 4 * CPU_STEP):
        # bincount takes no negative numbers, and int16 is the only 16-bit type that every torch widens.
        counts += torch.bincount(part.to(torch.int32).bitwise_and_((1 << bits) - 1), minlength=1 << bits)
    return counts.numpy()


def _reduce_wide(data: torch.Tensor, dtype: str) -> Part:
    values = data.view(_FLOATS[dtype])
    total, counts = Moments(), np.zeros(1 << 16, dtype=np.int64)
    for part in torch.split(values, CPU_STEP):
        counts += _count(part.to(torch.float32).view(torch.int16)[1::2], 16)
        total.add(_float_part(part, dtype))
    return Part(counts, total)


def _moments(data: torch.Tensor, dtype: str) -> Moments:
    total = Moments()
    integral = _INTEGERS.get(dtype)
    for part in torch.split(data.view(integral or _COMPLEX[dtype]), CPU_STEP):
        total.add(_integer_part(part) if integral else _float_part(part, "float64" if "128" in dtype else "float32"))
    return total


def locations(data: torch.Tensor, dtype: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions (in elements of the piece) of the first NaNs and infinities."""
    values = data.view(_FLOATS.get(dtype) or _COMPLEX.get(dtype) or getattr(torch, dtype))
    per_element = 2 if dtype in _COMPLEX else 1
    if dtype.startswith("float8"):
        values = values.to(torch.float32)
    nan = _first(torch.isnan(values), per_element)
    return nan, _first(torch.isinf(values), per_element)


def _first(mask: torch.Tensor, per_element: int) -> tuple[int, ...]:
    found = torch.nonzero(mask).flatten()[: MAX_LOCATIONS * per_element]
    return tuple(dict.fromkeys(int(i) // per_element for i in found.tolist()))[:MAX_LOCATIONS]


def _integer_part(part: torch.Tensor) -> Moments:
    smallest, largest = torch.aminmax(part)
    result = Moments(count=part.numel(), minimum=float(smallest), maximum=float(largest))
    result.zeros = int((part == 0).sum())
    result.ones = int((part == 1).sum())
    _central(part.to(torch.float64), result)
    return result


def _float_part(part: torch.Tensor, dtype: str) -> Moments:
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
    limits = type_limits(dtype)
    result.minimum, result.maximum = smallest, largest
    if smallest <= 0 <= largest:
        result.zeros = part.numel() - int(torch.count_nonzero(part))
    if smallest <= 1 <= largest:
        result.ones = int(torch.count_nonzero(part == 1))
    if max(-smallest, largest) > FP16_MAX:
        result.over_fp16 = int((part.abs() > FP16_MAX).sum())
    if max(-smallest, largest) == limits.largest:
        result.saturated = int((part.abs() == limits.largest).sum())
    result.denormals = int(torch.count_nonzero(part.abs() < limits.smallest_normal)) - result.zeros
    if smallest == largest:
        # A constant's rounded mean may differ from it; its spread is 0 all the same.
        result.mean = smallest
        return result
    _central(part.to(torch.float64), result)
    return result


def _central(exact: torch.Tensor, result: Moments) -> None:
    result.mean = float(exact.mean())
    centred = exact - result.mean
    squared = centred * centred
    result.squares = float(squared.sum())
    result.cubes = float(torch.dot(squared, centred))
    result.fourths = float(torch.dot(squared, squared))


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
