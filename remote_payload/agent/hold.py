"""Taking hold of the part that a stream of `receive` writes to, with room for the rest and what the node has of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import Callable, Optional

from remote_payload.agent import drafts, locks, partial_file, store
from remote_payload.agent.channel import FdChannel
from remote_payload.agent.failure import AgentError
from remote_payload.agent.locks import SessionLock
from remote_payload.agent.partial_file import PartialFile
from remote_payload.agent.reuse import reuse_chunks
from remote_payload.agent.room import make_room
from remote_payload.agent.stored_chunks import StoredChunks
from remote_payload.wire.chunk_table import ChunkTable
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import DamagedStreamError, FrameKind, ReceiveRequest, ReusedFacts, WaitingFacts

_LOCK_POLL_S = 0.25
_WAITING_INTERVAL_S = 2.0


@dataclasses.dataclass(frozen=True)
class _Hold:
    """The part to write to; None where the file stands."""

    part: Optional[PartialFile]


def take_hold(
    channel: FdChannel, layout: NodeLayout, request: ReceiveRequest, table: ChunkTable, lock: SessionLock
) -> Optional[PartialFile]:
    """The part to write to, or None where the file is finished. Stands by while another session is at it.

    Raises `AgentError` conflict when that session has not got on for `wait_s`.
    """
    seen, got_on_at, told_at = (0, 0), time.monotonic(), 0.0
    while True:
        with contextlib.suppress(FileNotFoundError):  # finished, or deleted, between two looks: look again
            held = _try_hold(channel, layout, request, table, lock)
            if held is not None:
                return held.part
            if _is_finished(layout, request):
                return None
        state = partial_file.journal_state(layout, request.digest)
        now = time.monotonic()
        if state != seen:
            seen, got_on_at = state, now
        if now - got_on_at > request.wait_s:
            raise AgentError(
                "conflict",
                "another upload of the same file holds it on the node and does not get on",
                "Wait for it or end it, then run this again: what has arrived is kept.",
            )
        if now - told_at > _WAITING_INTERVAL_S:
            told_at = now
            channel.send_json(FrameKind.WAITING, WaitingFacts(state[0]))
        if channel.wait_readable(_LOCK_POLL_S):
            channel.fill(memoryview(bytearray(1)))
            raise DamagedStreamError("the client spoke out of turn")


def _try_hold(
    channel: FdChannel, layout: NodeLayout, request: ReceiveRequest, table: ChunkTable, lock: SessionLock
) -> Optional[_Hold]:
    """None where somebody else is at it."""
    digest = request.digest
    if not lock.try_exclusive():
        return _Hold(PartialFile.joined(layout, digest, table)) if lock.try_shared() else None
    is_there = partial_file.is_stored(layout, digest, request.size)
    is_stored = is_there and (request.is_draft or _is_true(channel, layout, request, table))
    if request.adopts:
        drafts.adopt(layout, request.adopts, None if is_stored else digest, request.session)
    if is_stored:
        _clean_up(layout, digest)
        store.note_use(layout, digest, request.run_id)
        return _Hold(None)
    if is_there:
        channel.send_json(FrameKind.REUSED, ReusedFacts(0, was_changed=True))
    # What could not be adopted is not needed any more once the upload proper has what it holds.
    left_over = request.adopts if not request.is_draft else ""
    try:
        part = _prepare(channel, layout, request, table)
    except AgentError as error:
        # A draft beside the part takes room that the part may need, and so does a stored copy that was changed.
        if error.failure.kind != "no_space":
            raise
        is_freed = bool(left_over) and drafts.discard(layout, left_over, request.session)
        is_freed = (is_there and _drop_changed(layout, digest)) or is_freed
        if not is_freed:
            raise
        part = _prepare(channel, layout, request, table)
    if left_over:
        drafts.discard(layout, left_over, request.session)
    # Changing the lock's kind lets go of it for a moment: whoever took it meanwhile goes first.
    if lock.try_shared():
        return _Hold(part)
    part.close()
    return None


def _prepare(channel: FdChannel, layout: NodeLayout, request: ReceiveRequest, table: ChunkTable) -> PartialFile:
    """The part, with room for the rest of it and what other files here hold of it. Gives signs of life meanwhile."""
    digest, limit = request.digest, request.store_limit_bytes
    tell = _telling(channel, layout, digest)
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


def _telling(
    channel: FdChannel, layout: NodeLayout, digest: str, before: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """What gives signs of life when it is called, every other second, each time after `before`."""
    told_at = time.monotonic()

    def tell() -> None:
        nonlocal told_at
        if time.monotonic() - told_at > _WAITING_INTERVAL_S:
            told_at = time.monotonic()
            before()
            channel.send_json(FrameKind.WAITING, WaitingFacts(partial_file.journal_state(layout, digest)[0]))

    return tell


def _show_life(path: str) -> None:
    """Have whoever waits for the journal to grow see that somebody is at the file, who has nothing to journal yet."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\n")
        finally:
            os.close(fd)


def _is_finished(layout: NodeLayout, request: ReceiveRequest) -> bool:
    """Whether another session has finished the file. A draft has nothing to add to one that stands, whatever it is."""
    is_there = partial_file.is_stored(layout, request.digest, request.size)
    return is_there and (request.is_draft or StoredChunks(layout, request.digest).is_believed)


def _is_true(channel: FdChannel, layout: NodeLayout, request: ReceiveRequest, table: ChunkTable) -> bool:
    """Whether the stored file is what its digest says, by reading it in full where it is not believed."""
    digest = request.digest
    if StoredChunks(layout, digest).is_believed:
        return True
    if os.path.lexists(layout.checkpoint_part(digest)):
        return False  # it was not when that was begun
    with contextlib.suppress(OSError):  # one that cannot be written lets nothing be believed
        partial_file.write_manifest(layout, digest, table)
    stored = StoredChunks(layout, digest)
    if stored.is_believed:
        return True
    if not stored.verify(_telling(channel, layout, digest, lambda: _show_life(layout.checkpoint_journal(digest)))):
        return False
    channel.send_json(FrameKind.REUSED, ReusedFacts(request.size, was_read=True))
    return True


def _drop_changed(layout: NodeLayout, digest: str) -> bool:
    """Delete the stored copy that is to be replaced, unless a run under way reads it."""
    from remote_payload.agent import needs  # not cheap to import, and of use only here

    if layout.checkpoint_folder(digest) in needs.by_folder(layout):
        return False
    partial_file.remove_if_there(layout.checkpoint(digest))
    return True


def _clean_up(layout: NodeLayout, digest: str) -> None:
    """What a crash just after the final rename left undone."""
    partial_file.remove_if_there(layout.checkpoint_journal(digest))
    partial_file.remove_if_there(layout.checkpoint_readable(digest))
    partial_file.remove_if_there(layout.checkpoint_part(digest))
