"""In which order a checkpoint's chunks go: what the header is read from, then the weights, then the rest.

Only bytes that are known to be those of another tensor than a weight are "rest". Whatever else a file holds (a zip's
directory, its pickle and the gaps between records, a safetensors header, single numbers such as an optimizer's step,
which the header repeats) counts as header: to send too much of it costs time, to send too little would lose facts.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from remote_payload.wire.chunks import ChunkManifest

Span = tuple[int, int]
"""From its first byte to behind its last."""


class ChunkClass(enum.IntEnum):
    """What a chunk holds, in the order in which chunks go."""

    HEADER = 0
    WEIGHTS = 1
    REST = 2


@dataclasses.dataclass(frozen=True)
class TensorBytes:
    """Where a file holds weights, and where nothing but other tensors. Spans ascend and do not touch each other."""

    weights: tuple[Span, ...]
    rest: tuple[Span, ...]


def tensor_bytes(header: Mapping[str, Any]) -> TensorBytes:
    """The spans of a single file's tensors, from its header facts as JSON."""
    placed = [tensor for tensor in header["tensors"] if tensor["file_offset"] is not None]
    weights = _merged(_span(tensor) for tensor in placed if tensor["section"] == "model")
    single = [_span(tensor) for tensor in placed if tensor["numel"] == 1]
    others = _merged(_span(tensor) for tensor in placed if tensor["section"] != "model")
    return TensorBytes(tuple(weights), tuple(_without(others, _merged([*weights, *single]))))


def classify(manifest: ChunkManifest, tensors: TensorBytes) -> list[ChunkClass]:
    """The class of each chunk: header where any of its bytes is, else weights where any of its bytes is one's."""
    known = _merged([*tensors.weights, *tensors.rest])
    classes = []
    for chunk in manifest.chunks:
        span = (chunk.offset, chunk.offset + chunk.length)
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


def _merged(spans: Iterable[Span]) -> list[Span]:
    """The same bytes in as few spans as there can be, ascending."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif begin < end:
            merged.append((begin, end))
    return merged


def _without(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """What of `spans` is in none of `taken`; both merged."""
    left: list[Span] = []
    at = 0
    for begin, end in spans:
        while at < len(taken) and taken[at][1] <= begin:
            at += 1
        number = at
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
