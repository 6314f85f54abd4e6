"""Files of a node as a `Source`: read through streams of their own, spans at a time, and verified."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from orchestrator.errors import ConnectionLostError, IntegrityError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.channel import (
    IDLE_TIMEOUT_S,
    FrameChannel,
    ReconnectPolicy,
    StreamDamagedError,
    StreamEndedError,
    StreamOpener,
)
from orchestrator.transfer.source import LocalFileChangedError
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.forward import Fill
from remote_payload.wire.members import joined
from remote_payload.wire.messages import ListedFile
from remote_payload.wire.names import printable
from remote_payload.wire.packing_rates import MIN_BYTES, PackingRates
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

T = TypeVar("T")
_SAVED_BY_PACKING = 0.3
"""Of floats, about. A stream packs, fetches and sends a chunk in turn: packing must save more time than it takes."""
_SMALL_BYTES = 256 * 1024
_AHEAD_CHUNKS = 64
_AHEAD_BYTES = 4 * 1024 * 1024
"""Small chunks of many files are asked for together, up to so many: each asking is a round trip."""


@dataclasses.dataclass(frozen=True)
class DescribedFile:
    """A file on a node, absolute `path`, as it was `listed` and then read."""

    path: str
    listed: ListedFile
    manifest: ChunkManifest


@dataclasses.dataclass(frozen=True)
class _Line:
    stream: ByteStream
    channel: FrameChannel


class NodeFiles:
    """Files of a node, one behind the other. Every thread that reads has a stream of its own while it does.

    `rates` are of the way from node to node as a whole; `packing`: where they say so, the node packs floats.
    """

    def __init__(
        self,
        opener: StreamOpener,
        files: Sequence[DescribedFile],
        retry: ReconnectPolicy,
        rates: PackingRates,
        *,
        packing: bool,
    ) -> None:
        self._opener = opener
        self._files = [file for file in files if file.listed.size]
        self._starts = [0, *itertools.accumulate(file.listed.size for file in self._files)]
        self._chunks = joined(file.manifest for file in self._files).chunks
        self._chunk_starts = [chunk.offset for chunk in self._chunks]
        self._asking_ahead = threading.Lock()
        self._ahead: dict[int, bytes] = {}
        self._retry = retry
        self._rates = rates
        self._packing = packing
        self._lock = threading.Lock()
        self._reconnecting = threading.Lock()
        self._idle: list[_Line] = []
        self._line_count = 0
        self._is_closed = False

    def send(self, channel: FrameChannel, offset: int, count: int) -> int:
        if channel.is_filled_there:
            file, within = self._at(offset)
            listed = file.listed
            fill = Fill(file.path, within, count, listed.size, listed.mtime_ns, listed.inode)
            channel.send_json(FrameKind.FILL, fill)
            return count
        data = self.read(offset, min(count, MAX_DATA_BYTES))
        channel.send_data(data)
        return len(data)

    def read(self, offset: int, count: int) -> bytes:
        """Raises `IntegrityError` where the file has changed, and the `UnreachableError` family."""
        file, within = self._at(offset)
        return self._stubbornly(lambda line: self._ask(line.channel, file, Want(file.path, within, count)))[1]

    def body(self, offset: int, count: int, /) -> tuple[int, bytes]:
        """Whole chunks are asked for at once, each asking being a round trip; raises as `read`. A packed one goes on as
        it came: the target's digest is over what is in it."""
        if count < _SMALL_BYTES and len(self._files) > 1:
            return RAW_ENCODING, self._read_small(offset)
        packers = _SAVED_BY_PACKING * max(1, self._line_count)
        may_pack = self._packing and count >= MIN_BYTES and self._rates.pays(packers)
        if may_pack:
            self._rates.note_tried()
        file, within = self._at(offset)
        want = Want(file.path, within, count, may_pack=may_pack)
        return self._stubbornly(lambda line: self._ask(line.channel, file, want))

    def _read_small(self, offset: int) -> bytes:
        """A small chunk, from those that were asked for ahead or with those that follow it."""
        with self._asking_ahead:
            if offset not in self._ahead:
                self._ahead = self._stubbornly(lambda line: self._ask_ahead(line.channel, offset))
            return self._ahead.pop(offset)

    def _ask_ahead(self, channel: FrameChannel, offset: int) -> dict[int, bytes]:
        first = bisect.bisect_left(self._chunk_starts, offset)
        wanted, total = [], 0
        for chunk in self._chunks[first : first + _AHEAD_CHUNKS]:
            total += chunk.length
            if chunk.length >= _SMALL_BYTES or total > _AHEAD_BYTES:
                break
            file, within = self._at(chunk.offset)
            wanted.append((chunk.offset, file, Want(file.path, within, chunk.length)))
        for _, _, want in wanted:
            channel.send_json(FrameKind.WANT, want)
        return {start: self._take_in(channel, file, want)[1] for start, file, want in wanted}

    def _at(self, offset: int) -> tuple[DescribedFile, int]:
        index = bisect.bisect_right(self._starts, offset) - 1
        return self._files[index], offset - self._starts[index]

    def _stubbornly(self, work: Callable[[_Line], T]) -> T:
        fruitless = 0
        while True:
            try:
                return self._once(work)
            except (ConnectionLostError, StreamDamagedError) as error:
                fruitless += 1
                if fruitless > self._retry.max_fruitless:
                    raise
                time.sleep(self._retry.wait_s(fruitless))
                if not isinstance(error, (StreamDamagedError, StreamEndedError)):
                    with self._reconnecting:
                        self._opener.reconnect()

    def changed(self) -> LocalFileChangedError:
        return changed_on_node(self._files[0].path if len(self._files) == 1 else "a file of the folder")

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            lines, self._idle = self._idle, []
        for line in lines:
            self._end(line)

    def _once(self, work: Callable[[_Line], T]) -> T:
        line = self._take()
        try:
            answer = work(line)
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
        stream = self._opener.open_agent_stream("send", request, expected_bytes=self._starts[-1])
        with self._lock:
            self._line_count += 1
        return _Line(stream, FrameChannel(stream))

    def _end(self, line: _Line) -> None:
        with self._lock:
            self._line_count -= 1
        line.stream.close()

    def _ask(self, channel: FrameChannel, file: DescribedFile, want: Want) -> tuple[int, bytes]:
        channel.send_json(FrameKind.WANT, want)
        return self._take_in(channel, file, want)

    def _take_in(self, channel: FrameChannel, file: DescribedFile, want: Want) -> tuple[int, bytes]:
        """(encoding, body) of a span, checked unless it is packed."""
        facts = channel.decode(SpanFacts, channel.receive(FrameKind.SPAN)[1])
        listed = file.listed
        if (facts.size, facts.mtime_ns, facts.inode) != (listed.size, listed.mtime_ns, listed.inode):
            raise changed_on_node(file.path)
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


def changed_on_node(path: str) -> LocalFileChangedError:
    return LocalFileChangedError(
        f"{printable(path)} changed while it was copied", action="Copy it again when it is complete."
    )
