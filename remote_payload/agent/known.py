"""Which chunks the node may have: a hint for a client that has not read its file to the end."""

from __future__ import annotations

import base64
import contextlib
import re
import time

from remote_payload.agent import files, locate, root, store
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import PREFIX_BYTES, KnownChunks, KnownRequest, LocateRequest

MAX_PREFIXES = 200_000
_MAX_LIST_BYTES = 32 * 1024 * 1024
_LOOK_S = 5.0
_IN_MANIFEST = re.compile(rb'"sha256": "([0-9a-f]{16})')
_IN_JOURNAL = re.compile(rb"(?m)^\d{1,7} ([0-9a-f]{16})\.$")


def known_chunks(request: KnownRequest) -> KnownChunks:
    """The beginnings of the digests of chunks in the store, whole files and parts, the latest used first."""
    layout = root.open_root(request.root)
    prefixes: set[bytes] = set()
    for stored in sorted(store.stored_files(layout), key=lambda file: file.last_used, reverse=True):
        for prefix in _prefixes_of(layout, stored.digest):
            if len(prefixes) >= MAX_PREFIXES:
                break
            prefixes.add(prefix)
    return KnownChunks(base64.b64encode(b"".join(sorted(prefixes))).decode(), _is_a_file_of_that_size_here(request))


def _prefixes_of(layout: NodeLayout, digest: str) -> list[bytes]:
    found: list[bytes] = []
    for path, pattern in (
        (layout.checkpoint_manifest(digest), _IN_MANIFEST),
        (layout.checkpoint_journal(digest), _IN_JOURNAL),
    ):
        with contextlib.suppress(OSError):
            text = files.read_up_to(path, _MAX_LIST_BYTES) or b""
            found.extend(bytes.fromhex(match.group(1).decode())[:PREFIX_BYTES] for match in pattern.finditer(text))
    return found


def _is_a_file_of_that_size_here(request: KnownRequest) -> bool:
    deadline = time.monotonic() + _LOOK_S
    wanted = LocateRequest(request.root, size=request.size, search_roots=request.search_roots)
    return next(locate.same_size_files(wanted, lambda: time.monotonic() < deadline), None) is not None
