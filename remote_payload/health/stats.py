"""What one tensor's values come to, and what a parameter and its optimizer moments come to together."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Optional

FP16_MAX = 65504.0
MAX_LOCATIONS = 5

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
"""The probabilities of every tuple of quantiles here. The quantile of p is the smallest value x for which at least
p * n of the n finite elements are <= x (the inverted distribution function: a value that occurs, nothing between)."""


@dataclasses.dataclass(frozen=True)
class InitDistance:
    """How far a weight is from what one initialisation draws. Effect sizes, no p values.

    `scheme`: kaiming_uniform_a5_fan_in (torch's default for Linear and Conv), kaiming_normal_fan_in,
    kaiming_normal_fan_out, kaiming_uniform_fan_in, kaiming_uniform_fan_out, xavier_uniform, xavier_normal, normal_0.02.
    `std_ratio`: the tensor's std over the scheme's. `shape_distance`: 1-Wasserstein distance of the standardised
    values (mean 0, std 1) to the standardised distribution of the scheme, in standard deviations; a fresh uniform is
    about 0.001 or less from uniform and 0.10 from normal (and the other way round), training moves either.
    """

    scheme: str
    std_ratio: float
    shape_distance: float


@dataclasses.dataclass(frozen=True)
class RowStats:
    """Rows of a weight of two or more dimensions: its slices along the first, flattened; columns for two only.

    `dead_rows`: every element is 0. `constant_rows`: every element is one number other than 0 (rows of two elements
    or more). `duplicate_row_groups`: sets of two or more rows that are bit for bit equal, dead and constant ones left
    out; `duplicate_rows`: the rows in them. `dead_columns`: every element is 0; None unless there are two dimensions.
    Norms are Euclidean over rows with finite elements only; None if no row is finite.
    `first_dead_rows` and `first_duplicate_rows` (pairs of a row and an earlier one equal to it) name up to 5.
    """

    rows: int
    columns: int
    dead_rows: int
    constant_rows: int
    duplicate_row_groups: int
    duplicate_rows: int
    dead_columns: Optional[int]
    norm_min: Optional[float]
    norm_median: Optional[float]
    norm_max: Optional[float]
    first_dead_rows: tuple[int, ...] = ()
    first_duplicate_rows: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class TensorStats:
    """A tensor's values. Minimum to fractions are over the finite elements; `std` is the sample's, None below two.

    Fractions are of the finite elements, None if there are none. `zero_fraction` and `one_fraction`: exactly 0 and 1,
    the constants that biases and scales start from. `over_fp16`: finite elements that fp16 turns into infinities.
    `kurtosis`: fourth standardised moment, 3 for a normal distribution, None for constants. `abs_max`: of the finite.
    `denormal_fraction`: subnormal in the stored type and not 0. `saturated_fraction`: exactly plus or minus the stored
    type's largest finite number. `quantiles`: aligned with QUANTILES, None for integers and complex numbers.
    `quantile_resolution`: 0.0 where quantiles are exact (all types of 16 and 8 bits); else their largest relative
    error (2**-8 for 32 and 64-bit floats). `dominant_fraction`: the share of the most frequent value `dominant_value`
    (exact for 16 and 8 bits, None else). `rows`: None unless the tensor is a weight of two or more dimensions.
    `init`: None or empty unless it is a weight matrix.
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
    kurtosis: Optional[float] = None
    abs_max: Optional[float] = None
    denormal_fraction: Optional[float] = None
    saturated_fraction: Optional[float] = None
    quantiles: Optional[tuple[float, ...]] = None
    quantile_resolution: Optional[float] = None
    dominant_value: Optional[float] = None
    dominant_fraction: Optional[float] = None
    rows: Optional[RowStats] = None
    init: tuple[InitDistance, ...] = ()

    @property
    def inf(self) -> int:
        return self.positive_inf + self.negative_inf

    @property
    def is_constant(self) -> bool:
        """All elements are one finite number, and there are at least two."""
        return self.count > 1 and self.nan + self.inf == 0 and self.minimum == self.maximum

    @property
    def median(self) -> Optional[float]:
        return self.quantiles[QUANTILES.index(0.5)] if self.quantiles else None

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        document["constant"] = self.is_constant
        document["first_nan"] = [list(i) for i in self.first_nan]
        document["first_inf"] = [list(i) for i in self.first_inf]
        return document


@dataclasses.dataclass(frozen=True)
class AdamSettings:
    """What Adam's next step of one parameter is made from. `step`: steps taken so far, None if the file does not say.

    `learning_rate` is that of the parameter's group as stored; `peak_learning_rate` the largest that the file gives
    evidence of. With `step` None the moments are taken as corrected already (bias corrections of 1).
    """

    learning_rate: float
    peak_learning_rate: float
    beta1: float
    beta2: float
    eps: float
    step: Optional[float] = None

    @property
    def correction1(self) -> float:
        """1 - beta1 ** step."""
        return 1.0 - self.beta1**self.step if self.step else 1.0

    @property
    def correction2(self) -> float:
        """1 - beta2 ** step."""
        return 1.0 - self.beta2**self.step if self.step else 1.0


@dataclasses.dataclass(frozen=True)
class JointStats:
    """One parameter w read together with Adam's moments m (exp_avg) and v (exp_avg_sq), element by element.

    Fractions are of all `count` elements. `first_moment` and `second_moment` are names in the header.

    From v alone: `v_zero_fraction` exactly 0; `v_negative` and `v_nan` counts; `root_v_quantiles`: of sqrt(v_hat),
    v_hat = v / correction2, over the finite v >= 0, aligned with QUANTILES; `eps_ratio_quantiles`: the same of
    sqrt(v_hat) / eps (below 1: eps sets the step), None for eps = 0. `v_below_eps_fraction`: of the elements with
    v > 0 those with sqrt(v_hat) < eps. `v_decay_stalled_fraction`: of the elements with v > 0 those that one decay
    v * beta2 leaves at v when it is rounded to v's type (to nearest, ties to even), so that v can only grow.
    `m_zero_fraction`: m exactly 0.

    Jointly: the predicted step is learning_rate * m_hat / (sqrt(v_hat) + eps), in float32. `step_rounded_fraction`:
    of the elements with a finite w and a finite step other than 0, those for which w - step rounded to w's type is w:
    the step is under half an ulp. `step_rounded_fraction_at_peak`: the same with the peak learning rate.
    `steps_measured`: how many elements these two are of; 0 makes them None. `ones_*`: restricted to w == 1 exactly:
    how many there are with a step other than 0, and which part of them stays at 1 at the stored and at the peak rate.
    `zeros_with_gradient`: elements with w == 0 exactly though v > 0 (not explained by rounding).
    """

    parameter: str
    first_moment: str
    second_moment: str
    count: int
    settings: AdamSettings
    v_zero_fraction: float = 0.0
    v_negative: int = 0
    v_nan: int = 0
    m_zero_fraction: float = 0.0
    root_v_quantiles: Optional[tuple[float, ...]] = None
    eps_ratio_quantiles: Optional[tuple[float, ...]] = None
    v_below_eps_fraction: Optional[float] = None
    v_decay_stalled_fraction: Optional[float] = None
    w_zero_fraction: float = 0.0
    w_one_fraction: float = 0.0
    steps_measured: int = 0
    step_rounded_fraction: Optional[float] = None
    step_rounded_fraction_at_peak: Optional[float] = None
    ones_with_step: int = 0
    ones_rounded_fraction: Optional[float] = None
    ones_rounded_fraction_at_peak: Optional[float] = None
    zeros_with_gradient: int = 0

    @property
    def v_all_zero(self) -> bool:
        """The gradient was exactly 0 from the first step on (or underflowed, in fp16)."""
        return self.count > 0 and self.v_zero_fraction == 1.0

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "v_all_zero": self.v_all_zero}


@dataclasses.dataclass(frozen=True)
class Misalignment:
    """A moment whose shape is not its parameter's: the optimizer's state belongs to another model or order."""

    parameter: str
    moment: str
    parameter_shape: tuple[int, ...]
    moment_shape: tuple[int, ...]


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
    denormals: int = 0
    saturated: int = 0
    minimum: Optional[float] = None
    maximum: Optional[float] = None
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean; `cubes` and `fourths`: of their third and fourth powers."""
    cubes: float = 0.0
    fourths: float = 0.0

    @property
    def finite(self) -> int:
        return self.count - self.nan - self.positive_inf - self.negative_inf

    def add(self, other: Moments) -> None:
        """Take in another part. Joined as Pebay (2008, SAND2008-6212) does, without cancellation."""
        here, there = self.finite, other.finite
        if there:
            total = here + there
            d = other.mean - self.mean
            share = d / total
            self.fourths += (
                other.fourths
                + d * share * share * share * here * there * (here * here - here * there + there * there)
                + 6.0 * share * share * (here * here * other.squares + there * there * self.squares)
                + 4.0 * share * (here * other.cubes - there * self.cubes)
            )
            self.cubes += (
                other.cubes
                + d * share * share * here * there * (here - there)
                + 3.0 * share * (here * other.squares - there * self.squares)
            )
            self.squares += other.squares + d * share * here * there
            self.mean += share * there
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.minimum = _least(self.minimum, other.minimum)
        self.maximum = _greatest(self.maximum, other.maximum)


_COUNTS = ("count", "nan", "positive_inf", "negative_inf", "zeros", "ones", "over_fp16", "denormals", "saturated")


def finish(
    moments: Moments,
    first_nan: tuple[tuple[int, ...], ...] = (),
    first_inf: tuple[tuple[int, ...], ...] = (),
    is_floating: bool = True,
) -> TensorStats:
    """The statistics of a tensor whose every part was added; quantiles, rows and distances are put in by the caller."""
    finite = moments.finite
    variance = moments.squares / (finite - 1) if finite > 1 else None
    low, high = _finite_or_none(moments.minimum), _finite_or_none(moments.maximum)
    return TensorStats(
        count=moments.count,
        nan=moments.nan,
        positive_inf=moments.positive_inf,
        negative_inf=moments.negative_inf,
        minimum=low,
        maximum=high,
        mean=_finite_or_none(moments.mean) if finite else None,
        std=None if variance is None else _finite_or_none(math.sqrt(max(0.0, variance))),
        zero_fraction=_share(moments.zeros, finite),
        one_fraction=_share(moments.ones, finite),
        over_fp16=moments.over_fp16,
        first_nan=first_nan,
        first_inf=first_inf,
        kurtosis=_kurtosis(moments),
        abs_max=None if low is None or high is None else max(abs(low), abs(high)),
        denormal_fraction=_share(moments.denormals, finite) if is_floating else None,
        saturated_fraction=_share(moments.saturated, finite) if is_floating else None,
    )


def _kurtosis(moments: Moments) -> Optional[float]:
    if moments.finite < 2 or not moments.squares > 0:
        return None
    square = moments.squares * moments.squares
    return _finite_or_none(moments.finite * moments.fourths / square) if square > 0 else None


def _share(some: int, of: int) -> Optional[float]:
    return some / of if of else None


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
