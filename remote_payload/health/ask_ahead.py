"""Asks the disk for what the pass will want next, so that it never stands idle."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Optional

from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.source import Source
from remote_payload.health.blocks import ScanPlan, iter_blocks

ASKED_AHEAD_BYTES = 2 << 30
"""Beyond what was joined. It lies in the page cache, which is nobody's."""
_ASKED_AT_ONCE_BYTES = 16 << 20


class AskAhead:
    """A thread for the time of a context, in the order of the plan. Spans whose beginning is cached are passed over."""

    def __init__(self, header: CheckpointHeader, plan: ScanPlan, sources: Sequence[Source]) -> None:
        self._header, self._plan, self._sources = header, plan, sources
        self._changed = threading.Condition()
        self._joined = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="health-ahead", daemon=True)

    def joined(self, count: int) -> None:
        """The plan's first `count` bytes are done."""
        with self._changed:
            self._joined = count
            self._changed.notify()

    def __enter__(self) -> AskAhead:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        asked = 0
        for block in iter_blocks(self._header, self._plan, _ASKED_AT_ONCE_BYTES):
            with self._changed:
                while not self._is_over and asked - self._joined > ASKED_AHEAD_BYTES:
                    self._changed.wait()
                if self._is_over:
                    return
                is_late = asked + block.length <= self._joined
            asked += block.length
            for span in () if is_late else block.spans:
                source = self._sources[span.file]
                if span.length and not source.is_cached(span.offset):
                    source.ask_ahead(span.offset, span.length)
