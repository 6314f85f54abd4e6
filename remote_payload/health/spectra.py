"""Opt-in passes over weight matrices: spectral norm and stable rank, or every singular value and its power law.

Each reads a matrix again in ranges of rows, in bounded memory. Needs torch and numpy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Callable, Optional

import numpy as np
import torch

from remote_payload.checkpoint.dtypes import ITEM_BYTES
from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.header import CheckpointHeader, Role, Section, TensorEntry
from remote_payload.checkpoint.placement import contiguous_stride
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.torch_tensors import memory_of, torch_dtype
from remote_payload.health.distribution import Array
from remote_payload.health.facts import PowerLaw, ScanResult, SpectraFacts, SpectralFacts

SPECTRUM = "spectrum"
MAX_SPECTRUM_SIDE = 8192
"""Of the shorter side: its Gram matrix in float64 takes half a gigabyte then, and its eigenvalues minutes."""
_BLOCK_BYTES = 64 << 20
_VECTORS = 8
_MAX_ITERATIONS = 30
_TOLERANCE = 1e-6
_MIN_TAIL = 10
_TYPES = ("float32", "float64", "bfloat16", "float16")

Progress = Callable[[int, int], None]


def measure_spectra(
    header: CheckpointHeader, scan: ScanResult, passes: Sequence[str], device: str, seed: int, progress: Progress
) -> SpectraFacts:
    """The model's weight matrices one by one. Convolutions are matrices of output channels by all the rest.

    `passes`: any of `HEALTH_PASSES`; `spectrum` gives what `spectral` does, and more. What cannot be measured is said
    by name.
    """
    chosen = [
        t
        for t in header.model_tensors()
        if t.role in (Role.WEIGHT_MATRIX, Role.EMBEDDING) and t.section is Section.MODEL and len(t.shape) >= 2
    ]
    facts = SpectraFacts({}, {})
    for number, tensor in enumerate(chosen):
        reason = _unfit(header, tensor, scan)
        if reason is None:
            try:
                facts.tensors[tensor.name] = _measure(_Matrix(header, tensor, device), passes, seed)
            except CheckpointError as error:
                reason = str(error)
        if reason is not None:
            facts.not_measured[tensor.name] = reason
        progress(number + 1, len(chosen))
    return facts


def fit_power_law(eigenvalues: Array) -> Optional[PowerLaw]:
    """`p(x) ~ x**-alpha` for x >= x_min by maximum likelihood, x_min where the Kolmogorov-Smirnov distance is least.

    Clauset, Shalizi and Newman 2009, SIAM Review 51, equations 3.1 and 3.9. At least ten values lie in the tail; None
    where there are fewer, or all are equal.
    """
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    values = values[values > 0]
    logs = np.log(values)
    best: Optional[PowerLaw] = None
    for first in range(values.size - _MIN_TAIL + 1):
        tail = logs[first:] - logs[first]
        total = float(tail.sum())
        if total <= 0 or (first and values[first] == values[first - 1]):
            continue
        count = tail.size
        alpha = 1.0 + count / total
        fitted = -np.expm1((1.0 - alpha) * tail)
        steps = np.arange(count + 1) / count
        distance = float(max(np.abs(fitted - steps[:-1]).max(), np.abs(fitted - steps[1:]).max()))
        if best is None or distance < best.distance:
            best = PowerLaw(alpha, (alpha - 1.0) / math.sqrt(count), float(values[first]), count, distance)
    return best


class _Matrix:
    """A weight as rows by columns, read in ranges of rows; kept in memory when it is one range."""

    def __init__(self, header: CheckpointHeader, tensor: TensorEntry, device: str) -> None:
        self.rows, self.columns = tensor.shape[0], tensor.numel // tensor.shape[0]
        self.device = torch.device(device)
        self._path = header.files[tensor.file].path
        self._tensor = tensor
        self._step = max(1, _BLOCK_BYTES // (4 * self.columns))
        self._kept: Optional[torch.Tensor] = None

    def ranges(self) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and float32 rows of each range; float64 for a float64 tensor. Raises `CheckpointError`."""
        if self._kept is not None:
            yield 0, self._kept
            return
        width = ITEM_BYTES[self._tensor.dtype]
        wide = torch.float64 if self._tensor.dtype == "float64" else torch.float32
        with Source(self._path) as source:
            for first in range(0, self.rows, self._step):
                count = min(self._step, self.rows - first)
                raw = torch.empty(count * self.columns * width, dtype=torch.uint8)
                source.read_into((self._tensor.file_offset or 0) + first * self.columns * width, memory_of(raw))
                stored = raw.view(torch_dtype(self._tensor.dtype)).view(count, self.columns)
                part = stored.to(device=self.device).to(wide)
                if count == self.rows:
                    self._kept = part
                yield first, part


def _unfit(header: CheckpointHeader, tensor: TensorEntry, scan: ScanResult) -> Optional[str]:
    stats = scan.stats.get(tensor.name)
    if stats is None:
        return scan.not_measured.get(tensor.name, "the pass ended before it")
    if tensor.dtype not in _TYPES or header.byte_order == "big":
        return f"{tensor.dtype} values in this byte order"
    if tensor.pieces or tensor.stride != contiguous_stride(tensor.shape):
        return "its rows do not lie one behind the other in one place"
    if stats.nan or stats.positive_inf or stats.negative_inf:
        return "it holds values that are not finite"
    return None


def _measure(matrix: _Matrix, passes: Sequence[str], seed: int) -> SpectralFacts:
    squares = sum(float(part.double().square().sum()) for _, part in matrix.ranges())
    facts = SpectralFacts(matrix.rows, matrix.columns, math.sqrt(squares))
    if SPECTRUM in passes and min(matrix.rows, matrix.columns) <= MAX_SPECTRUM_SIDE:
        values = _singular_values(matrix)
        norm = float(values[0]) if values.size else 0.0
        quantiles = np.quantile(values, (0.0, 0.25, 0.5, 0.75, 1.0)) if values.size else ()
        facts = dataclasses.replace(
            facts,
            singular_value_quantiles=tuple(float(q) for q in quantiles),
            power_law=fit_power_law(values * values),
            iterations=0,
            converged=True,
        )
    else:
        norm, iterations, converged = _spectral_norm(matrix, seed)
        facts = dataclasses.replace(facts, iterations=iterations, converged=converged)
    stable = squares / (norm * norm) if norm > 0 else None
    return dataclasses.replace(facts, spectral_norm=norm, stable_rank=stable)


def _spectral_norm(matrix: _Matrix, seed: int) -> tuple[float, int, bool]:
    """Power iteration on W'W with eight vectors at once: the largest converges as fast as (s9 / s1) ** 2 goes to 0."""
    generator = torch.Generator().manual_seed(seed)
    count = min(_VECTORS, matrix.columns, matrix.rows)
    start = torch.randn(matrix.columns, count, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(start.to(matrix.device)).Q
    norm = 0.0
    for iteration in range(1, _MAX_ITERATIONS + 1):
        product = torch.zeros_like(basis)
        for _, part in matrix.ranges():
            narrow = basis.to(part.dtype)
            product += (part.mT @ (part @ narrow)).double()
        gram = basis.mT @ product
        found = math.sqrt(max(0.0, float(torch.linalg.eigvalsh((gram + gram.mT) / 2)[-1])))
        if found == 0 or abs(found - norm) <= _TOLERANCE * found:
            return found, iteration, True
        norm = found
        basis = torch.linalg.qr(product).Q
    return norm, _MAX_ITERATIONS, False


def _singular_values(matrix: _Matrix) -> Array:
    """All, descending, from the Gram matrix of the shorter side in float64: exact to 1e-8 of the largest."""
    side = min(matrix.rows, matrix.columns)
    gram = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    if matrix.columns == side:
        for _, part in matrix.ranges():
            exact = part.double()
            gram += exact.mT @ exact
    else:
        for first, part in matrix.ranges():
            exact = part.double()
            for other, right in matrix.ranges():
                if other <= first:
                    block = exact @ right.double().mT
                    gram[first : first + len(part), other : other + len(right)] = block
                    gram[other : other + len(right), first : first + len(part)] = block.mT
    squares = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)
    return squares.sqrt().cpu().numpy()
