"""Frames over a byte stream to the agent, and going on after a stream was lost."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from orchestrator.errors import (
    CommandTimeoutError,
    ConnectionLostError,
    IntegrityError,
    InternalError,
    RemoteEvalError,
    UnreachableError,
)
from orchestrator.node_errors import remote_error
from orchestrator.ssh.transport import BulkStream, ByteStream
from orchestrator.transfer.forwarded import ForwardedStream
from remote_payload.wire.codec import WireError
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.names import printable
from remote_payload.wire.stream import (
    RAW_ENCODING,
    DamagedStreamError,
    FrameHeader,
    FrameKind,
    FrameReader,
    StreamFailure,
    decode_json,
    encode_data_header,
    encode_frame,
    encode_json_frame,
)

T = TypeVar("T")
IDLE_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 10.0
_PIECE_BYTES = 1024 * 1024
_SHOWN_BYTES = 4000
_RUN_AGAIN = "Run it again; what has arrived is kept."
_OWN_MISTAKE_STATUS = 1
_SSH_FAILED_STATUS = 255


class StreamOpener(Protocol):
    """What a transfer needs of a node; `orchestrator.node.Node` is one."""

    @property
    def layout(self) -> NodeLayout: ...

    def open_agent_stream(
        self, verb: str, request: object, *, idle_timeout_s: float = 60.0, expected_bytes: int | None = None
    ) -> ByteStream:
        """Start a stream verb; its own bytes begin with the first one read. `expected_bytes`: None if unknown."""

    def prepared_stream(self, expected_bytes: int, /) -> ByteStream | None:
        """A stream whose agent is on stand-by, where one was opened beforehand and so many bytes are worth it; each of
        them once."""

    def reconnect(self) -> None:
        """Drop the connection and make a new one, within the profile's patience."""


class StreamDamagedError(IntegrityError):
    """What came over a stream is not what was sent. Another stream may do better."""


class StreamEndedError(ConnectionLostError):
    """The agent ended in the middle while the connection held: killed, or idle for too long."""


@dataclasses.dataclass(frozen=True)
class ReconnectPolicy:
    """After how many reconnects in a row that brought the transfer no further it gives up, and the waits between."""

    max_fruitless: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 15.0

    def wait_s(self, fruitless: int) -> float:
        """Exponential, with up to a quarter of jitter."""
        bare = min(self.first_wait_s * 2.0**fruitless, self.longest_wait_s)
        return bare * random.uniform(0.75, 1.0)  # noqa: S311 - spreads retries, guards nothing


@dataclasses.dataclass(frozen=True)
class ReconnectNotice:
    """One reconnect, for showing."""

    reason: str
    fruitless: int
    max_fruitless: int
    wait_s: float


ReconnectListener = Callable[[ReconnectNotice], None]


class FrameChannel:
    """Frames to and from the agent. One thread may send while another receives.

    Receiving raises what `remote_error` makes of a FAILURE frame, `StreamDamagedError`, `StreamEndedError`, and what
    the stream raises.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        # Asked once: looking for a protocol's methods takes longer than handing over a megabyte.
        self._bulk = stream if isinstance(stream, BulkStream) else None
        self._reader = FrameReader(self._fill)
        self.is_filled_there = isinstance(stream, ForwardedStream)
        """Whether the bytes of chunks are not sent by us: the agent is told where on its disk they are."""
        self.may_pack_there = isinstance(stream, ForwardedStream) and stream.may_pack

    def send(self, kind: FrameKind, argument: int = 0, body: bytes = b"") -> None:
        self._stream.write(encode_frame(kind, argument, body))

    def send_json(self, kind: FrameKind, value: Any) -> None:
        self._stream.write(encode_json_frame(kind, value))

    def send_data_header(self, argument: int, length: int, encoding: int = RAW_ENCODING) -> None:
        self._stream.write(encode_data_header(argument, length, encoding))

    def send_data(self, data: bytes | memoryview) -> None:
        self._stream.write(data)

    def send_file(self, fd: int, offset: int, count: int) -> int:
        """Send up to `count` bytes of a file, and return how many: 0 at its end. Raises what the stream raises, and
        `OSError` for the file."""
        if self._bulk is not None:
            return self._bulk.send_file(fd, offset, count)
        data = os.pread(fd, min(count, _PIECE_BYTES), offset)
        self._stream.write(data)
        return len(data)

    def receive(self, *expected: FrameKind) -> tuple[FrameHeader, bytes]:
        """The next frame, of one of the expected kinds. A DATA frame's body is left to `read_data`."""
        try:
            header = self._reader.header()
            body = b"" if header.kind is FrameKind.DATA else self._reader.body(header)
            if header.kind is FrameKind.FAILURE:
                raise _failed(decode_json(StreamFailure, body))
            if header.kind not in expected:
                raise DamagedStreamError(f"a {header.kind.name} frame arrived out of turn")
        except DamagedStreamError as error:
            raise damaged(error) from error
        return header, body

    def decode(self, cls: type[T], body: bytes) -> T:
        try:
            return decode_json(cls, body)
        except DamagedStreamError as error:
            raise damaged(error) from error

    def read_data(self, view: memoryview) -> None:
        """Fill `view` with the next bytes of a DATA frame's body."""
        self._fill(view)

    def _fill(self, view: memoryview) -> None:
        while view:
            if self._bulk is not None:
                count = self._bulk.read_into(view)
                if not count:
                    raise self._end()
                view = view[count:]
                continue
            data = self._stream.read(len(view))
            if not data:
                raise self._end()
            view[: len(data)] = data
            view = view[len(data) :]

    def _end(self) -> RemoteEvalError:
        """Why the agent's output ended where a frame was due."""
        try:
            result = self._stream.finish(_END_TIMEOUT_S)
        except UnreachableError as error:
            return ConnectionLostError(f"the connection ended in the middle of a transfer: {error}")
        said = printable(result.stderr[-_SHOWN_BYTES:].decode(errors="replace")).strip()
        if result.exit_status == _OWN_MISTAKE_STATUS:
            return InternalError("the agent failed on the node", action="Report this.", details=said)
        if result.exit_status in (None, _SSH_FAILED_STATUS):
            return ConnectionLostError("the connection ended in the middle of a transfer", details=said)
        return StreamEndedError(f"the agent ended early (exit status {result.exit_status})", details=said)


def damaged(error: WireError) -> StreamDamagedError:
    return StreamDamagedError(f"the transfer's stream is damaged: {printable(str(error))}")


def with_reconnects(
    opener: StreamOpener,
    work: Callable[[], T],
    durable_bytes: Callable[[], int],
    policy: ReconnectPolicy,
    on_reconnect: ReconnectListener | None = None,
) -> T:
    """Do `work` again after each lost or damaged stream, until it succeeds or has been fruitless for too often.

    `durable_bytes` tells how much of the work will not have to be done again; its growth counts as getting on. Raises
    what `work` last raised, and what `opener.reconnect` raises.
    """
    fruitless, furthest = 0, durable_bytes()
    while True:
        try:
            return work()
        except (ConnectionLostError, CommandTimeoutError, StreamDamagedError) as error:
            reached = durable_bytes()
            fruitless = 0 if reached > furthest else fruitless + 1
            furthest = max(furthest, reached)
            if fruitless > policy.max_fruitless:
                error.action = error.action or _RUN_AGAIN
                raise
            wait_s = policy.wait_s(fruitless)
            if on_reconnect is not None:
                on_reconnect(ReconnectNotice(str(error), fruitless, policy.max_fruitless, wait_s))
            time.sleep(wait_s)
            if not isinstance(error, (StreamDamagedError, StreamEndedError)):
                opener.reconnect()


def _failed(failure: StreamFailure) -> RemoteEvalError:
    error = remote_error(failure.failure)
    if failure.resumable and isinstance(error, IntegrityError):
        return StreamDamagedError(error.cause, action=error.action, details=error.details)
    return error
