"""What is shown of a sample: original, reconstruction, difference and nearest training sample, by kind of modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import drawing
from remote_payload.reconstruct.drawing import ACCENT, INK, MUTED
from remote_payload.reconstruct.images import Picture
from remote_payload.reconstruct.protocol import Kind, Modality

MAX_FRAMES = 5
_ROLES = ("original", "reconstruction", "difference", "nearest training")
_TILE_WIDTH, _TILE_HEIGHT = 168, 126
_MATRIX_WIDTH = 640
_LABEL_WIDTH = 104
_GAP = 6
_NOTE_HEIGHT = 12
_MARGIN = 10
_DIFFERENCE_SHARE = 0.5
"""The difference's colours saturate at this share of the declared range."""

Arrays = Sequence[NDArray[Any]]
"""One sample three ways: original, reconstruction and, where there is one, the nearest training sample."""


def film_strip(
    modality: Modality, frames: Sequence[tuple[str, Arrays]], marked: Optional[int] = None, scale: float = 1.0
) -> Picture:
    """A column for each (caption, arrays) frame; all share the original's range.

    The column `marked` is the sample that was chosen; the others are its neighbours. `scale` times a tile's usual size.
    """
    low, high = shown_range(modality, [arrays[0] for _, arrays in frames])
    box = scale * (2.0 if len(frames) == 1 else 1.0)
    columns = []
    for caption, arrays in frames:
        original, given = arrays[:2]
        tiles = [_tile(as_rgb(a, low, high), box) for a in arrays]
        difference = drawing.diverging(_grey(given) - _grey(original), _DIFFERENCE_SHARE * (high - low))
        columns.append((caption, [*tiles[:2], _tile(difference, box), *tiles[2:]]))
    several = "; mean of the channels" if frames[0][1][0].shape[2] > 1 else ""
    return grid(
        columns,
        [f"shown from {low:.3g} to {_with_unit(high, modality)}", _signed(modality, low, high) + several],
        marked,
    )


def matrices(modality: Modality, arrays: Arrays) -> Picture:
    """Codes, mel or embeddings as colours: time (or dimension) from left to right."""
    rows = [as_matrix(modality, a) for a in arrays]
    low, high = shown_range(modality, rows[:1])
    along = max(1, _MATRIX_WIDTH // rows[0].shape[1])
    down = max(1, min(along, 110 // rows[0].shape[0]))
    tiles = [drawing.blocks(drawing.sequential(r, low, high), down, along) for r in rows]
    if modality.kind is Kind.CODES:
        # Codes are names: how far apart two of them are as numbers says nothing.
        apart, note = np.rint(rows[1]) != np.rint(rows[0]), "difference: white the same code, red another one"
        difference = drawing.diverging(apart.astype(np.float64), 1.0)
    else:
        difference = drawing.diverging(rows[1] - rows[0], _DIFFERENCE_SHARE * (high - low))
        note = _signed(modality, low, high)
    tiles.insert(2, drawing.blocks(difference, down, along))
    return grid([("", tiles)], [f"dark {low:.3g}, yellow {_with_unit(high, modality)}", note])


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


def grid(
    columns: Sequence[tuple[str, Sequence[Picture]]], notes: Sequence[str], marked: Optional[int] = None
) -> Picture:
    """Columns of tiles, a row for each of the roles that there are, and lines of notes below."""
    tiles = columns[0][1]
    tile_width = max(t.shape[1] for _, c in columns for t in c)
    heights = [max(c[row].shape[0] for _, c in columns) for row in range(len(tiles))]
    caption_height = 14 if any(caption for caption, _ in columns) else 0
    width = 2 * _MARGIN + _LABEL_WIDTH + len(columns) * (tile_width + _GAP) - _GAP
    width = max(width, 2 * _MARGIN + max(drawing.text_width(note) for note in notes))
    height = 2 * _MARGIN + caption_height + sum(heights) + _GAP * len(heights) + _NOTE_HEIGHT * len(notes)
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
                drawing.write(picture, top + heights[row] // 2 - 4, _MARGIN, _ROLES[row], INK)
            top += heights[row] + _GAP
    for number, note in enumerate(notes):
        drawing.write(picture, height - _MARGIN - _NOTE_HEIGHT * (len(notes) - number) + 4, _MARGIN, note, INK)
    return picture


def _tile(picture: Picture, scale: float) -> Picture:
    height, width = picture.shape[:2]
    factor = scale * min(_TILE_WIDTH / width, _TILE_HEIGHT / height)
    tile = drawing.resized(picture, max(1, round(factor * height)), max(1, round(factor * width)))
    # Six bits a colour: no eye sees it, and the file is a third smaller.
    return np.asarray(tile & 0xFC | 0x02, dtype=np.uint8)


def _grey(frame: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(frame.astype(np.float64).mean(axis=2))


def _with_unit(value: float, modality: Modality) -> str:
    return f"{value:.3g}" if modality.unit == "1" else f"{value:.3g} {modality.unit}"


def _signed(modality: Modality, low: float, high: float) -> str:
    extent = _DIFFERENCE_SHARE * (high - low)
    return f"difference: reconstruction - original, blue -{extent:.3g}, white 0, red +{_with_unit(extent, modality)}"
