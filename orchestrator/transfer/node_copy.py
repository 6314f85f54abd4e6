"""From one node's disk into another's store, through this machine's memory and never onto its disk.

The first node says what the chunks are, the second verifies each against that: digests go from end to end. What has
arrived is in the second node's journal, so a copy that was cut is gone on with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time

from orchestrator.errors import CheckpointError, ConnectionLostError, IntegrityError
from orchestrator.node import Node
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.channel import (
    IDLE_TIMEOUT_S,
    FrameChannel,
    ReconnectPolicy,
    StreamDamagedError,
    StreamEndedError,
    StreamOpener,
)
from orchestrator.transfer.packing import MIN_BYTES, PackingRates
from orchestrator.transfer.progress import ProgressListener
from orchestrator.transfer.sender import LocalFileChangedError
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import UploadResult, upload_file
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.messages import FileList, ListedFile, ListRequest
from remote_payload.wire.names import printable
from remote_payload.wire.stream import (
    MAX_DATA_BYTES,
    PACKED_ENCODING,
    RAW_ENCODING,
    FrameKind,
    SendRequest,
    SpanEnd,
    SpanFacts,
    Want,
)

LIST_TIMEOUT_S = 60.0
DIGEST_TIMEOUT_S = 900.0
"""A file is read in full on its node before its chunks are known."""
_SAVED_BY_PACKING = 0.3
"""Of floats, about. A stream packs, fetches and sends a chunk in turn: packing must save more time than it takes."""


@dataclasses.dataclass(frozen=True)
class DescribedFile:
    """A file on a node, absolute `path`, as it was `listed` and then read."""

    path: str
    listed: ListedFile
    manifest: ChunkManifest


def describe_file(node: Node, path: str) -> DescribedFile:
    """Ask `node` for the chunks of the file at `path`. Raises `CheckpointError` for a folder, and what `Node.call`
    does."""
    request = ListRequest(node.root, path)
    listed = node.call("list_files", request, FileList, timeout_s=LIST_TIMEOUT_S)
    if listed.is_folder or len(listed.files) != 1:
        raise CheckpointError(
            f"{printable(listed.path)} is a folder, and only single files are copied", action="Name one of its files."
        )
    manifest = node.call("chunk_manifest", request, ChunkManifest, timeout_s=DIGEST_TIMEOUT_S)
    return DescribedFile(listed.path, listed.files[0], manifest)


def copy_to_node(
    source: StreamOpener,
    described: DescribedFile,
    target: StreamOpener,
    *,
    streams: StreamPolicy | None = None,
    bandwidth_limit_bytes_per_s: float | None = None,
    packing: bool = True,
    on_progress: ProgressListener | None = None,
    retry: ReconnectPolicy | None = None,
    run_id: str = "",
    store_limit_bytes: int | None = None,
) -> UploadResult:
    """Put the file that was `described` on `source` into `target`'s store.

    `packing`: floats go in fewer bytes, packed by `source` and unpacked by `target`, where that saves time. Raises as
    `upload_file`, for either node.
    """
    rates = PackingRates()
    file = NodeFile(source, described.path, described.listed, retry or ReconnectPolicy(), rates, packing=packing)
    return upload_file(
        target,
        file,
        described.manifest,
        streams=streams,
        bandwidth_limit_bytes_per_s=bandwidth_limit_bytes_per_s,
        on_progress=on_progress,
        retry=retry,
        packing=False,
        rates=rates,
        run_id=run_id,
        store_limit_bytes=store_limit_bytes,
    )


@dataclasses.dataclass(frozen=True)
class _Line:
    stream: ByteStream
    channel: FrameChannel


class NodeFile:
    """A file of a node as a `Source`. Every thread that reads has a stream of its own while it does.

    `rates` are of the way from node to node as a whole; `packing`: where they say so, the node packs floats.
    """

    def __init__(
        self,
        opener: StreamOpener,
        path: str,
        listed: ListedFile,
        retry: ReconnectPolicy,
        rates: PackingRates,
        *,
        packing: bool,
    ) -> None:
        self._opener = opener
        self._path = path
        self._listed = listed
        self._retry = retry
        self._rates = rates
        self._packing = packing
        self._lock = threading.Lock()
        self._reconnecting = threading.Lock()
        self._idle: list[_Line] = []
        self._line_count = 0
        self._is_closed = False

    def send(self, channel: FrameChannel, offset: int, count: int) -> int:
        data = self.read(offset, min(count, MAX_DATA_BYTES))
        channel.send_data(data)
        return len(data)

    def read(self, offset: int, count: int) -> bytes:
        """Raises `IntegrityError` where the file has changed, and the `UnreachableError` family."""
        return self._read_stubbornly(Want(self._path, offset, count))[1]

    def body(self, offset: int, count: int, /) -> tuple[int, bytes]:
        """Whole chunks are asked for at once, each asking being a round trip; raises as `read`. A packed one goes on as
        it came: the target's digest is over what is in it."""
        packers = _SAVED_BY_PACKING * max(1, self._line_count)
        may_pack = self._packing and count >= MIN_BYTES and self._rates.pays(packers)
        if may_pack:
            self._rates.note_tried()
        return self._read_stubbornly(Want(self._path, offset, count, may_pack=may_pack))

    def _read_stubbornly(self, want: Want) -> tuple[int, bytes]:
        fruitless = 0
        while True:
            try:
                return self._read_once(want)
            except (ConnectionLostError, StreamDamagedError) as error:
                fruitless += 1
                if fruitless > self._retry.max_fruitless:
                    raise
                time.sleep(self._retry.wait_s(fruitless))
                if not isinstance(error, (StreamDamagedError, StreamEndedError)):
                    with self._reconnecting:
                        self._opener.reconnect()

    def changed(self) -> LocalFileChangedError:
        return LocalFileChangedError(
            f"{printable(self._path)} changed while it was copied", action="Copy it again when it is complete."
        )

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            lines, self._idle = self._idle, []
        for line in lines:
            self._end(line)

    def _read_once(self, want: Want) -> tuple[int, bytes]:
        line = self._take()
        try:
            answer = self._ask(line.channel, want)
        except BaseException:
            self._end(line)
            raise
        with self._lock:
            if not self._is_closed:
                self._idle.append(line)
                return answer
        self._end(line)
        return answer

    def _take(self) -> _Line:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        request = SendRequest(self._opener.layout.root, IDLE_TIMEOUT_S * 10)
        stream = self._opener.open_agent_stream("send", request, expected_bytes=self._listed.size)
        with self._lock:
            self._line_count += 1
        return _Line(stream, FrameChannel(stream))

    def _end(self, line: _Line) -> None:
        with self._lock:
            self._line_count -= 1
        line.stream.close()

    def _ask(self, channel: FrameChannel, want: Want) -> tuple[int, bytes]:
        """(encoding, body) of a span, checked unless it is packed."""
        channel.send_json(FrameKind.WANT, want)
        facts = channel.decode(SpanFacts, channel.receive(FrameKind.SPAN)[1])
        listed = self._listed
        if (facts.size, facts.mtime_ns, facts.inode) != (listed.size, listed.mtime_ns, listed.inode):
            raise self.changed()
        if (facts.offset, facts.length) != (want.offset, want.length):
            raise IntegrityError("the node sends another span than was asked for")
        data = memoryview(bytearray(want.length))
        taken, encoding = 0, RAW_ENCODING
        while taken < want.length and encoding == RAW_ENCODING:
            header, _ = channel.receive(FrameKind.DATA)
            if header.argument != want.offset + taken or not 0 < header.length <= want.length - taken:
                raise StreamDamagedError("data that was not asked for arrived")
            encoding = header.encoding
            if encoding == PACKED_ENCODING and not (want.may_pack and taken == 0 and header.length < want.length):
                raise StreamDamagedError("a packed span that was not asked for arrived")
            with self._rates.moving():
                channel.read_data(data[taken : taken + header.length])
            taken += header.length
        end = channel.decode(SpanEnd, channel.receive(FrameKind.END)[1])
        if encoding == PACKED_ENCODING:
            self._rates.note_packed(want.length, end.packing_s)
        elif end.sha256 != hashlib.sha256(data).hexdigest():
            raise StreamDamagedError("a span arrived damaged")
        return encoding, bytes(data[:taken])
