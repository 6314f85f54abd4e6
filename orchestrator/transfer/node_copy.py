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
from orchestrator.transfer.progress import ProgressListener
from orchestrator.transfer.sender import LocalFileChangedError
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import UploadResult, upload_file
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.messages import FileList, ListedFile, ListRequest
from remote_payload.wire.names import printable
from remote_payload.wire.stream import MAX_DATA_BYTES, RAW_ENCODING, FrameKind, SendRequest, SpanEnd, SpanFacts, Want

LIST_TIMEOUT_S = 60.0
DIGEST_TIMEOUT_S = 900.0
"""A file is read in full on its node before its chunks are known."""


@dataclasses.dataclass(frozen=True)
class DescribedFile:
    """A file on a node, absolute `path`, as it was `listed` and then read."""

    path: str
    listed: ListedFile
    manifest: ChunkManifest


def describe_file(node: Node, path: str) -> DescribedFile:
    """Ask `node` for the chunks of the file at `path`. Raises `CheckpointError` for a folder, and what `Node.call`
    does."""
    request = ListRequest(node.layout.root, path)
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
    on_progress: ProgressListener | None = None,
    retry: ReconnectPolicy | None = None,
) -> UploadResult:
    """Put the file that was `described` on `source` into `target`'s store. Raises as `upload_file`, for either node."""
    file = NodeFile(source, described.path, described.listed, retry or ReconnectPolicy())
    return upload_file(
        target,
        file,
        described.manifest,
        streams=streams,
        bandwidth_limit_bytes_per_s=bandwidth_limit_bytes_per_s,
        on_progress=on_progress,
        retry=retry,
        # Whole chunks are asked for at once: each asking is a round trip to the first node.
        encode=lambda data: (RAW_ENCODING, data),
    )


@dataclasses.dataclass(frozen=True)
class _Line:
    stream: ByteStream
    channel: FrameChannel


class NodeFile:
    """A file of a node as a `Source`. Every thread that reads has a stream of its own while it does."""

    def __init__(self, opener: StreamOpener, path: str, listed: ListedFile, retry: ReconnectPolicy) -> None:
        self._opener = opener
        self._path = path
        self._listed = listed
        self._retry = retry
        self._lock = threading.Lock()
        self._reconnecting = threading.Lock()
        self._idle: list[_Line] = []
        self._is_closed = False

    def send(self, channel: FrameChannel, offset: int, count: int) -> int:
        data = self.read(offset, min(count, MAX_DATA_BYTES))
        channel.send_data(data)
        return len(data)

    def read(self, offset: int, count: int) -> bytes:
        """Raises `IntegrityError` where the file has changed, and the `UnreachableError` family."""
        fruitless = 0
        while True:
            try:
                return self._read_once(offset, count)
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
            line.stream.close()

    def _read_once(self, offset: int, count: int) -> bytes:
        line = self._take()
        try:
            data = self._ask(line.channel, offset, count)
        except BaseException:
            line.stream.close()
            raise
        with self._lock:
            if not self._is_closed:
                self._idle.append(line)
                return data
        line.stream.close()
        return data

    def _take(self) -> _Line:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        request = SendRequest(self._opener.layout.root, IDLE_TIMEOUT_S * 10)
        stream = self._opener.open_agent_stream("send", request, expected_bytes=self._listed.size)
        return _Line(stream, FrameChannel(stream))

    def _ask(self, channel: FrameChannel, offset: int, count: int) -> bytes:
        channel.send_json(FrameKind.WANT, Want(self._path, offset, count))
        facts = channel.decode(SpanFacts, channel.receive(FrameKind.SPAN)[1])
        listed = self._listed
        if (facts.size, facts.mtime_ns, facts.inode) != (listed.size, listed.mtime_ns, listed.inode):
            raise self.changed()
        if (facts.offset, facts.length) != (offset, count):
            raise IntegrityError("the node sends another span than was asked for")
        data = memoryview(bytearray(count))
        taken = 0
        while taken < count:
            header, _ = channel.receive(FrameKind.DATA)
            if header.argument != offset + taken or not 0 < header.length <= count - taken:
                raise StreamDamagedError("data that was not asked for arrived")
            channel.read_data(data[taken : taken + header.length])
            taken += header.length
        if channel.decode(SpanEnd, channel.receive(FrameKind.END)[1]).sha256 != hashlib.sha256(data).hexdigest():
            raise StreamDamagedError("a span arrived damaged")
        return bytes(data)
