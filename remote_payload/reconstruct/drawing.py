"""A tiny rasteriser: canvases, captions in a 5x7 face of our own, colour maps, enlarged arrays, bars."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct.images import Picture

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (40, 44, 52)
FAINT: Colour = (150, 154, 162)
ACCENT: Colour = (31, 119, 180)
MUTED: Colour = (200, 203, 209)

GLYPH_HEIGHT, GLYPH_WIDTH = 7, 5
_ADVANCE = GLYPH_WIDTH + 1
_GLYPHS = {
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "B": "####. #...# #...# ####. #...# #...# ####.",
    "C": ".###. #...# #.... #.... #.... #...# .###.",
    "D": "####. #...# #...# #...# #...# #...# ####.",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "G": ".###. #...# #.... #.### #...# #...# .###.",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "I": ".###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.",
    "J": "..### ...#. ...#. ...#. ...#. #..#. .##..",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "N": "#...# ##..# #.#.# #..## #...# #...# #...#",
    "O": ".###. #...# #...# #...# #...# #...# .###.",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "Q": ".###. #...# #...# #...# #.#.# #..#. .##.#",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "S": ".#### #.... #.... .###. ....# ....# ####.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "V": "#...# #...# #...# #...# #...# .#.#. ..#..",
    "W": "#...# #...# #...# #.#.# #.#.# ##.## #...#",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
    "Z": "##### ....# ...#. ..#.. .#... #.... #####",
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "##### ...#. ..#.. ...#. ....# #...# .###.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. .#... .#... .#...",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
    ".": "..... ..... ..... ..... ..... .##.. .##..",
    ",": "..... ..... ..... ..... .##.. ..#.. .#...",
    ":": "..... .##.. .##.. ..... .##.. .##.. .....",
    ";": "..... .##.. .##.. ..... .##.. ..#.. .#...",
    "'": "..#.. ..#.. .#... ..... ..... ..... .....",
    "-": "..... ..... ..... ##### ..... ..... .....",
    "+": "..... ..#.. ..#.. ##### ..#.. ..#.. .....",
    "=": "..... ..... ##### ..... ##### ..... .....",
    "/": "....# ....# ...#. ..#.. .#... #.... #....",
    "(": "...#. ..#.. .#... .#... .#... ..#.. ...#.",
    ")": ".#... ..#.. ...#. ...#. ...#. ..#.. .#...",
    "%": "##..# ##..# ...#. ..#.. .#... #..## #..##",
    "_": "..... ..... ..... ..... ..... ..... #####",
    "#": ".#.#. .#.#. ##### .#.#. ##### .#.#. .#.#.",
    "|": "..#.. ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    " ": "..... ..... ..... ..... ..... ..... .....",
}
_UNKNOWN = "##### #...# #...# #...# #...# #...# #####"


def canvas(height: int, width: int, colour: Colour = PAPER) -> Picture:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def text_width(text: str, size: int = 1) -> int:
    """Pixels that `write` takes up."""
    return max(0, len(text) * _ADVANCE - 1) * size


def write(picture: Picture, row: int, column: int, text: str, colour: Colour = INK, size: int = 1) -> None:
    """Write in capitals from the top left corner; what leaves the picture is cut off."""
    for position, character in enumerate(text.upper()):
        pattern = _GLYPHS.get(character, _UNKNOWN).split(" ")
        mask = np.array([[cell == "#" for cell in line] for line in pattern])
        paste_mask(
            picture, row, column + position * _ADVANCE * size, np.kron(mask, np.ones((size, size), bool)), colour
        )


def paste_mask(picture: Picture, row: int, column: int, mask: NDArray[np.bool_], colour: Colour) -> None:
    height, width = picture.shape[:2]
    top, left = max(0, row), max(0, column)
    bottom, right = min(height, row + mask.shape[0]), min(width, column + mask.shape[1])
    if bottom > top and right > left:
        picture[top:bottom, left:right][mask[top - row : bottom - row, left - column : right - column]] = colour


def paste(picture: Picture, row: int, column: int, other: Picture) -> None:
    """`other` must fit inside."""
    picture[row : row + other.shape[0], column : column + other.shape[1]] = other


def fill(picture: Picture, top: int, left: int, bottom: int, right: int, colour: Colour) -> None:
    picture[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = colour


def frame(picture: Picture, top: int, left: int, bottom: int, right: int, colour: Colour) -> None:
    """A one-pixel outline just outside of the box."""
    fill(picture, top - 1, left - 1, top, right + 1, colour)
    fill(picture, bottom, left - 1, bottom + 1, right + 1, colour)
    fill(picture, top - 1, left - 1, bottom + 1, left, colour)
    fill(picture, top - 1, right, bottom + 1, right + 1, colour)


def resized(picture: Picture, height: int, width: int) -> Picture:
    """To this size: means of blocks where it shrinks, so that nothing aliases, and bilinear for the rest."""
    values = picture.astype(np.float64)
    for axis, side in ((0, height), (1, width)):
        step = max(1, values.shape[axis] // side)
        if step > 1:
            starts = np.arange(0, values.shape[axis] - step + 1, step)
            values = np.add.reduceat(values.take(np.arange(starts[-1] + step), axis), starts, axis) / step
        values = _interpolated(values, axis, side)
    return np.asarray(np.rint(values), dtype=np.uint8)


def _interpolated(values: NDArray[Any], axis: int, side: int) -> NDArray[Any]:
    count = values.shape[axis]
    places = np.clip((np.arange(side) + 0.5) * count / side - 0.5, 0, count - 1)
    below = np.floor(places).astype(int)
    share = (places - below).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    above = np.minimum(below + 1, count - 1)
    return np.asarray(values.take(below, axis) * (1 - share) + values.take(above, axis) * share)


def blocks(picture: Picture, down: int, along: int) -> Picture:
    """Each pixel as a block: for matrices, where a pixel is a value."""
    return np.repeat(np.repeat(picture, down, axis=0), along, axis=1)


def sequential(values: NDArray[Any], low: float, high: float) -> Picture:
    """Dark blue over green to yellow for `(H, W)` values from `low` to `high`."""
    return _through(values, low, high, ((38, 20, 72), (49, 104, 142), (53, 183, 121), (253, 231, 37)))


def diverging(values: NDArray[Any], extent: float) -> Picture:
    """Blue below 0, white at 0, red above, saturated at ±extent."""
    return _through(values, -extent, extent, ((33, 102, 172), (247, 247, 247), (178, 24, 43)))


def _through(values: NDArray[Any], low: float, high: float, stops: tuple[Colour, ...]) -> Picture:
    span = high - low if high > low else 1.0
    position = np.clip(np.nan_to_num((values.astype(np.float64) - low) / span), 0.0, 1.0) * (len(stops) - 1)
    below = np.minimum(position.astype(int), len(stops) - 2)
    table = np.array(stops, dtype=np.float64)
    share = (position - below)[..., None]
    return np.asarray(np.rint(table[below] * (1 - share) + table[below + 1] * share), dtype=np.uint8)
