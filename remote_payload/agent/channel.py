"""Bytes to and from the client over a stream verb's standard streams, every wait bounded."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import time
from types import TracebackType
from typing import Any, Callable, Optional

from remote_payload.wire.stream import Buffer, FrameKind, encode_frame, encode_json_frame

PIPE_BYTES = 1024 * 1024
_F_SETPIPE_SZ = 1031
_READ_EVENTS = select.POLLIN
_WRITE_EVENTS = select.POLLOUT
_QUIET_S = 0.25
_MUCH_BYTES = 64 * 1024
_GATHER_S = 0.0005


class PeerGoneError(EOFError):
    """The client has closed its end, or has been silent for too long."""


class FarEndGoneError(PeerGoneError):
    """The way from here to another node was lost in the middle."""


class FdChannel:
    """Two file descriptors as a channel. Entered, they do not block; left, they are as they were.

    `idle_s` bounds every read and write without a byte moved; `PeerGoneError` ends them. `on_quiet` is called each time
    that nothing has arrived for a moment.
    """

    def __init__(self, input_fd: int, output_fd: int, idle_s: float = 60.0) -> None:
        self.idle_s = idle_s
        self.on_quiet: Callable[[], None] = _do_nothing
        self._input = input_fd
        self._output = output_fd

    def __enter__(self) -> FdChannel:
        # The shell that started us reads the rest of its script from the same open file: it needs the flag restored.
        self._were_blocking = {fd: os.get_blocking(fd) for fd in (self._input, self._output)}
        for fd in self._were_blocking:
            os.set_blocking(fd, False)
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for fd, blocking in self._were_blocking.items():
            os.set_blocking(fd, blocking)

    def read_some(self, view: memoryview) -> int:
        """Fill the start of `view` with at least one byte, and return how many."""
        while True:
            try:
                count = os.readv(self._input, [view])
            except BlockingIOError:
                if not self._await_more():
                    raise PeerGoneError(f"nothing arrived for {self.idle_s:g} s") from None
                if len(view) > _MUCH_BYTES:
                    # The server hands over 32 KiB at a time: wait for more than that, or every one of them wakes us.
                    time.sleep(_GATHER_S)
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                raise PeerGoneError(str(error)) from None
            if not count:
                raise PeerGoneError("the client closed the stream")
            return count

    def fill(self, view: memoryview) -> None:
        """Fill `view` completely."""
        while view:
            view = view[self.read_some(view) :]

    def wait_readable(self, timeout_s: float) -> bool:
        """Whether something (or the end) can be read within `timeout_s`."""
        return _wait(self._input, _READ_EVENTS, timeout_s)

    def _await_more(self) -> bool:
        quiet_s = min(_QUIET_S, self.idle_s)
        if self.wait_readable(quiet_s):
            return True
        self.on_quiet()
        return self.wait_readable(self.idle_s - quiet_s)

    def send(self, data: Buffer) -> None:
        """Write all of `data`."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._output, left) :]
            except BlockingIOError:
                if not _wait(self._output, _WRITE_EVENTS, self.idle_s):
                    raise PeerGoneError(f"nothing was taken for {self.idle_s:g} s") from None
            except (BrokenPipeError, ConnectionResetError) as error:
                raise PeerGoneError(str(error)) from None

    def send_frame(self, kind: FrameKind, argument: int = 0, body: Buffer = b"") -> None:
        self.send(encode_frame(kind, argument, body))

    def send_json(self, kind: FrameKind, value: Any) -> None:
        self.send(encode_json_frame(kind, value))


def widen(fd: int) -> None:
    """Let a pipe hold more, so that the server goes on while we hash or write; where it may not, it stays as it is."""
    with contextlib.suppress(OSError):
        if sys.platform.startswith("linux"):
            fcntl.fcntl(fd, _F_SETPIPE_SZ, PIPE_BYTES)


def _do_nothing() -> None:
    return None


def _wait(fd: int, events: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(fd, events)
    deadline = time.monotonic() + timeout_s
    left_s = timeout_s
    while left_s > 0:
        if poller.poll(left_s * 1000):
            return True
        left_s = deadline - time.monotonic()
    return False
