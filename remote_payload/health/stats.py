"""What one tensor's values come to, and how the results of its blocks add up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Optional

FP16_MAX = 65504.0
MAX_LOCATIONS = 5


@dataclasses.dataclass
class Moments:
    """Sums over a part of a tensor. All but `count`, `nan` and the infinities speak of the finite elements only."""

    count: int = 0
    nan: int = 0
    positive_inf: int = 0
    negative_inf: int = 0
    zeros: int = 0
    ones: int = 0
    over_fp16: int = 0
    minimum: Optional[float] = None
    maximum: Optional[float] = None
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    @property
    def finite(self) -> int:
        return self.count - self.nan - self.positive_inf - self.negative_inf

    def add(self, other: Moments) -> None:
        """Take in another part. Means are joined as Chan, Golub and LeVeque (1983) do, without cancellation."""
        here, there = self.finite, other.finite
        if there:
            difference = other.mean - self.mean
            total = here + there
            self.mean += difference * there / total
            self.squares += other.squares + difference * difference * here * there / total
        for name in ("count", "nan", "positive_inf", "negative_inf", "zeros", "ones", "over_fp16"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.minimum = _least(self.minimum, other.minimum)
        self.maximum = _greatest(self.maximum, other.maximum)


@dataclasses.dataclass(frozen=True)
class TensorStats:
    """A tensor's values. Minimum to fractions are over the finite elements; `std` is the sample's, None below two.

    `first_nan` and `first_inf` are indices into the tensor, in the order in which the file holds its elements.
    """

    count: int
    nan: int
    positive_inf: int
    negative_inf: int
    minimum: Optional[float]
    maximum: Optional[float]
    mean: Optional[float]
    std: Optional[float]
    zero_fraction: Optional[float]
    one_fraction: Optional[float]
    over_fp16: int
    first_nan: tuple[tuple[int, ...], ...] = ()
    first_inf: tuple[tuple[int, ...], ...] = ()

    @property
    def inf(self) -> int:
        return self.positive_inf + self.negative_inf

    @property
    def is_constant(self) -> bool:
        """All elements are one finite number, and there are at least two."""
        return self.count > 1 and self.nan + self.inf == 0 and self.minimum == self.maximum

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        document["constant"] = self.is_constant
        document["first_nan"] = [list(i) for i in self.first_nan]
        document["first_inf"] = [list(i) for i in self.first_inf]
        return document


def finish(
    moments: Moments, first_nan: tuple[tuple[int, ...], ...], first_inf: tuple[tuple[int, ...], ...]
) -> TensorStats:
    """The statistics of a tensor whose every part was added."""
    finite = moments.finite
    variance = moments.squares / (finite - 1) if finite > 1 else None
    return TensorStats(
        count=moments.count,
        nan=moments.nan,
        positive_inf=moments.positive_inf,
        negative_inf=moments.negative_inf,
        minimum=_finite_or_none(moments.minimum),
        maximum=_finite_or_none(moments.maximum),
        mean=_finite_or_none(moments.mean) if finite else None,
        std=None if variance is None else _finite_or_none(math.sqrt(max(0.0, variance))),
        zero_fraction=moments.zeros / finite if finite else None,
        one_fraction=moments.ones / finite if finite else None,
        over_fp16=moments.over_fp16,
        first_nan=first_nan,
        first_inf=first_inf,
    )


def index_of(position: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the element that lies `position` elements behind the first, in a dense tensor."""
    index = [0] * len(shape)
    for dimension in sorted(range(len(shape)), key=lambda d: (-stride[d], -shape[d])):
        if shape[dimension] > 1:
            index[dimension], position = divmod(position, stride[dimension])
    return tuple(index)


def _finite_or_none(value: Optional[float]) -> Optional[float]:
    # The float64 sums of a float64 tensor may overflow; JSON has no infinity.
    return value if value is not None and math.isfinite(value) else None


def _least(left: Optional[float], right: Optional[float]) -> Optional[float]:
    if left is None or right is None:
        return right if left is None else left
    return min(left, right)


def _greatest(left: Optional[float], right: Optional[float]) -> Optional[float]:
    if left is None or right is None:
        return right if left is None else left
    return max(left, right)
