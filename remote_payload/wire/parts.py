"""Which bytes of a file that has not arrived in full may be read.

Everywhere else a part has holes, and holes read as zeros: nobody reads a part but through this list.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json

from remote_payload.wire.codec import WireError, from_json


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
    """The list as the agent wrote it. Remembered, since it is read again for every tensor. Raises `WireError`."""
    try:
        found = from_json(ReadableSpans, json.loads(data))
    except (ValueError, RecursionError) as error:
        raise WireError(f"the list of readable bytes is malformed: {error}") from None
    reached = -1
    for span in found.spans:
        if len(span) != 2 or not reached < span[0] < span[1] <= found.size:
            raise WireError(f"the list of readable bytes holds {list(span)[:3]} behind {reached}")
        reached = span[1]
    return found
