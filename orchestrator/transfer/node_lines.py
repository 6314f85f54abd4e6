"""Streams on which a node is asked for spans of its files, for as many threads as ask, and one file after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import ConnectionLostError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.channel import (
    IDLE_TIMEOUT_S,
    FrameChannel,
    ReconnectPolicy,
    StreamDamagedError,
    StreamEndedError,
    StreamOpener,
)
from remote_payload.wire.stream import SendRequest

T = TypeVar("T")


class NodeLines:
    """Every thread that asks has a stream of its own while it does. Leaving the context ends them.

    `expected_bytes`: how many will come over them, by which it is judged whether a login pays.
    """

    def __init__(self, opener: StreamOpener, retry: ReconnectPolicy, expected_bytes: Callable[[], int]) -> None:
        self._opener = opener
        self._retry = retry
        self._expected_bytes = expected_bytes
        self._lock = threading.Lock()
        self._reconnecting = threading.Lock()
        self._idle: list[_Line] = []
        self._count = 0
        self._is_closed = False

    @property
    def count(self) -> int:
        return self._count

    def ask(self, work: Callable[[FrameChannel], T]) -> T:
        """Do `work`, again after each lost or damaged stream. Raises what it last raised once patience has run out."""
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

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            lines, self._idle = self._idle, []
        for line in lines:
            self._end(line)

    def __enter__(self) -> NodeLines:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _once(self, work: Callable[[FrameChannel], T]) -> T:
        line = self._take()
        try:
            answer = work(line.channel)
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
        stream = self._opener.open_agent_stream("send", request, expected_bytes=self._expected_bytes())
        with self._lock:
            self._count += 1
        return _Line(stream)

    def _end(self, line: _Line) -> None:
        with self._lock:
            self._count -= 1
        line.stream.close()


class _Line:
    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.channel = FrameChannel(stream)
