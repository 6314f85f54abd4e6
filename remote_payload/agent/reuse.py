"""Chunks that the node has already, in an earlier checkpoint of its store or elsewhere in the file that arrives.

Chunk manifests stand beside the stored files and say where to look. What is copied is verified by its SHA-256.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable
from typing import Callable, Optional

from remote_payload.agent import store
from remote_payload.agent.copying import Copying, Place
from remote_payload.agent.partial_file import PartialFile, journalled
from remote_payload.agent.stored_chunks import StoredChunks, manifest_lines
from remote_payload.wire.chunk_table import ChunkTable
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.processors import usable_processors

MAX_SOURCES = 64
"""So many checkpoints, the latest used first, are looked through."""
MAX_CANDIDATES = 3
"""How many places a chunk is tried from: a second one matters only where the first is damaged."""
_TELL_INTERVAL_S = 2.0


def reuse_chunks(
    layout: NodeLayout, digest: str, table: ChunkTable, part: PartialFile, tell: Callable[[], None], draft: str = ""
) -> int:
    """Copy into `part` every chunk that it lacks and that can be had here; how many bytes that were. `draft`: another
    part of the same file.

    `tell` is called every other second and oftener. Raises what `tell` raises and `AgentError` where the disk is full;
    what was copied until then is kept.
    """
    copied_bytes = 0
    try:
        copied = copied_chunks(layout, digest, table, part, range(len(table)), usable_processors(), draft=draft)
        with contextlib.closing(copied):
            for index in copied:
                if index is not None:
                    part.note(index)
                    copied_bytes += table.length(index)
                part.sync_if_due()
                tell()
    finally:
        part.sync()
    return copied_bytes


def copied_chunks(
    layout: NodeLayout,
    digest: str,
    table: ChunkTable,
    part: PartialFile,
    indices: Iterable[int],
    threads: int,
    go_on: Callable[[], bool] = lambda: True,
    draft: str = "",
) -> Generator[Optional[int], None, None]:
    """Copy into `part` those chunks of `indices` that it lacks and that can be had here: each once it stands there, yet
    to be noted, and None every other second without one. No chunk is begun once `go_on` says no. Raises `AgentError`
    where the disk is full."""
    wanted: dict[bytes, list[int]] = {}
    for index in indices:
        if not part.have[index]:
            wanted.setdefault(table.sha256(index), []).append(index)
    places = _places(layout, digest, table, part, wanted, draft) if wanted else {}
    work = [(index, places[sha256]) for sha256, same in wanted.items() if sha256 in places for index in same]
    if work:
        with part.fullness_explained():
            yield from Copying(table, part.fd, work).copied(threads, _TELL_INTERVAL_S, go_on)


def _places(
    layout: NodeLayout,
    digest: str,
    table: ChunkTable,
    part: PartialFile,
    wanted: dict[bytes, list[int]],
    draft: str,
) -> dict[bytes, list[Place]]:
    """Where the wanted chunks may be."""
    places: dict[bytes, list[Place]] = {}
    for index in journalled(layout, draft, table) if draft else ():
        if table.sha256(index) in wanted:
            places[table.sha256(index)] = [Place(layout.checkpoint_part(draft), table.offset(index))]
    for index, is_here in enumerate(part.have):
        if is_here and table.sha256(index) in wanted:
            places.setdefault(table.sha256(index), [Place(layout.checkpoint_part(digest), table.offset(index))])
    replaced = layout.checkpoint(digest)
    if os.path.lexists(replaced):
        # The stored copy was changed: most of its chunks may still stand.
        for sha256, indices in wanted.items():
            places.setdefault(sha256, []).append(Place(replaced, table.offset(indices[0])))
    lengths = {sha256: table.length(indices[0]) for sha256, indices in wanted.items()}
    for stored in _stored(layout):
        if stored == digest or all(len(places.get(sha256, ())) >= MAX_CANDIDATES for sha256 in wanted):
            continue
        manifest = manifest_lines(layout.checkpoint_manifest(stored))
        found = [(sha256, offset) for offset, length, sha256 in manifest if lengths.get(sha256) == length]
        holder = StoredChunks(layout, stored) if found else None
        for sha256, offset in found:
            known = places.setdefault(sha256, [])
            if holder is not None and len(known) < MAX_CANDIDATES:
                known.append(holder.place(offset))
    return places


def _stored(layout: NodeLayout) -> list[str]:
    """Digests of the checkpoints in the store, the latest used first."""
    latest_first = sorted(store.stored_files(layout), key=lambda file: file.last_used, reverse=True)
    return [file.digest for file in latest_first[:MAX_SOURCES]]
