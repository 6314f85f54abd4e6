"""Which bytes of a file that has not arrived in full may be read.

Everywhere else a part has holes, and holes read as zeros: nobody reads a part but through this list.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import re
from collections.abc import Iterable

from remote_payload.wire.codec import WireError, from_json

_ADDED_LINE = re.compile(rb"(?m)^(\d{1,18}) (\d{1,18})\.$")


@dataclasses.dataclass(frozen=True)
class ReadableSpans:
    """Bytes of one part (`part_inode`, `size`) that were verified and are durable.

    `spans` are [begin, end), ascending, and do not touch each other. Nothing in them is ever written to again but the
    same bytes.
    """

    part_inode: int
    size: int
    spans: tuple[tuple[int, ...], ...]

    def hold(self, offset: int, length: int) -> bool:
        """Whether each of `length` bytes from `offset` may be read."""
        if length <= 0:
            return True
        at = bisect.bisect_right(self.spans, (offset, self.size + 1)) - 1
        return at >= 0 and offset + length <= self.spans[at][1]


@functools.lru_cache(maxsize=4)
def parse_readable(data: bytes) -> ReadableSpans:
    """The list as the agent wrote it and added to it. Remembered, since it is read again for every tensor.

    Raises `WireError`. A line that is being added counts for nothing until it is whole.
    """
    head, _, added = data.partition(b"\n")
    try:
        found = from_json(ReadableSpans, json.loads(head))
    except (ValueError, RecursionError) as error:
        raise WireError(f"the list of readable bytes is malformed: {error}") from None
    reached = -1
    for span in found.spans:
        if len(span) != 2 or not reached < span[0] < span[1] <= found.size:
            raise WireError(f"the list of readable bytes holds {list(span)[:3]} behind {reached}")
        reached = span[1]
    more = [(int(begin), int(end)) for begin, end in _ADDED_LINE.findall(added)]
    for begin, end in more:
        if not begin < end <= found.size:
            raise WireError(f"bytes {begin} to {end} were added to the list of readable ones of {found.size}")
    return dataclasses.replace(found, spans=tuple(merged_spans([*found.spans, *more]))) if more else found


def added_lines(spans: Iterable[tuple[int, int]]) -> bytes:
    """What is appended to the list for more bytes. What a crash left of a line in front swallows none of these."""
    return b"\n" + b"".join(b"%d %d.\n" % span for span in spans)


def merged_spans(spans: Iterable[tuple[int, ...]]) -> list[tuple[int, int]]:
    """The same bytes, from the first to behind the last each, in as few spans as there can be, ascending."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if begin >= end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
