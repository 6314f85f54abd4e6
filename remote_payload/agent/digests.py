"""Digests of whole files, remembered by how the file stood."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import Any, Callable, Optional

from remote_payload.agent import files
from remote_payload.agent.verified import FileState, state_of
from remote_payload.wire.chunks import digest_file
from remote_payload.wire.codec import WireError
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.names import check_file_digest

_MAX_REMEMBERED = 2000
_SETTLED_S = 3.0
_SCHEMA = 3
"""Counts up when files are cut into other chunks, which gives them other digests, and when more is remembered."""


class OutOfTimeError(Exception):
    """The file could not be read to its end in time."""


def state_of_file(path: str) -> FileState:
    """The file as it stands. Raises `OSError`, or `ValueError` for what is no regular file."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path} is no regular file")
    return state_of(facts)


class DigestCache:
    """`digests.json` under the root. Losing it costs time, never correctness, so a damaged one counts as empty."""

    def __init__(self, layout: NodeLayout) -> None:
        self._path = layout.digest_cache

    def get(self, path: str, state: FileState) -> Optional[str]:
        entry = self._read().get(path)
        if not isinstance(entry, dict) or entry.get("state") != list(state):
            return None
        try:
            return check_file_digest(str(entry.get("digest")))
        except WireError:
            return None

    def put(self, path: str, state: FileState, digest: str) -> None:
        """Remember a digest, unless the file is so young that a change might keep the same time stamp."""
        if time.time() - max(state.mtime_ns, state.ctime_ns) / 1e9 < _SETTLED_S:
            return
        entries = self._read()
        entries.pop(path, None)
        entries[path] = {"state": list(state), "digest": digest}
        for oldest in list(entries)[: max(0, len(entries) - _MAX_REMEMBERED)]:
            del entries[oldest]
        with contextlib.suppress(OSError):
            files.replace(self._path, files.json_bytes({"schema": _SCHEMA, "order": list(entries), "files": entries}))

    def _read(self) -> dict[str, Any]:
        try:
            value = files.read_json(self._path)
        except (OSError, ValueError):
            return {}
        entries = value.get("files") if isinstance(value, dict) and value.get("schema") == _SCHEMA else None
        if not isinstance(entries, dict):
            return {}
        order = value.get("order")
        known = [path for path in order if isinstance(path, str) and path in entries] if isinstance(order, list) else []
        return {path: entries[path] for path in known}


def digest_of(path: str, cache: DigestCache, go_on: Callable[[], bool]) -> tuple[FileState, str]:
    """How the file stands, and its digest, from the cache or by reading it once.

    Raises `OutOfTimeError` when `go_on` says no, `EOFError` or `ValueError` when the file changed meanwhile, `OSError`.
    """
    before = state_of_file(path)
    known = cache.get(path, before)
    if known is not None:
        return before, known

    def check_time(_count: int) -> None:
        if not go_on():
            raise OutOfTimeError(path)

    with open(path, "rb") as file:
        if state_of(os.fstat(file.fileno())) != before:
            raise ValueError(f"{path} changed while it was opened")
        digest = digest_file(file, before.size, check_time).digest
    if state_of_file(path) != before:
        raise ValueError(f"{path} changed while it was read")
    cache.put(path, before, digest)
    return before, digest
