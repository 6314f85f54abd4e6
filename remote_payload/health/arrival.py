"""The order of the pass over a file that is still being sent: its records are read as they become complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Callable, Optional

from remote_payload.checkpoint.errors import BytesNotSentError
from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.source import Source
from remote_payload.health.blocks import Unit


def as_they_arrive(
    header: CheckpointHeader, units: Iterable[Unit], source: Source, await_more: Callable[[], bool]
) -> Iterator[Optional[Unit]]:
    """Each unit once all of its bytes can be read, None whenever there is none; ends when the whole file stands.

    `await_more` returns in a moment, False where nothing more will come, and raises where nothing has come for too
    long. Raises `BytesNotSentError` where nothing more will come and bytes are missing.
    """
    left, may_more_come = list(units), True
    while left or not source.is_whole:
        source.look_again()
        waiting = []
        for unit in left:
            if all(source.holds(header.records[i].offset, header.records[i].size) for i in unit.records):
                yield unit
            else:
                waiting.append(unit)
        is_news, left = len(waiting) < len(left), waiting
        if is_news or source.is_whole:
            continue
        if not may_more_come:
            raise BytesNotSentError(f"{source.path} did not arrive in full, and what had arrived of it is gone")
        yield None
        may_more_come = await_more()
