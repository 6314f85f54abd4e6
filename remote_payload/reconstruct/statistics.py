"""Correlations, chance levels and intervals, in float64 and without surprises. NumPy only.

Where a number cannot be had the functions give NaN for that row, and the metrics turn it into `None` with a reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, Optional, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[Any]


class RowsLike(Protocol):
    """`(n, d)` rows to be read a block at a time: an array, a memory map, or rows that are made when asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


Score = Callable[[Rows, Rows], Floats]
"""Predictions and targets `(b, d)` of a block to one number a row; NaN where it is undefined."""

_CHUNK_ELEMENTS = 4_000_000
SHIFT_MARGIN = 15
"""Circular shifts of a time series stay at least this far from 0: nearer ones are still alike by autocorrelation."""
FEWEST_SHUFFLES = 19
"""With fewer, p cannot fall below 0.05."""


def pearson(first: Rows, second: Rows) -> tuple[Optional[float], Optional[str]]:
    """Pearson's r of two series over centred float64 data, or None and why there is none."""
    a, b = np.asarray(first).reshape(1, -1), np.asarray(second).reshape(1, -1)
    if a.shape[1] < 2:
        return None, "fewer than two values"
    constant = [name for name, row in (("first", a), ("second", b)) if np.isnan(_centred(row)[1][0])]
    if constant:
        return None, f"zero variance in the {' and the '.join(constant)} series"
    return float(row_correlations(a, b)[0]), None


def scores(
    score: Score,
    given: RowsLike,
    wanted: RowsLike,
    index: Optional[NDArray[np.int64]] = None,
    rows: Optional[NDArray[np.int64]] = None,
) -> Floats:
    """`score` of row i of `given` against row i of `wanted`, or row `index[i]`; only of `rows` where they are given.

    A block of rows at a time, so that memory maps larger than the memory do not matter.
    """
    count = len(wanted) if rows is None else len(rows)
    result = np.empty(count)
    for block in _chunks(count, wanted.shape[1]):
        own: Any = block if rows is None else rows[block]
        other = own if index is None else index[own]
        result[block] = score(np.asarray(given[own]), np.asarray(wanted[other]))
    return result


def scores_of_each(score: Score, givens: Mapping[str, RowsLike], wanted: RowsLike) -> dict[str, Floats]:
    """`scores` of several predictors; each block of `wanted` is read once and is one object for all of them."""
    found = {name: np.empty(len(wanted)) for name in givens}
    for block in _chunks(len(wanted), wanted.shape[1]):
        rows = np.asarray(wanted[block])
        for name, given in givens.items():
            found[name][block] = score(np.asarray(given[block]), rows)
    return found


def squared_errors(given: Rows, wanted: Rows) -> Floats:
    """Mean squared difference of each row."""
    difference = given.astype(np.float64)
    difference -= wanted
    return np.asarray(np.einsum("ij,ij->i", difference, difference) / difference.shape[1])


def mean_over_rows(rows: RowsLike) -> Floats:
    """`(d,)` in float64, a block of rows at a time."""
    count, width = rows.shape
    mean = np.zeros(width)
    for block in _chunks(count, width):
        mean += np.asarray(rows[block]).sum(axis=0, dtype=np.float64)
    return mean / count


def variance_over_rows(rows: RowsLike) -> float:
    """Variance over rows of each column, mean over columns; two passes in blocks."""
    count, width = rows.shape
    mean = mean_over_rows(rows)
    total = 0.0
    for block in _chunks(count, width):
        centred = rows[block] - mean
        total += float(np.einsum("ij,ij->", centred, centred))
    return total / (count * width)


def row_correlations(first: Rows, second: Rows) -> Floats:
    """Pearson's r between corresponding rows of two `(n, d)` arrays, over centred float64 data; NaN at zero variance.

    A row counts as constant when its spread is no more than rounding leaves of a constant of its size.
    """
    result = np.empty(len(first))
    for rows in _chunks(len(first), first.shape[1]):
        (a, a_norm), (b, b_norm) = _centred(first[rows]), _centred(second[rows])
        with np.errstate(invalid="ignore", divide="ignore"):
            result[rows] = np.clip(np.einsum("ij,ij->i", a, b) / (a_norm * b_norm), -1.0, 1.0)
    return result


def column_correlations(first: RowsLike, second: RowsLike) -> Floats:
    """Pearson's r between corresponding columns: voxels over time. NaN at zero variance."""
    result = np.empty(first.shape[1])
    for columns in _chunks(first.shape[1], first.shape[0]):
        result[columns] = row_correlations(first[:, columns].T, second[:, columns].T)
    return result


def repaired_column_correlations(first: Rows, second: Rows, indices: Sequence[NDArray[np.int64]]) -> Floats:
    """`(k, columns)`: the correlation over time after `second` was put in each of `k` other orders."""
    result = np.empty((len(indices), first.shape[1]))
    for columns in _chunks(first.shape[1], first.shape[0]):
        (a, a_norm), (b, b_norm) = _centred(first[:, columns].T), _centred(second[:, columns].T)
        a, b = (a / a_norm[:, None]).T.copy(), (b / b_norm[:, None]).T.copy()
        for k, index in enumerate(indices):
            result[k, columns] = np.einsum("tv,tv->v", a, b[index])
    return np.asarray(np.clip(result, -1.0, 1.0))


def resampled_column_correlations(first: Rows, second: Rows, indices: NDArray[np.int64]) -> Floats:
    """`(k, columns)`: the correlation over time in each of `k` resamples of the rows, by weighted sums."""
    count = indices.shape[1]
    weights = np.stack([np.bincount(i, minlength=len(first)) for i in indices]) / count
    result = np.empty((len(indices), first.shape[1]))
    for columns in _chunks(first.shape[1], max(first.shape[0], len(indices))):
        (a, a_norm), (b, b_norm) = _centred(first[:, columns].T), _centred(second[:, columns].T)
        a, b = (a / a_norm[:, None]).T * np.sqrt(count), (b / b_norm[:, None]).T * np.sqrt(count)
        a_mean, b_mean = weights @ a, weights @ b
        variances = (weights @ a**2 - a_mean**2) * (weights @ b**2 - b_mean**2)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = (weights @ (a * b) - a_mean * b_mean) / np.sqrt(np.where(variances > 1e-18, variances, np.nan))
        result[:, columns] = r
    return np.asarray(np.clip(result, -1.0, 1.0))


def row_errors(first: RowsLike, second: Rows) -> Floats:
    """Mean squared difference between corresponding rows; `second` may be one row for all."""
    return scores(squared_errors, first, np.broadcast_to(second, first.shape))


@dataclasses.dataclass(frozen=True)
class Null:
    """What a statistic comes to when predictions are paired with the wrong targets.

    `p` is (1 + number at least as good) / (1 + number); None when there were too few wrong pairings to tell.
    """

    mean: float
    p: Optional[float]
    pairings: int
    how: str


def pairings(count: int, dependence: int, ordered: bool, wanted: int, seed: int) -> tuple[str, list[NDArray[np.int64]]]:
    """How the pairing is broken, and up to `wanted` index arrays that do it.

    Ordered data are shifted in a circle by at least 15 samples and at least `dependence` from either end; others are
    permuted.
    """
    if not ordered and dependence <= 1:
        generator = np.random.default_rng(seed)
        return "permutation", [generator.permutation(count) for _ in range(wanted)] if count > 3 else []
    margin = max(SHIFT_MARGIN, dependence)
    shifts = np.arange(margin, count - margin + 1)
    if len(shifts) > wanted:
        shifts = np.unique(np.linspace(shifts[0], shifts[-1], wanted).round().astype(np.int64))
    return f"circular shifts of at least {margin}", [(np.arange(count) + s) % count for s in shifts]


def null_of(
    statistic: Callable[[NDArray[np.int64]], float], observed: float, how: str, indices: list[NDArray[np.int64]]
) -> Optional[Null]:
    """The null of a statistic of which larger is better; None without any wrong pairing."""
    return null_from([statistic(i) for i in indices], observed, how)


def null_from(wrong: Sequence[float], observed: float, how: str) -> Optional[Null]:
    """The same from the statistic's values on wrong pairings."""
    values = np.array(wrong, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values) or not np.isfinite(observed):
        return None
    p = float((1 + (values >= observed).sum()) / (1 + len(values))) if len(values) >= FEWEST_SHUFFLES else None
    return Null(float(values.mean()), p, len(values), how)


def benjamini_hochberg(p_values: Floats) -> Floats:
    """Adjusted p values (q) of one family (Benjamini & Hochberg 1995); NaN stays NaN and takes no part."""
    adjusted = np.full(len(p_values), np.nan)
    known = np.flatnonzero(np.isfinite(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    if len(order):
        scaled = p_values[order] * len(order) / np.arange(1, len(order) + 1)
        adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted


def mean_interval(values: Floats, block: int, seed: int, resamples: int = 1000) -> Optional[tuple[float, float]]:
    """95 % interval of the mean by a moving-block bootstrap (Künsch 1989); blocks of `block` neighbouring samples.

    None for fewer than three blocks: nothing could be said.
    """
    kept = values[np.isfinite(values)]
    indices = block_indices(len(kept), block, seed, min(resamples, max(100, 20_000_000 // max(1, len(kept)))))
    if indices is None:
        return None
    means = kept[indices].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(
    above: Floats, below: Floats, block: int, seed: int, resamples: int = 1000
) -> Optional[tuple[float, float]]:
    """The same for the mean of `above` over the mean of `below`, resampled together."""
    indices = block_indices(len(above), block, seed, min(resamples, max(100, 20_000_000 // max(1, len(above)))))
    if indices is None:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = above[indices].mean(axis=1) / below[indices].mean(axis=1)
    if not np.isfinite(ratios).all():
        return None
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def block_indices(count: int, block: int, seed: int, resamples: int) -> Optional[NDArray[np.int64]]:
    """`(resamples, count)` row indices of a moving-block bootstrap; None for fewer than three blocks."""
    length = max(1, block)
    if count < 3 * length:
        return None
    generator = np.random.default_rng(seed)
    blocks = -(-count // length)
    starts = generator.integers(0, count - length + 1, size=(resamples, blocks))
    indices = (starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :count]
    return np.asarray(indices, dtype=np.int64)


def centre_rows(wide: Floats) -> tuple[Floats, Floats]:
    """Take each row's mean from it, in place; gives the means and the norms that are left.

    The norm is NaN for a row that is constant but for rounding.
    """
    largest = np.maximum(wide.max(axis=1, initial=0.0), -wide.min(axis=1, initial=0.0))
    means = wide.mean(axis=1)
    wide -= means[:, None]
    norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    rounding = largest * np.sqrt(wide.shape[1]) * 1e-12
    return means, np.where(norms > rounding, norms, np.nan)


def _centred(rows: Rows) -> tuple[Floats, Floats]:
    wide = np.array(rows, dtype=np.float64, order="C")
    _, norms = centre_rows(wide)
    return wide, norms


def _chunks(count: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))
