"""Waiting for the rest of a checkpoint that is still being sent when an attempt begins."""

from __future__ import annotations

import os
import time
from typing import Callable, Optional

from remote_payload.wire.layout import part_of
from remote_payload.wire.units import human_bytes

REST_LIMIT_S = 1800.0
"""A client that was cut off has so long to come back with `resume`."""
_POLL_S = 0.5


class RestNeverCameError(Exception):
    """The client that was to send the rest of the checkpoint is gone."""


class Rest:
    """What is still to come of the checkpoint at `path`, while it is on its way.

    `tell` hears at each look how many seconds it has been, and in words what is there, with what stands in `beside`.
    """

    def __init__(self, path: str, tell: Callable[[int, str], None], limit_s: float = REST_LIMIT_S) -> None:
        self._path, self._tell, self._limit_s = path, tell, limit_s
        self._names = part_of(path)
        self._began = self._grown_at = time.monotonic()
        self._written_at: Optional[int] = None
        self.beside = ""

    def is_awaited(self) -> bool:
        """Whether a part is kept of a file that does not stand. Raises `RestNeverCameError` when nothing has arrived
        for the limit."""
        # The file takes its part's place in one step, and a part that goes otherwise does not come back.
        if self._names is None or os.path.exists(self._path):
            return False
        try:
            facts = os.stat(self._names[0])
        except FileNotFoundError:
            return False
        now = time.monotonic()
        if facts.st_mtime_ns != self._written_at:
            self._written_at, self._grown_at = facts.st_mtime_ns, now
        shares = f"{human_bytes(min(facts.st_blocks * 512, facts.st_size))} of {human_bytes(facts.st_size)}"
        if now - self._grown_at > self._limit_s:
            raise RestNeverCameError(
                f"the rest of the checkpoint never came: {shares} are there, and nothing more for {self._limit_s:.0f} s"
            )
        self._tell(int(now - self._began), f"waiting for the rest of the checkpoint: {shares} are there{self.beside}")
        return True

    def await_more(self) -> bool:
        """`is_awaited`, and if so a moment for more to come."""
        is_awaited = self.is_awaited()
        if is_awaited:
            time.sleep(_POLL_S)
        return is_awaited

    def wait(self) -> None:
        """Return once the file stands, or no part of it is kept: then there is nothing to wait for. Raises
        `RestNeverCameError`."""
        while self.await_more():
            pass
