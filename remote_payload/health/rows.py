"""Rows of a weight: dead, constant and duplicate ones, norms, and dead columns. Parts are joined in any cut. numpy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Optional

import numpy as np

from remote_payload.checkpoint.header import Role, Section, TensorEntry
from remote_payload.checkpoint.tensor_bytes import pieces_are_row_ranges
from remote_payload.health.stats import MAX_LOCATIONS, RowStats

MAX_ROWS = 1 << 22
MAX_COLUMNS = 1 << 24
"""Bound the memory that a shape can ask for: rows take 24 bytes each, columns one and their hash's multiplier 8."""
_ROW_ROLES = (Role.WEIGHT_MATRIX, Role.EMBEDDING)
_ROW_TYPES = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}

Array = Any


@dataclasses.dataclass(frozen=True)
class RowShape:
    """A matrix as it lies in the file: `rows` of `columns` elements, one behind the other."""

    rows: int
    columns: int
    has_columns: bool
    """Two dimensions: a column means something."""


@dataclasses.dataclass
class RowPart:
    """What the rows from `first` on came to, as far as they lie in one piece.

    `squares`: float64 sums of squares. `low` and `high`: least and greatest bit pattern. `hashes`: uint64 sums that do
    not depend on the cut. `alive`: columns that hold a non-zero here, None if nobody asked.
    """

    first: int
    squares: Array
    low: Array
    high: Array
    hashes: Array
    alive: Optional[Array] = None


def row_shape(tensor: TensorEntry) -> Optional[RowShape]:
    """The matrix that a weight is, None for tensors whose rows mean nothing or are no spans of the file."""
    if tensor.role not in _ROW_ROLES or tensor.section not in (Section.MODEL, Section.AVERAGE):
        return None
    if len(tensor.shape) < 2 or not tensor.numel or tensor.dtype not in _ROW_TYPES or not _is_row_major(tensor):
        return None
    if tensor.pieces and not pieces_are_row_ranges(tensor):
        return None
    rows, columns = tensor.shape[0], tensor.numel // tensor.shape[0]
    if rows > MAX_ROWS or columns > MAX_COLUMNS:
        return None
    return RowShape(rows, columns, len(tensor.shape) == 2)


def _is_row_major(tensor: TensorEntry) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class RowAccumulator:
    """The rows of one tensor, of which the parts come in file order."""

    def __init__(self, shape: RowShape) -> None:
        self._shape = shape
        self._squares = np.zeros(shape.rows)
        self._low = np.full(shape.rows, 0xFFFFFFFF, dtype=np.uint32)
        self._high = np.zeros(shape.rows, dtype=np.uint32)
        self._hashes = np.zeros(shape.rows, dtype=np.uint64)
        self._alive = np.zeros(shape.columns, dtype=bool) if shape.has_columns else None
        self.wants_columns = shape.has_columns
        """False once every column is known to be alive; workers read it to save themselves the look."""

    def add(self, part: RowPart) -> None:
        span = slice(part.first, part.first + len(part.squares))
        self._squares[span] += part.squares
        np.minimum(self._low[span], part.low, out=self._low[span])
        np.maximum(self._high[span], part.high, out=self._high[span])
        self._hashes[span] += part.hashes
        if self._alive is not None and self.wants_columns and part.alive is not None:
            self._alive |= part.alive
            self.wants_columns = not bool(self._alive.all())

    def finish(self) -> RowStats:
        dead = self._squares == 0
        constant = (self._low == self._high) & ~dead & (self._shape.columns > 1)
        distinct = np.flatnonzero(~dead & ~constant)
        groups, duplicates, pairs = _duplicates(distinct, self._hashes[distinct])
        finite = np.sqrt(self._squares[np.isfinite(self._squares)])
        return RowStats(
            rows=self._shape.rows,
            columns=self._shape.columns,
            dead_rows=int(dead.sum()),
            constant_rows=int(constant.sum()),
            duplicate_row_groups=groups,
            duplicate_rows=duplicates,
            dead_columns=None if self._alive is None else int((~self._alive).sum()),
            norm_min=float(finite.min()) if finite.size else None,
            norm_median=float(np.median(finite)) if finite.size else None,
            norm_max=float(finite.max()) if finite.size else None,
            first_dead_rows=tuple(np.flatnonzero(dead)[:MAX_LOCATIONS].tolist()),
            first_duplicate_rows=pairs,
        )


def _duplicates(rows: Array, hashes: Array) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    order = np.argsort(hashes, kind="stable")
    sorted_hashes, sorted_rows = hashes[order], rows[order]
    same = sorted_hashes[1:] == sorted_hashes[:-1]
    if not same.any():
        return 0, 0, ()
    starts = np.concatenate(([True], ~same))
    sizes = np.bincount(np.cumsum(starts) - 1)
    groups, members = int((sizes > 1).sum()), int(sizes[sizes > 1].sum())
    first_of_group = np.maximum.accumulate(np.where(starts, np.arange(starts.size), 0))
    later = np.flatnonzero(~starts)
    pairs = sorted((int(sorted_rows[i]), int(sorted_rows[first_of_group[i]])) for i in later.tolist())
    return groups, members, tuple(pairs[:MAX_LOCATIONS])


def reduce_rows(data: Array, dtype: str, position: int, shape: RowShape, wants_columns: bool) -> RowPart:
    """The rows in a piece of bytes (uint8) that begins `position` elements into the tensor."""
    bits = data.view(_ROW_TYPES[dtype])
    first, last = position // shape.columns, (position + bits.size - 1) // shape.columns
    part = RowPart(
        first,
        np.zeros(last - first + 1),
        np.zeros(last - first + 1, dtype=np.uint32),
        np.zeros(last - first + 1, dtype=np.uint32),
        np.zeros(last - first + 1, dtype=np.uint64),
        np.zeros(shape.columns, dtype=bool) if wants_columns else None,
    )
    at = 0
    while at < bits.size:
        row, column = divmod(position + at, shape.columns)
        whole = (bits.size - at) // shape.columns if column == 0 else 0
        length = whole * shape.columns if whole else min(shape.columns - column, bits.size - at)
        _reduce_matrix(bits[at : at + length].reshape(max(1, whole), -1), dtype, row - first, column, part)
        at += length
    return part


def _reduce_matrix(bits: Array, dtype: str, row: int, column: int, part: RowPart) -> None:
    step = max(1, (1 << 17) // bits.shape[1])
    for start in range(0, bits.shape[0], step):
        some = bits[start : start + step]
        span = slice(row + start, row + start + some.shape[0])
        part.squares[span] = _squares(some, dtype)
        part.low[span], part.high[span] = some.min(axis=1), some.max(axis=1)
        part.hashes[span] = _hashes(some, column)
    if part.alive is not None:
        _mark_alive(bits, part.alive[column : column + bits.shape[1]])


def _squares(bits: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        values = bits.view(np.float16 if dtype == "float16" else np.float32)
    exact = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.einsum("ij,ij->i", exact, exact)


def _hashes(bits: Array, column: int) -> Array:
    """Sums of the elements times fixed odd numbers, modulo 2**64: a row's hash however it is cut."""
    words = bits.astype(np.uint64)
    # The spread keeps sums of products from depending on the elements' low bits alone.
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    words *= multipliers(bits.shape[1] + column)[column:]
    return words.sum(axis=1, dtype=np.uint64)


def multipliers(count: int) -> Array:
    """What the hash multiplies the elements of a row's first `count` columns by: odd numbers of 64 bits."""
    return _multiplier_table(1 << max(10, (count - 1).bit_length()))[:count]


@functools.lru_cache(maxsize=4)
def _multiplier_table(count: int) -> Array:
    """splitmix64 of the position, made odd."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def _mark_alive(bits: Array, alive: Array) -> None:
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    at, step = 0, 4
    while at < bits.shape[0]:
        missing = np.flatnonzero(~alive)
        if not missing.size:
            return
        some = bits[at : at + step]
        some = some if missing.size * 4 > alive.size else some[:, missing]
        # Shifting the sign out leaves 0 for both zeros.
        found = ((some & ~sign) != 0).any(axis=0)
        if found.size == alive.size:
            alive |= found
        else:
            alive[missing[found]] = True
        at, step = at + step, min(4096, step * 2)
