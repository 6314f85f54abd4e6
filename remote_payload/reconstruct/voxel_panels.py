"""Pictures of voxelwise correlations: their histogram against the null, and slices of the brain."""

from __future__ import annotations

import numpy as np

from remote_payload.reconstruct import drawing
from remote_payload.reconstruct.drawing import ACCENT, FAINT, INK, MUTED
from remote_payload.reconstruct.images import Picture
from remote_payload.reconstruct.protocol import VoxelPlaces
from remote_payload.reconstruct.statistics import Floats

_SLICES = 10
_MARGIN = 12


def histogram(observed: Floats, null: Floats, height: int = 260, width: int = 620, bins: int = 50) -> Picture:
    """Bars: voxels by their correlation over time. Grey line: what wrong pairings give, scaled to as many voxels.

    The grey band on the axis holds 95 % of the null.
    """
    kept, by_chance = observed[np.isfinite(observed)], null[np.isfinite(null)]
    edges = np.linspace(-1.0, 1.0, bins + 1)
    counts = np.histogram(kept, edges)[0]
    expected = np.histogram(by_chance, edges)[0] * (len(kept) / max(1, len(by_chance)))
    top = max(1.0, float(counts.max(initial=0)), float(expected.max(initial=0)))
    picture = drawing.canvas(height, width)
    left, right, ceiling, floor = 16, width - 16, 42, height - 34
    drawing.write(picture, 10, left, f"correlation of each voxel over time, {len(kept)} voxels", INK)
    drawing.write(picture, 24, left, "blue: model   grey: paired with the wrong time, band holds 95 % of it", FAINT)
    xs = np.linspace(left, right, bins + 1).astype(int)
    if len(by_chance):
        low, high = (_at(float(v), left, right) for v in np.percentile(by_chance, [2.5, 97.5]))
        drawing.fill(picture, ceiling, low, floor, high, (238, 239, 242))
    for position in range(bins):
        bar = floor - round((floor - ceiling) * float(counts[position]) / top)
        drawing.fill(picture, bar, xs[position] + 1, floor, xs[position + 1], ACCENT)
        line = floor - round((floor - ceiling) * float(expected[position]) / top)
        drawing.fill(picture, line - 1, xs[position], line + 1, xs[position + 1], FAINT)
    drawing.fill(picture, floor, left, floor + 1, right, INK)
    for value in (-1.0, -0.5, 0.0, 0.5, 1.0):
        x = _at(value, left, right)
        drawing.fill(picture, floor, x, floor + 4, x + 1, INK)
        label = f"{value:g}"
        drawing.write(picture, floor + 8, x - drawing.text_width(label) // 2, label, INK)
    if len(kept):
        _median_mark(picture, float(np.median(kept)), left, right, ceiling, floor)
    return picture


def slices(values: Floats, places: VoxelPlaces, extent: float, target_width: int = 900) -> Picture:
    """Axial slices from bottom to top, front of the brain up, left of the grid on the left."""
    indices = np.asarray(places.indices)
    indices = indices - indices.min(axis=0)
    shape = tuple(int(side) for side in indices.max(axis=0) + 1)
    volume = np.full(shape, np.nan)
    volume[indices[:, 0], indices[:, 1], indices[:, 2]] = values
    inside = np.zeros(shape, dtype=bool)
    inside[indices[:, 0], indices[:, 1], indices[:, 2]] = True
    levels = np.flatnonzero(inside.any(axis=(0, 1)))
    chosen = levels[np.unique(np.linspace(0, len(levels) - 1, _SLICES + 2).round().astype(int))[1:-1]]
    per_row = -(-len(chosen) // 2)
    factor = max(1, (target_width - 2 * _MARGIN) // (per_row * (shape[0] + 1)))
    tile_height, tile_width = shape[1] * factor, (shape[0] + 1) * factor
    rows = -(-len(chosen) // per_row)
    width = max(2 * _MARGIN + per_row * tile_width, 620)
    picture = drawing.canvas(2 * _MARGIN + rows * (tile_height + _MARGIN) + 20, width)
    for number, level in enumerate(chosen):
        top = _MARGIN + (number // per_row) * (tile_height + _MARGIN)
        left = _MARGIN + (number % per_row) * tile_width
        plane, mask = volume[:, :, level].T[::-1], inside[:, :, level].T[::-1]
        tile = drawing.diverging(plane, extent)
        tile[mask & ~np.isfinite(plane)] = MUTED
        tile[~mask] = drawing.PAPER
        drawing.paste(picture, top, left, drawing.blocks(tile, factor, factor))
        _outline(picture, np.kron(mask, np.ones((factor, factor), dtype=bool)), top, left)
    _colour_bar(picture, extent)
    return picture


def _outline(picture: Picture, mask: np.typing.NDArray[np.bool_], top: int, left: int) -> None:
    padded = np.pad(mask, 1)
    core = padded[1:-1, 1:-1]
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    drawing.paste_mask(picture, top, left, core & ~surrounded, FAINT)


def _colour_bar(picture: Picture, extent: float) -> None:
    height = picture.shape[0]
    top = height - _MARGIN - 12
    ramp = drawing.diverging(np.linspace(-extent, extent, 160)[None, :], extent)
    low, high = f"-{extent:.2f}", f"+{extent:.2f}"
    left = _MARGIN + drawing.text_width(low) + 6
    drawing.write(picture, top + 2, _MARGIN, low, INK)
    drawing.paste(picture, top, left, drawing.blocks(ramp, 11, 1))
    drawing.frame(picture, top, left, top + 11, left + 160, MUTED)
    drawing.write(
        picture,
        top + 2,
        left + 166,
        f"{high}   correlation over time; axial, bottom to top, front up, left is left",
        INK,
    )


def _median_mark(picture: Picture, median: float, left: int, right: int, ceiling: int, floor: int) -> None:
    x = _at(median, left, right)
    drawing.fill(picture, ceiling, x, floor, x + 1, (178, 24, 43))
    label = f"median {median:.3f}"
    column = min(x + 4, right - drawing.text_width(label))
    drawing.write(picture, ceiling + 2, column, label, (178, 24, 43))


def _at(value: float, left: int, right: int) -> int:
    return left + round((right - left) * (value + 1.0) / 2.0)
