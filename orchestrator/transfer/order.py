"""In which order a checkpoint's chunks go: what the header is read from, then the weights, then the rest.

Only bytes that are known to be those of another tensor than a weight, and that the header was read without, are
"rest". Whatever else a file holds counts as header: to send too much of it costs time, to send too little loses facts.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from remote_payload.wire.parts import merged_spans

Span = tuple[int, int]
"""From its first byte to behind its last."""


class ChunkClass(enum.IntEnum):
    """What a chunk holds, in the order in which chunks go."""

    HEADER = 0
    WEIGHTS = 1
    REST = 2


@dataclasses.dataclass(frozen=True)
class TensorBytes:
    """Where a file holds nothing but weights, and nothing but other tensors. Spans ascend and do not touch."""

    weights: tuple[Span, ...]
    rest: tuple[Span, ...]


def tensor_bytes(header: Mapping[str, Any], reads: Iterable[Sequence[int]]) -> TensorBytes:
    """Where the tensors of a single file are, from its header facts as JSON and the [offset, length] that they took."""
    taken = merged_spans((offset, offset + length) for offset, length in reads)
    placed = [tensor for tensor in header["tensors"] if tensor["file_offset"] is not None]
    weights = merged_spans(_span(tensor) for tensor in placed if tensor["section"] == "model")
    others = merged_spans(_span(tensor) for tensor in placed if tensor["section"] != "model")
    return TensorBytes(tuple(_without(weights, taken)), tuple(_without(others, merged_spans([*weights, *taken]))))


def classify(chunks: Iterable[tuple[int, int]], tensors: TensorBytes) -> list[ChunkClass]:
    """The class of each chunk, given as (offset, length): header where any of its bytes is, else weights where any of
    its bytes is one's."""
    known = merged_spans([*tensors.weights, *tensors.rest])
    classes = []
    for offset, length in chunks:
        span = (offset, offset + length)
        if not _covers(known, span):
            classes.append(ChunkClass.HEADER)
        else:
            classes.append(ChunkClass.REST if _covers(tensors.rest, span) else ChunkClass.WEIGHTS)
    return classes


def sending_order(classes: Sequence[ChunkClass]) -> list[int]:
    """Every chunk's index, class by class, within one as they stand in the file."""
    return sorted(range(len(classes)), key=classes.__getitem__)


def _span(tensor: Mapping[str, Any]) -> Span:
    return tensor["file_offset"], tensor["file_offset"] + tensor["span_bytes"]


def _without(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """What of `spans` is in none of `taken`; both merged."""
    left: list[Span] = []
    first = 0
    for begin, end in spans:
        while first < len(taken) and taken[first][1] <= begin:
            first += 1
        number = first
        while number < len(taken) and taken[number][0] < end:
            if begin < taken[number][0]:
                left.append((begin, taken[number][0]))
            begin = max(begin, taken[number][1])
            number += 1
        if begin < end:
            left.append((begin, end))
    return left


def _covers(merged: Sequence[Span], span: Span) -> bool:
    """Whether every byte of `span` is in one of `merged`."""
    at = bisect.bisect_right(merged, span[0], key=lambda known: known[0]) - 1
    return at >= 0 and span[1] <= merged[at][1]
