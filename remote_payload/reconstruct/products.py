"""Products of all pairs of rows: in float64, a block of columns at a time, on the GPU where there is one."""

from __future__ import annotations

from typing import Any, Callable, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.statistics import Floats, RowsLike

Pairwise = Callable[[RowsLike, RowsLike], Floats]
"""Predictions `(n, d)` and targets `(m, d)` to the score `(n, m)` of each pair."""

_BLOCK_ELEMENTS = 4_000_000


class Reordered:
    """Row i is row `order[i]` of `rows`, or `otherwise` where that is negative; made when asked for.

    Indexed by a slice or an array of rows, and by these with a slice of columns.
    """

    def __init__(self, rows: RowsLike, order: NDArray[np.int64], otherwise: Optional[NDArray[Any]] = None) -> None:
        self._rows = rows
        self._order = order
        self._otherwise = otherwise

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._order), *self._rows.shape[1:])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any, /) -> Any:
        chosen, columns = index if isinstance(index, tuple) else (index, slice(None))
        order: Any = self._order[chosen]
        # A block of columns of a large memory map is never read as whole rows.
        taken = np.asarray(self._rows[order] if columns == slice(None) else self._rows[:, columns][order])
        if self._otherwise is None or not (order < 0).any():
            return taken
        filled = taken.copy()
        filled[order < 0] = self._otherwise[columns]
        return filled


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inner_products(
    first: RowsLike,
    second: RowsLike,
    centre: Optional[Floats] = None,
    means: tuple[Optional[Floats], Optional[Floats]] = (None, None),
) -> Floats:
    """`(n, m)`: the product of each row of `first` with each of `second`, of both less `centre` `(d,)` and their own
    `means` `(n,)`, `(m,)`."""
    where = device()
    total = torch.zeros((len(first), len(second)), dtype=torch.float64, device=where)
    for columns in _columns(first, second):
        a, b = (
            torch.from_numpy(_wide(rows, columns, centre, mean)).to(where)
            for rows, mean in ((first, means[0]), (second, means[1]))
        )
        total += a @ b.T
    result: Floats = total.cpu().numpy()
    return result


def correlations(first: RowsLike, second: RowsLike, centre: Optional[Floats] = None) -> Floats:
    """`(n, m)`: Pearson over elements of each pair of rows, after `centre` is removed; NaN at zero variance."""
    (a, a_norm), (b, b_norm) = _moments(first, centre), _moments(second, centre)
    products = inner_products(first, second, centre, (a, b))
    return np.asarray(np.clip(products / (a_norm[:, None] * b_norm[None, :]), -1.0, 1.0))


def cosines(first: RowsLike, second: RowsLike, centre: Optional[Floats] = None) -> Floats:
    """`(n, m)`: cosine of each pair of rows, after `centre` is removed; NaN for a row of zeros."""
    norms = [np.sqrt(_squares(rows, centre)) for rows in (first, second)]
    a, b = (np.where(norm > 0, norm, np.nan) for norm in norms)
    return np.asarray(inner_products(first, second, centre) / (a[:, None] * b[None, :]))


def mean_squared_errors(first: RowsLike, second: RowsLike) -> Floats:
    """`(n, m)`: mean squared difference of each pair of rows."""
    # Differences do not depend on the centre, but what cancels in the sum below does.
    centre = statistics.mean_over_rows(second)
    products = inner_products(first, second, centre)
    total = _squares(first, centre)[:, None] + _squares(second, centre)[None, :] - 2.0 * products
    return np.asarray(np.maximum(total, 0.0) / second.shape[1])


def _moments(rows: RowsLike, centre: Optional[Floats]) -> tuple[Floats, Floats]:
    """Each row's mean and norm about it, NaN at zero variance."""
    means, norms = np.empty(len(rows)), np.empty(len(rows))
    for block in _rows(rows):
        means[block], norms[block] = statistics.centre_rows(_wide(rows, slice(None), centre, None, block))
    return means, norms


def _squares(rows: RowsLike, centre: Optional[Floats]) -> Floats:
    found = np.empty(len(rows))
    for block in _rows(rows):
        wide = _wide(rows, slice(None), centre, None, block)
        found[block] = np.einsum("ij,ij->i", wide, wide)
    return found


def _wide(
    rows: RowsLike, columns: slice, centre: Optional[Floats], means: Optional[Floats], block: slice = slice(None)
) -> Floats:
    wide: Floats = np.array(rows[block, columns], dtype=np.float64)
    if centre is not None:
        wide -= centre[columns]
    if means is not None:
        wide -= means[block, None]
    return wide


def _rows(rows: RowsLike) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    return [slice(start, min(len(rows), start + step)) for start in range(0, len(rows), step)]


def _columns(first: RowsLike, second: RowsLike) -> list[slice]:
    width = second.shape[1]
    step = max(64, _BLOCK_ELEMENTS // max(1, len(first), len(second)))
    return [slice(start, min(width, start + step)) for start in range(0, width, step)]
