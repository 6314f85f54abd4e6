"""Taking hold of the part that a stream of `receive` writes to, with room for the rest and what the node has of it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Optional

from remote_payload.agent import drafts, locks, partial_file, store
from remote_payload.agent.channel import FdChannel
from remote_payload.agent.failure import AgentError
from remote_payload.agent.locks import SessionLock
from remote_payload.agent.partial_file import PartialFile
from remote_payload.agent.reuse import reuse_chunks
from remote_payload.agent.room import make_room
from remote_payload.wire.chunk_table import ChunkTable
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import DamagedStreamError, FrameKind, ReceiveRequest, ReusedFacts, WaitingFacts

_LOCK_POLL_S = 0.25
_WAITING_INTERVAL_S = 2.0


def take_hold(
    channel: FdChannel, layout: NodeLayout, request: ReceiveRequest, table: ChunkTable, lock: SessionLock
) -> Optional[PartialFile]:
    """The part to write to, or None where the file is finished. Stands by while another session is at it.

    Raises `AgentError` conflict when that session has not got on for `wait_s`.
    """
    grown_to, grown_at, told_at = -1, time.monotonic(), 0.0
    while True:
        with contextlib.suppress(FileNotFoundError):  # finished, or deleted, between two looks: look again
            part = _try_hold(channel, layout, request, table, lock)
            if part is not None or partial_file.is_stored(layout, request.digest, request.size):
                return part
        journalled = partial_file.journal_bytes(layout, request.digest)
        now = time.monotonic()
        if journalled > grown_to:
            grown_to, grown_at = journalled, now
        if now - grown_at > request.wait_s:
            raise AgentError(
                "conflict",
                "another upload of the same file holds it on the node and does not get on",
                "Wait for it or end it, then run this again: what has arrived is kept.",
            )
        if now - told_at > _WAITING_INTERVAL_S:
            told_at = now
            channel.send_json(FrameKind.WAITING, WaitingFacts(journalled))
        if channel.wait_readable(_LOCK_POLL_S):
            channel.fill(memoryview(bytearray(1)))
            raise DamagedStreamError("the client spoke out of turn")


def _try_hold(
    channel: FdChannel, layout: NodeLayout, request: ReceiveRequest, table: ChunkTable, lock: SessionLock
) -> Optional[PartialFile]:
    digest = request.digest
    if not lock.try_exclusive():
        return PartialFile.joined(layout, digest, table) if lock.try_shared() else None
    is_stored = partial_file.is_stored(layout, digest, request.size)
    if request.adopts:
        drafts.adopt(layout, request.adopts, None if is_stored else digest, request.session)
    if is_stored:
        _clean_up(layout, digest, table)
        store.note_use(layout, digest, request.run_id)
        return None
    # What could not be adopted is not needed any more once the upload proper has what it holds.
    left_over = request.adopts if not request.is_draft else ""
    try:
        part = _prepare(channel, layout, request, table)
    except AgentError as error:
        # A draft beside the part takes room that the part may need.
        is_full = error.failure.kind == "no_space"
        if not (is_full and left_over and drafts.discard(layout, left_over, request.session)):
            raise
        part = _prepare(channel, layout, request, table)
    if left_over:
        drafts.discard(layout, left_over, request.session)
    # Changing the lock's kind lets go of it for a moment: whoever took it meanwhile goes first.
    if lock.try_shared():
        return part
    part.close()
    return None


def _prepare(channel: FdChannel, layout: NodeLayout, request: ReceiveRequest, table: ChunkTable) -> PartialFile:
    """The part, with room for the rest of it and what other files here hold of it. Gives signs of life meanwhile."""
    digest, limit = request.digest, request.store_limit_bytes
    told_at = time.monotonic()

    def tell() -> None:
        nonlocal told_at
        if time.monotonic() - told_at > _WAITING_INTERVAL_S:
            told_at = time.monotonic()
            channel.send_json(FrameKind.WAITING, WaitingFacts(partial_file.journal_bytes(layout, digest)))

    # Parts are made under this lock, so that nobody's space is given away twice.
    with locks.alone(layout.store_lock, "making room", tell):
        part = PartialFile.prepare(layout, digest, table)
        try:
            store.note_use(layout, digest, request.run_id)
            may_free = not request.is_draft
            make_room(layout, digest, table.size, part.to_come_bytes, limit, tell, may_free=may_free)
        except BaseException:
            part.close()
            raise
    if request.is_draft:
        return part
    try:
        bytes_reused = reuse_chunks(layout, digest, table, part, tell, request.adopts)
        if bytes_reused:
            channel.send_json(FrameKind.REUSED, ReusedFacts(bytes_reused))
    except BaseException:
        part.close()
        raise
    return part


def _clean_up(layout: NodeLayout, digest: str, table: ChunkTable) -> None:
    """What a crash just after the final rename left undone."""
    if not os.path.exists(layout.checkpoint_manifest(digest)):
        partial_file.write_manifest(layout, digest, table)
        os.utime(layout.checkpoint_manifest(digest), (0, 0))  # nobody knows whether the file was written to since
    partial_file.remove_if_there(layout.checkpoint_journal(digest))
    partial_file.remove_if_there(layout.checkpoint_readable(digest))
    partial_file.remove_if_there(layout.checkpoint_part(digest))
