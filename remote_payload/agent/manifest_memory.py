"""Chunk manifests of files that are not the store's: what was read in full once need not be read again.

One counts only while size, both time stamps and inode are what they were, and while a sample of the chunks still has
its digests. Losing any costs time, never correctness.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from typing import BinaryIO, Optional

from remote_payload.agent import files
from remote_payload.wire.chunks import CHUNK_BYTES, ChunkManifest, file_digest, sample_spans
from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.layout import NodeLayout

MIN_BYTES = CHUNK_BYTES
"""What is smaller is read sooner than looked up."""
MAX_REMEMBERED = 200
_SETTLED_S = 3.0
"""A younger file might change and keep its time stamps."""


class ManifestMemory:
    """What is remembered of one path."""

    def __init__(self, layout: NodeLayout, path: str) -> None:
        self._folder = layout.known_manifests
        self._path = layout.known_manifest(os.path.realpath(path))

    def recall(self, file: BinaryIO) -> Optional[ChunkManifest]:
        """The chunks of the open file, if it is the one that was read."""
        facts = os.fstat(file.fileno())
        if facts.st_size < MIN_BYTES:
            return None
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            value = files.read_json(self._path)
            if value["facts"] != _facts(facts):
                return None
            manifest = from_json(ChunkManifest, value["manifest"])
            is_whole = file_digest(manifest.chunks) == manifest.digest and manifest.size == facts.st_size
            if is_whole and _matches(file.fileno(), sample_spans(manifest)):
                os.utime(self._path)
                return manifest
        return None

    def remember(self, facts: os.stat_result, manifest: ChunkManifest, began: float) -> None:
        """For a file that had these facts before it was read, at `began`, and after."""
        if facts.st_size < MIN_BYTES or began - max(facts.st_mtime, facts.st_ctime) < _SETTLED_S:
            return
        with contextlib.suppress(OSError):
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            value = {"facts": _facts(facts), "manifest": to_json(manifest)}
            files.replace(self._path, files.json_bytes(value))
            known = sorted(os.scandir(self._folder), key=lambda entry: entry.stat().st_mtime)
            for entry in known[: max(0, len(known) - MAX_REMEMBERED)]:
                os.unlink(entry.path)


def _facts(facts: os.stat_result) -> list[int]:
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _matches(fd: int, sample: Sequence[tuple[int, int, str]]) -> bool:
    return all(hashlib.sha256(os.pread(fd, length, offset)).hexdigest() == sha256 for offset, length, sha256 in sample)
