"""Waiting for the rest of a checkpoint that is still being sent when an attempt begins."""

from __future__ import annotations

import os
import time
from typing import Callable

from remote_payload.wire.layout import part_of
from remote_payload.wire.units import human_bytes

REST_LIMIT_S = 1800.0
"""A client that was cut off has so long to come back with `resume`."""
_POLL_S = 1.0


class RestNeverCameError(Exception):
    """The client that was to send the rest of the checkpoint is gone."""


def await_rest(path: str, tell: Callable[[int, str], None], limit_s: float = REST_LIMIT_S) -> None:
    """Return once the file stands at `path`, or no part of it is kept: then there is nothing to wait for.

    `tell` hears how many seconds it has been, and what is there, in words. Raises `RestNeverCameError` when nothing has
    arrived for `limit_s`.
    """
    names = part_of(path)
    if names is None:
        return
    began = grown_at = time.monotonic()
    written_at = None
    # The file takes its part's place in one step, and a part that goes otherwise does not come back.
    while not os.path.exists(path):
        try:
            facts = os.stat(names[0])
        except FileNotFoundError:
            return
        now = time.monotonic()
        if facts.st_mtime_ns != written_at:
            written_at, grown_at = facts.st_mtime_ns, now
        shares = f"{human_bytes(min(facts.st_blocks * 512, facts.st_size))} of {human_bytes(facts.st_size)}"
        if now - grown_at > limit_s:
            raise RestNeverCameError(
                f"the rest of the checkpoint never came: {shares} are there, and nothing more for {limit_s:.0f} s"
            )
        tell(int(now - began), f"waiting for the rest of the checkpoint: {shares} are there")
        time.sleep(_POLL_S)
