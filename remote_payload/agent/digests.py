"""Digests of whole files, remembered by fingerprint."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import time
from typing import Any, Callable, Optional

from remote_payload.agent import files
from remote_payload.wire.chunks import Fingerprint, digest_file
from remote_payload.wire.codec import WireError, to_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.names import check_file_digest

_MAX_REMEMBERED = 2000
_SETTLED_S = 3.0
_SCHEMA = 2
"""Counts up when files are cut into other chunks, which gives them other digests."""


class OutOfTimeError(Exception):
    """The file could not be read to its end in time."""


def fingerprint(path: str) -> Fingerprint:
    """The file as it stands. Raises `OSError`, or `ValueError` for what is no regular file."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path} is no regular file")
    return Fingerprint(path, facts.st_size, facts.st_mtime_ns, facts.st_ino)


class DigestCache:
    """`digests.json` under the root. Losing it costs time, never correctness, so a damaged one counts as empty."""

    def __init__(self, layout: NodeLayout) -> None:
        self._path = layout.digest_cache

    def get(self, wanted: Fingerprint) -> Optional[str]:
        entry = self._read().get(wanted.path)
        if not isinstance(entry, dict) or entry.get("fingerprint") != to_json(wanted):
            return None
        try:
            return check_file_digest(str(entry.get("digest")))
        except WireError:
            return None

    def put(self, known: Fingerprint, digest: str) -> None:
        """Remember a digest, unless the file is so young that a change might keep the same time stamp."""
        if time.time() - known.mtime_ns / 1e9 < _SETTLED_S:
            return
        entries = self._read()
        entries.pop(known.path, None)
        entries[known.path] = {"fingerprint": to_json(known), "digest": digest}
        for path in list(entries)[: max(0, len(entries) - _MAX_REMEMBERED)]:
            del entries[path]
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


def digest_of(path: str, cache: DigestCache, go_on: Callable[[], bool]) -> tuple[Fingerprint, str]:
    """The file's digest, from the cache or by reading it once.

    Raises `OutOfTimeError` when `go_on` says no, `EOFError` or `ValueError` when the file changed meanwhile, `OSError`.
    """
    before = fingerprint(path)
    known = cache.get(before)
    if known is not None:
        return before, known

    def check_time(_count: int) -> None:
        if not go_on():
            raise OutOfTimeError(path)

    with open(path, "rb") as file:
        opened = os.fstat(file.fileno())
        if (opened.st_size, opened.st_mtime_ns, opened.st_ino) != dataclasses.astuple(before)[1:]:
            raise ValueError(f"{path} changed while it was opened")
        digest = digest_file(file, before.size, check_time).digest
    if fingerprint(path) != before:
        raise ValueError(f"{path} changed while it was read")
    cache.put(before, digest)
    return before, digest
