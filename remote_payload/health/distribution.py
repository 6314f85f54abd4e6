"""The distribution of one tensor from the counts of its bit patterns. Needs numpy; the same numbers on every device."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any, Optional

import numpy as np

from remote_payload.health.stats import FP16_MAX, QUANTILES, InitDistance, Moments

PATTERN_BITS = {
    "bfloat16": 16,
    "float16": 16,
    "float8_e4m3fn": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2": 8,
    "float8_e5m2fnuz": 8,
}
"""Bits of the types for which counting every bit pattern is exact and cheaper than arithmetic."""
HIGH_HALF_RESOLUTION = 2.0**-8
"""A float32's high half is a bfloat16 cut short; the middle of its bin is this near, relatively, to all in it."""
_SHAPE_POINTS = 1024

Array = Any
"""A numpy array. Stub packages of the oldest numpy that runs here know no better."""


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Distinct finite values, ascending, and how often each occurs. `resolution`: 0.0, or their relative error."""

    values: Array
    counts: Array
    resolution: float = 0.0

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantiles(self, probabilities: tuple[float, ...] = QUANTILES) -> Optional[tuple[float, ...]]:
        """The smallest values x with at least p * n elements <= x; None without elements."""
        if not self.total:
            return None
        found: list[float] = self.values_at(np.asarray(probabilities)).tolist()
        return tuple(found)

    def values_at(self, probabilities: Array) -> Array:
        """The quantiles of an array of probabilities. There must be elements."""
        total = self.total
        ranks = np.ceil(probabilities * total - 1e-9).clip(1, total).astype(np.int64)
        return self.values[np.searchsorted(np.cumsum(self.counts), ranks)]

    def where(self, keep: Array) -> Distribution:
        """The elements whose values `keep` (a mask over `values`) marks."""
        return Distribution(self.values[keep], self.counts[keep], self.resolution)

    def fraction(self, chosen: Array) -> Optional[float]:
        """The part of all elements whose values `chosen` marks; None without elements."""
        total = self.total
        return int(self.counts[chosen].sum()) / total if total else None

    def most_frequent(self) -> tuple[Optional[float], Optional[float]]:
        """The most frequent value (the smallest of equally frequent ones) and its share."""
        if self.resolution or not self.total:
            return None, None
        at = int(np.argmax(self.counts))
        return float(self.values[at]), int(self.counts[at]) / self.total


def non_finite_patterns(dtype: str) -> Array:
    """The bit patterns of a type's NaNs and infinities, all of them."""
    return _non_finite(dtype)


@functools.lru_cache(maxsize=16)
def _non_finite(dtype: str) -> Array:
    return np.flatnonzero(~np.isfinite(_tables(dtype)[0]))


@dataclasses.dataclass(frozen=True)
class Tally:
    """A histogram of bit patterns read: the finite part, both zeros one value, and how many are not finite."""

    spread: Distribution
    nan: int
    positive_inf: int
    negative_inf: int


def tally(counts: Array, dtype: str) -> Tally:
    """Only patterns that occur are looked at: few of 65,536 in a trained tensor, one in a constant."""
    values, _ = _tables(dtype)
    present = np.flatnonzero(counts != 0)
    # A sign and a size: read backwards, the patterns of negative numbers ascend, and they come before the others.
    negative = int(np.searchsorted(present, counts.size // 2))
    present = np.concatenate((present[negative:][::-1], present[:negative]))
    seen, number = values[present], counts[present]
    finite = np.isfinite(seen)
    bad = ~finite
    strange, strange_number = seen[bad], number[bad]
    found, number = seen[finite] + 0.0, number[finite]
    same = np.flatnonzero(found[1:] == found[:-1])
    if same.size:
        # Both zeros; and, of float32's high halves, the bins around 0.
        keep = np.concatenate(([True], found[1:] != found[:-1]))
        number = np.add.reduceat(number, np.flatnonzero(keep))
        found = found[keep]
    return Tally(
        Distribution(found, number, HIGH_HALF_RESOLUTION if dtype == "float32_high" else 0.0),
        int(strange_number[np.isnan(strange)].sum()),
        int(strange_number[strange == np.inf].sum()),
        int(strange_number[strange == -np.inf].sum()),
    )


def moments_of(tally: Tally, dtype: str) -> Moments:
    """Everything that the moments of a whole tensor need, exactly, from the counts of its bit patterns."""
    _, limits = _tables(dtype)
    spread = tally.spread
    weights, seen = spread.counts.astype(np.float64), spread.values
    total = spread.total
    mean = float((weights * seen).sum()) / total if total else 0.0
    if seen.size == 1:
        mean = float(seen[0])
    centred = seen - mean
    squared = centred * centred
    size = np.abs(seen)
    return Moments(
        count=total + tally.nan + tally.positive_inf + tally.negative_inf,
        nan=tally.nan,
        positive_inf=tally.positive_inf,
        negative_inf=tally.negative_inf,
        zeros=_count(spread, seen == 0),
        ones=_count(spread, seen == 1),
        over_fp16=_count(spread, size > FP16_MAX),
        denormals=_count(spread, (size > 0) & (size < limits.smallest_normal)),
        saturated=_count(spread, size == limits.largest),
        minimum=float(seen[0]) if total else None,
        maximum=float(seen[-1]) if total else None,
        mean=mean,
        squares=float((weights * squared).sum()),
        cubes=float((weights * squared * centred).sum()),
        fourths=float((weights * squared * squared).sum()),
    )


def within(spread: Distribution, smallest: Optional[float], largest: Optional[float]) -> Distribution:
    """Values that are bins' middles, moved to what the tensor really spans."""
    if smallest is None or largest is None:
        return spread
    return dataclasses.replace(spread, values=np.clip(spread.values, smallest, largest))


def init_distances(
    spread: Distribution, mean: Optional[float], std: Optional[float], shape: tuple[int, ...]
) -> tuple[InitDistance, ...]:
    """Distances of a weight of two or more dimensions to what each initialisation draws. Empty for constants."""
    if len(shape) < 2 or mean is None or not std or spread.total < 2:
        return ()
    receptive = int(np.prod(shape[2:], dtype=np.int64))
    fan_in, fan_out = shape[1] * receptive, shape[0] * receptive
    standard = (spread.values_at(_shape_points()) - mean) / std
    distance = {k: float(np.abs(standard - v).mean()) for k, v in _shapes().items()}
    schemes = (
        ("kaiming_uniform_a5_fan_in", "uniform", (1 / (3 * fan_in)) ** 0.5),
        ("kaiming_normal_fan_in", "normal", (2 / fan_in) ** 0.5),
        ("kaiming_normal_fan_out", "normal", (2 / fan_out) ** 0.5),
        ("kaiming_uniform_fan_in", "uniform", (2 / fan_in) ** 0.5),
        ("kaiming_uniform_fan_out", "uniform", (2 / fan_out) ** 0.5),
        ("xavier_uniform", "uniform", (2 / (fan_in + fan_out)) ** 0.5),
        ("xavier_normal", "normal", (2 / (fan_in + fan_out)) ** 0.5),
        ("normal_0.02", "normal", 0.02),
    )
    return tuple(InitDistance(name, std / scale, distance[kind]) for name, kind, scale in schemes)


def _count(spread: Distribution, chosen: Array) -> int:
    return int(spread.counts[chosen].sum())


@dataclasses.dataclass(frozen=True)
class TypeLimits:
    """A floating type's largest finite number and its smallest that is normal."""

    largest: float
    smallest_normal: float


@functools.lru_cache(maxsize=16)
def _tables(dtype: str) -> tuple[Array, TypeLimits]:
    """Values by pattern, and the type's limits."""
    with np.errstate(invalid="ignore"):
        return _decode(dtype), type_limits(dtype)


@functools.lru_cache(maxsize=16)
def type_limits(dtype: str) -> TypeLimits:
    """Raises `AttributeError` for a type that this torch does not know."""
    import torch

    info = torch.finfo(getattr(torch, "float32" if dtype == "float32_high" else dtype))
    return TypeLimits(float(info.max), float(info.smallest_normal))


def _decode(dtype: str) -> Array:
    if dtype == "bfloat16":
        return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "float16":
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    if dtype == "float32_high":
        return _middles_of_high_halves()
    import torch

    patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    return patterns.view(getattr(torch, dtype)).to(torch.float64).numpy()


def _middles_of_high_halves() -> Array:
    exact = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    upper = np.empty_like(exact)
    upper[:-1] = exact[1:]
    upper[-1] = np.nan
    # The bin of 0 holds it and the smallest denormals; the largest finite one ends where infinity begins.
    middles = (exact + upper) / 2
    middles[[0x0000, 0x8000]] = 0.0
    middles[0x7F7F], middles[0xFF7F] = 1.0 * 2.0**128 - 2.0**119, -(1.0 * 2.0**128 - 2.0**119)
    bad = ~np.isfinite(exact)
    middles[bad] = exact[bad]
    return middles


@functools.lru_cache(maxsize=1)
def _shape_points() -> Array:
    return (np.arange(_SHAPE_POINTS) + 0.5) / _SHAPE_POINTS


@functools.lru_cache(maxsize=1)
def _shapes() -> dict[str, Array]:
    points = _shape_points()
    normal = statistics.NormalDist()
    return {
        "uniform": np.sqrt(3.0) * (2 * points - 1),
        "normal": np.asarray([normal.inv_cdf(p) for p in points.tolist()]),
    }
