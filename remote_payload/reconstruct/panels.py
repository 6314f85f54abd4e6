"""What is shown of a sample: original, reconstruction and difference, by kind of modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import drawing
from remote_payload.reconstruct.drawing import ACCENT, FAINT, INK, MUTED
from remote_payload.reconstruct.images import Picture
from remote_payload.reconstruct.protocol import Kind, Modality

ROLES = ("original", "reconstruction", "difference")
MAX_FRAMES = 5
_TILE_WIDTH, _TILE_HEIGHT = 168, 126
_MATRIX_WIDTH = 640
_LABEL_WIDTH = 96
_GAP = 6
_MARGIN = 10
_DIFFERENCE_SHARE = 0.5
"""The difference's colours saturate at this share of the declared range."""


def film_strip(
    modality: Modality, frames: Sequence[tuple[str, NDArray[Any], NDArray[Any]]], marked: Optional[int] = None
) -> Picture:
    """Rows original, reconstruction, difference; a column for each (caption, original, reconstruction) frame.

    The column `marked` is the sample that was chosen; the others are its neighbours.
    """
    low, high = shown_range(modality, [f[1] for f in frames])
    columns = []
    for caption, original, given in frames:
        tiles = [
            _tile(as_rgb(original, low, high)),
            _tile(as_rgb(given, low, high)),
            _tile(drawing.diverging(_grey(given) - _grey(original), _DIFFERENCE_SHARE * (high - low))),
        ]
        columns.append((caption, tiles))
    return _grid(columns, _difference_note(modality, low, high), marked)


def matrices(modality: Modality, original: NDArray[Any], given: NDArray[Any]) -> Picture:
    """Codes, mel or embeddings as colours: time (or dimension) from left to right."""
    rows = [as_matrix(modality, a) for a in (original, given)]
    low, high = shown_range(modality, rows[:1])
    along = max(1, _MATRIX_WIDTH // rows[0].shape[1])
    down = max(1, min(along, 110 // rows[0].shape[0]))
    tiles = [drawing.blocks(drawing.sequential(r, low, high), down, along) for r in rows]
    difference = drawing.diverging(rows[1] - rows[0], _DIFFERENCE_SHARE * (high - low))
    tiles.append(drawing.blocks(difference, down, along))
    return _grid([("", tiles)], _difference_note(modality, low, high))


def waveforms(modality: Modality, original: NDArray[Any], given: NDArray[Any]) -> Picture:
    """The envelope of each signal, first channel."""
    signals = [as_signal(modality, a)[:, 0] for a in (original, given)]
    signals.append(signals[1] - signals[0])
    extent = max(float(np.abs(signals[0]).max()), 1e-9)
    return _grid([("", [_envelope(s, extent) for s in signals])], f"full height: +-{extent:.3g} {modality.unit}")


def as_frames(modality: Modality, value: NDArray[Any]) -> list[NDArray[Any]]:
    """The frames `(H, W, C)` of one sample; a video without time is one frame."""
    letters = modality.layout
    if "C" not in letters:
        value, letters = value[..., None], letters + "C"
    order = "THWC" if "T" in letters else "HWC"
    arranged = np.transpose(value, [letters.index(axis) for axis in order])
    return list(arranged) if "T" in letters else [arranged]


def as_matrix(modality: Modality, value: NDArray[Any]) -> NDArray[Any]:
    """Two dimensions to look at; low frequencies at the bottom, long embeddings broken into lines."""
    if modality.kind is Kind.TEXT_EMBEDDING:
        flat = value.reshape(-1)
        width = min(128, len(flat))
        return np.asarray(np.pad(flat, (0, -len(flat) % width)).reshape(-1, width))
    turned = value.T if modality.layout in ("TK", "TM") else value
    return np.asarray(turned[::-1] if modality.kind is Kind.MEL else turned)


def as_signal(modality: Modality, value: NDArray[Any]) -> NDArray[Any]:
    """`(T, C)`."""
    if modality.layout == "T":
        return np.asarray(value[:, None])
    return np.asarray(value.T if modality.layout == "CT" else value)


def as_rgb(frame: NDArray[Any], low: float, high: float) -> Picture:
    """`(H, W, C)` in the shown range; three channels are colours, otherwise their mean is a grey."""
    colours = frame if frame.shape[2] == 3 else np.repeat(frame.mean(axis=2, keepdims=True), 3, axis=2)
    scaled = (np.nan_to_num(colours.astype(np.float64)) - low) / (high - low) * 255.0
    return np.asarray(np.rint(np.clip(scaled, 0.0, 255.0)), dtype=np.uint8)


def shown_range(modality: Modality, originals: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """The declared range, else that of what is shown of the originals."""
    if modality.value_range is not None:
        return modality.value_range
    low = min(float(o.min()) for o in originals)
    high = max(float(o.max()) for o in originals)
    return (low, high) if high > low else (low, low + 1.0)


def _grid(columns: Sequence[tuple[str, Sequence[Picture]]], note: str, marked: Optional[int] = None) -> Picture:
    tiles = columns[0][1]
    tile_width = max(t.shape[1] for _, c in columns for t in c)
    heights = [max(c[row].shape[0] for _, c in columns) for row in range(len(tiles))]
    caption_height = 14 if any(caption for caption, _ in columns) else 0
    width = 2 * _MARGIN + _LABEL_WIDTH + len(columns) * (tile_width + _GAP) - _GAP
    width = max(width, 2 * _MARGIN + drawing.text_width(note))
    height = 2 * _MARGIN + caption_height + sum(heights) + _GAP * (len(heights) - 1) + 16
    picture = drawing.canvas(height, width)
    for number, (caption, column) in enumerate(columns):
        left = _MARGIN + _LABEL_WIDTH + number * (tile_width + _GAP)
        drawing.write(picture, _MARGIN, left, caption[: tile_width // 6], ACCENT if number == marked else INK)
        top = _MARGIN + caption_height
        for row, tile in enumerate(column):
            drawing.paste(picture, top, left, tile)
            outline = ACCENT if number == marked else MUTED
            drawing.frame(picture, top, left, top + tile.shape[0], left + tile.shape[1], outline)
            if number == 0:
                drawing.write(picture, top + heights[row] // 2 - 4, _MARGIN, ROLES[row], INK)
            top += heights[row] + _GAP
    drawing.write(picture, height - _MARGIN - drawing.GLYPH_HEIGHT, _MARGIN, note, FAINT)
    return picture


def _tile(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    factor = max(1, min(round(_TILE_WIDTH / width), round(_TILE_HEIGHT / height)))
    step = max(1, -(-width // (2 * _TILE_WIDTH)), -(-height // (2 * _TILE_HEIGHT)))
    # Six bits a colour: no eye sees it, and the file is a third smaller.
    return np.asarray(drawing.enlarge(picture[::step, ::step], factor) & 0xFC | 0x02, dtype=np.uint8)


def _grey(frame: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(frame.astype(np.float64).mean(axis=2))


def _envelope(signal: NDArray[Any], extent: float, width: int = 640, height: int = 90) -> Picture:
    picture = drawing.canvas(height, width)
    edges = np.linspace(0, len(signal), width + 1).astype(int)
    for column in range(width):
        piece = signal[edges[column] : max(edges[column] + 1, edges[column + 1])]
        top, bottom = ((1 - np.clip(v / extent, -1, 1)) / 2 * (height - 1) for v in (piece.max(), piece.min()))
        drawing.fill(picture, int(top), column, int(bottom) + 1, column + 1, drawing.ACCENT)
    return picture


def _difference_note(modality: Modality, low: float, high: float) -> str:
    extent = _DIFFERENCE_SHARE * (high - low)
    return f"difference: reconstruction - original, blue -{extent:.3g}, white 0, red +{extent:.3g} {modality.unit}"
