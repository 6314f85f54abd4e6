"""Whether boxes cover a tensor exactly: the rule by which sharded tensors are believed to be whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and shape."""


def is_grid(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether `boxes` are the cells of one grid of cuts through `shape`, each once.

    Every layout that torch writes is one. Cost grows with the number of boxes, not with its square.
    """
    if not boxes or any(len(o) != len(shape) or len(s) != len(shape) for o, s in boxes):
        return False
    ends: list[dict[int, int]] = []
    for dimension, extent in enumerate(shape):
        cuts = sorted({offsets[dimension] for offsets, _ in boxes})
        if cuts[0] != 0 or cuts[-1] >= max(1, extent):
            return False
        ends.append(dict(zip(cuts, [*cuts[1:], extent])))
    if math.prod(len(e) for e in ends) != len(boxes) or len({offsets for offsets, _ in boxes}) != len(boxes):
        return False
    return all(offsets[d] + sizes[d] == ends[d][offsets[d]] for offsets, sizes in boxes for d in range(len(shape)))


def is_in_row_order(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether the boxes, one after the other, are the tensor in row-major order: cut along the first dimension that
    has more than one element alone.
    """
    first = next((d for d, extent in enumerate(shape) if extent != 1), 0)
    return all(sizes[d] == extent for _, sizes in boxes for d, extent in enumerate(shape) if d != first) and all(
        a[0] <= b[0] for a, b in zip(boxes, boxes[1:])
    )
