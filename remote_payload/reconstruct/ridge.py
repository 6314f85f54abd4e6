"""Ridge regression in its dual form: closed, exact, and as large as the number of training samples only."""

from __future__ import annotations

import dataclasses
from typing import Optional

import numpy as np
import torch

from remote_payload.reconstruct.products import device, inner_products
from remote_payload.reconstruct.statistics import Floats, RowsLike, mean_over_rows

FEWEST = 5
_PENALTIES = np.logspace(-7, 4, 12)
_FOLDS = 10
_COLUMNS_TO_CHOOSE_BY = 4096


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A new sample's target is `mean + weights @ (targets - mean)`: `weights` `(n, k)` over `k` training samples.

    `penalty` is in units of the mean squared norm of the centred inputs; `held_out` how it was chosen.
    """

    weights: Floats
    penalty: float
    held_out: str


def fit_ridge(inputs: RowsLike, targets: RowsLike, shown: RowsLike, block: int) -> Optional[Ridge]:
    """Fit on inputs `(k, f)` and targets `(k, d)`, for the samples `shown` `(n, f)`; None where inputs do not vary.

    The penalty is the one with the least squared error on training samples left out: one by one where neighbours are
    independent (`block` 1), else stretch by stretch, of which only the part that is `block` away from what was fitted
    counts: with neighbours in the fit nearly any penalty looks good.
    """
    count = len(inputs)
    centre = mean_over_rows(inputs)
    kernel, cross = inner_products(inputs, inputs, centre), inner_products(shown, inputs, centre)
    unit = float(np.trace(kernel)) / count
    if not unit > 0:
        return None
    values, vectors = _eigen(kernel)
    likeness = _target_products(targets)
    stretches = _stretches(count, block)
    errors = [_left_out_error(values, vectors, likeness, penalty * unit, stretches) for penalty in _PENALTIES]
    best = float(_PENALTIES[int(np.argmin(errors))])
    inverse = (vectors / (values + best * unit)) @ vectors.T
    how = "one sample at a time" if not stretches else f"{len(stretches)} stretches, {block} samples from the fit"
    return Ridge(cross @ inverse, best, how)


def _eigen(kernel: Floats) -> tuple[Floats, Floats]:
    values, vectors = torch.linalg.eigh(torch.from_numpy(kernel).to(device()))
    found: Floats = vectors.cpu().numpy()
    return np.maximum(values.cpu().numpy(), 0.0), found


def _target_products(targets: RowsLike) -> Floats:
    """`(k, k)` products of centred targets, by evenly spaced columns of wide ones: enough to choose a penalty by."""
    width = targets.shape[1]
    step = -(-width // _COLUMNS_TO_CHOOSE_BY)
    some = np.asarray(targets[:, ::step], dtype=np.float64)
    return np.asarray((some - some.mean(axis=0)) @ (some - some.mean(axis=0)).T)


def _stretches(count: int, block: int) -> list[tuple[slice, slice]]:
    """(left out, counted within it) by stretch; none: each sample is left out by itself."""
    if block <= 1:
        return []
    folds = int(np.clip(count // (3 * block), 2, _FOLDS))
    edges = np.linspace(0, count, folds + 1).round().astype(int).tolist()
    found = []
    for start, stop in zip(edges[:-1], edges[1:]):
        wide = slice(max(0, start - block), min(count, stop + block))
        found.append((wide, slice(start - wide.start, stop - wide.start)))
    return found


def _left_out_error(
    values: Floats, vectors: Floats, likeness: Floats, penalty: float, stretches: list[tuple[slice, slice]]
) -> float:
    """Sum of squared errors on samples left out, without fitting anew.

    With `A = K + penalty`, the errors on samples `s` that took no part in the fit are `(A^-1)_ss^-1 (A^-1 Y)_s`.
    """
    scaled = vectors / (values + penalty)
    inverse = scaled @ vectors.T
    if not stretches:
        fitted = np.einsum("ij,ij->i", inverse @ likeness, inverse)
        return float((fitted / np.diag(inverse) ** 2).sum())
    total = 0.0
    for left_out, counted in stretches:
        rows = inverse[left_out]
        spread = np.linalg.solve(inverse[left_out, left_out], rows)[counted]
        total += float(np.einsum("ij,ij->", spread @ likeness, spread))
    return total
