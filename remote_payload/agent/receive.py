"""The stream verb `receive`: chunks of a file into the store, each verified before it is written."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Sequence
from typing import Callable, Optional

from remote_payload.agent import drafts, root, store
from remote_payload.agent.background import Background
from remote_payload.agent.channel import FdChannel, PeerGoneError
from remote_payload.agent.failure import AgentError
from remote_payload.agent.hold import take_hold
from remote_payload.agent.locks import SessionLock
from remote_payload.agent.partial_file import PartialFile
from remote_payload.agent.reuse import copied_chunks
from remote_payload.wire.chunk_table import (
    MAX_CHUNKS,
    ChunkTable,
    DraftTable,
    decode_bitmap,
    encode_bitmap,
    page_chunk_count,
)
from remote_payload.wire.chunks import CHUNK_BYTES
from remote_payload.wire.codec import WireError
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.names import check_file_digest
from remote_payload.wire.packing import unpack
from remote_payload.wire.processors import usable_processors
from remote_payload.wire.stream import (
    PACKED_ENCODING,
    DamagedStreamError,
    FinishedFacts,
    FrameHeader,
    FrameKind,
    FrameReader,
    KeptFacts,
    LeftFacts,
    ReceiveRequest,
)

MAX_REFUSALS = 64
ALIVE_INTERVAL_S = 5.0
_OF_A_FILE = (FrameKind.FINISH, FrameKind.KEEP, FrameKind.LEAVE)
_OF_A_DRAFT = (FrameKind.DIGEST, FrameKind.COPY, FrameKind.ALIVE, FrameKind.LEAVE)
_BEHIND_POLL_S = 0.01


def serve_receive(channel: FdChannel, request: ReceiveRequest) -> None:
    """Receive the file of `request` until the client is done with it, or gone.

    However it ends, what was acknowledged is durable and journalled first, unless the disk refuses. Raises
    `AgentError`, `WireError`, `PeerGoneError`, `OSError`.
    """
    channel.idle_s = request.idle_s
    layout = root.open_root(request.root)
    reader = FrameReader(channel.fill)
    table = _read_table(reader, request)
    lock = SessionLock(layout.checkpoint_lock(request.digest), request.session)
    try:
        part = take_hold(channel, layout, request, table, lock)
        if part is None:
            channel.send_json(FrameKind.FINISHED, _finished(layout, request))
            return
        try:
            receiver = _Receiver(channel, reader, layout, request, table, part)
            receiver.run()
            bytes_here = part.bytes_here
        finally:
            channel.on_quiet = lambda: None
            part.close()
    finally:
        lock.close()
    if receiver.is_given_up:
        drafts.discard(layout, request.digest, request.session)
    if receiver.was_left:
        channel.send_json(FrameKind.LEFT, LeftFacts(bytes_here, receiver.bytes_reused))


class _Receiver:
    """The protocol behind HAVE, for one stream."""

    def __init__(
        self,
        channel: FdChannel,
        reader: FrameReader,
        layout: NodeLayout,
        request: ReceiveRequest,
        table: ChunkTable,
        part: PartialFile,
    ) -> None:
        self._channel = channel
        self._reader = reader
        self._layout = layout
        self._request = request
        self._table = table
        self._part = part
        self._buffer = memoryview(bytearray(min(CHUNK_BYTES, request.size)))
        self._unpacking = Background()
        self._copier: Optional[drafts.Copier] = None
        self._packed = memoryview(bytearray())
        self._unpacked = bytearray()
        self._settling = threading.RLock()
        self._taken_bytes = 0
        self._refusals = 0
        self._spoke_at = time.monotonic()
        self.bytes_reused = 0
        self.was_left = False
        self.is_given_up = False

    def run(self) -> None:
        self._channel.on_quiet = self._sync_while_quiet
        self._send_have()
        try:
            try:
                while not self._serve_frame():
                    with self._settling:
                        self._part.sync_if_due()
            finally:
                self._stop_copying()
                self._unpacking.wait()
        except (PeerGoneError, DamagedStreamError):
            self._part.sync()
            raise
        except AgentError:
            with contextlib.suppress(AgentError, OSError):
                self._part.sync()
            raise

    def _serve_frame(self) -> bool:
        """Serve one frame; True once the file is finished, or the client has left."""
        header = self._reader.header()
        if header.kind is FrameKind.DATA:
            self._take_chunk(header)
            return False
        draft = self._table if isinstance(self._table, DraftTable) else None
        if header.kind not in (_OF_A_FILE if draft is None else _OF_A_DRAFT):
            raise DamagedStreamError(f"a {header.kind.name} frame arrived out of turn")
        body = self._reader.body(header)
        if header.kind is FrameKind.LEAVE:
            self._unpacking.wait()
            self._stop_copying()
            self._part.sync()
            self.was_left, self.is_given_up = True, draft is not None and header.argument == 1
            return True
        if draft is not None:
            self._serve_draft(draft, header, body)
            return False
        self._unpacking.wait()
        if self._part.finish():
            store.note_use(self._layout, self._request.digest, self._request.run_id)
            self._channel.send_json(FrameKind.FINISHED, _finished(self._layout, self._request))
            return True
        if header.kind is FrameKind.KEEP and self._part.keep(decode_bitmap(body, len(self._table))):
            path = self._layout.checkpoint(self._request.digest)
            kept = KeptFacts(path, self._request.digest, self._request.size, self._part.bytes_here)
            self._channel.send_json(FrameKind.KEPT, kept)
            return True
        self._send_have()
        return False

    def _serve_draft(self, table: DraftTable, header: FrameHeader, body: bytes) -> None:
        if header.kind is FrameKind.ALIVE:
            self._say(FrameKind.ALIVE, self._taken_bytes)
            return
        if header.argument >= len(table) or len(body) != hashlib.sha256().digest_size:
            raise DamagedStreamError(f"a digest of {len(body)} bytes of chunk {header.argument} is not for the table")
        table.set_sha256(header.argument, body)
        if header.kind is FrameKind.COPY:
            if self._copier is None:
                self._copier = drafts.Copier(self._copy_chunks, lambda count: self._say(FrameKind.COPIED, count))
            self._copier.copy(header.argument)

    def _copy_chunks(self, indices: Sequence[int], go_on: Callable[[], bool]) -> None:
        """Runs beside everything else, with one processor less than there are."""
        with self._settling:
            self._part.reload()  # an earlier stream may have brought some of them
        threads = max(1, usable_processors() - 1)
        digest = self._request.digest
        copied = copied_chunks(self._layout, digest, self._table, self._part, indices, threads, go_on)
        with contextlib.closing(copied):
            for index in copied:
                with self._settling:
                    if index is not None:
                        self._part.note(index)
                        self.bytes_reused += self._table.length(index)
                    self._part.sync_if_due(may_wait=False)
                    self._say_alive()
                while self._part.is_behind and go_on():
                    time.sleep(_BEHIND_POLL_S)
                    with self._settling:
                        self._part.sync_if_due(may_wait=False)

    def _stop_copying(self) -> None:
        if self._copier is not None:
            self._copier.stop()

    def _take_chunk(self, header: FrameHeader) -> None:
        index = header.argument
        length = self._table.length(index) if index < len(self._table) else 0
        is_packed = header.encoding == PACKED_ENCODING
        if not (0 < header.length < length if is_packed else 0 < header.length == length):
            raise DamagedStreamError(f"a chunk numbered {index} of {header.length} bytes is not in the table")
        view = self._buffer[: header.length]
        if is_packed:
            self._read(view, None)
            self._unpacking.start(lambda: self._unpack(index, view, length))
            self._buffer, self._packed = self._packed or memoryview(bytearray(len(self._buffer))), self._buffer
        else:
            hasher = hashlib.sha256()
            self._read(view, hasher)
            self._settle(index, view, hasher.digest())

    def _unpack(self, index: int, body: memoryview, length: int) -> None:
        """Runs beside the reading of the next chunk: a stream that nobody reads is full in no time."""
        if not self._unpacked:
            self._unpacked = bytearray(len(self._buffer))
        try:
            data = unpack(body, length, self._unpacked)
        except WireError:
            self._settle(index, body, b"")
        else:
            self._settle(index, data, hashlib.sha256(data).digest())

    def _settle(self, index: int, data: memoryview, digest: bytes) -> None:
        """Write the chunk and acknowledge it, or refuse it."""
        with self._settling:
            if digest == self._table.sha256(index):
                self._part.write(index, data)
                self._say(FrameKind.ACK, index)
                return
            self._refusals += 1
            if self._refusals > MAX_REFUSALS:
                raise AgentError(
                    "integrity",
                    f"{self._refusals} chunks arrived damaged",
                    "Check that the checkpoint is not being written to, then the network.",
                )
            self._say(FrameKind.REFUSED, index)

    def _sync_while_quiet(self) -> None:
        # What went wrong there would else be told with the next chunk, for which the client may not have room.
        self._unpacking.wait()
        with self._settling:
            self._part.sync_while_quiet()

    def _read(self, view: memoryview, hasher: Optional[hashlib._Hash]) -> None:
        """Fill `view`, and give what arrives to the hasher meanwhile."""
        while view:
            count = self._channel.read_some(view)
            if hasher is not None:
                hasher.update(view[:count])
            view = view[count:]
            self._taken_bytes += count
            if self._say_alive():
                self._part.touch()

    def _say_alive(self) -> bool:
        """Whether it was time to."""
        is_due = time.monotonic() - self._spoke_at > ALIVE_INTERVAL_S
        if is_due:
            self._say(FrameKind.ALIVE, self._taken_bytes)
        return is_due

    def _send_have(self) -> None:
        self._say(FrameKind.HAVE, len(self._table), encode_bitmap(self._part.have))

    def _say(self, kind: FrameKind, argument: int, body: bytes = b"") -> None:
        with self._settling:
            self._channel.send_frame(kind, argument, body)
            self._spoke_at = time.monotonic()


def _read_table(reader: FrameReader, request: ReceiveRequest) -> ChunkTable:
    check_file_digest(request.digest)
    if not 0 <= request.chunk_count <= MAX_CHUNKS:
        raise AgentError("usage", f"a file of {request.chunk_count} chunks is too large: {MAX_CHUNKS} are the limit")
    packed, count = bytearray(), 0
    while count < request.chunk_count:
        header = reader.header()
        if header.kind is not FrameKind.MANIFEST or header.argument != count:
            raise DamagedStreamError(f"a {header.kind.name} frame arrived instead of the chunk table")
        page = reader.body(header)
        count += page_chunk_count(page)
        packed += page
    if count != request.chunk_count:
        raise DamagedStreamError("the chunk table is longer than was said")
    if request.is_draft:
        return DraftTable(bytes(packed), request.size)
    table = ChunkTable(bytes(packed), request.size)
    if table.file_digest() != request.digest:
        raise AgentError("integrity", "the chunk table does not have the digest that was said")
    return table


def _finished(layout: NodeLayout, request: ReceiveRequest) -> FinishedFacts:
    return FinishedFacts(layout.checkpoint(request.digest), request.digest, request.size)
