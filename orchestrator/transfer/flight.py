"""What is missing, on its way and acknowledged on one upload stream."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from orchestrator.errors import CommandTimeoutError, IntegrityError
from orchestrator.transfer.channel import IDLE_TIMEOUT_S, FrameChannel, StreamDamagedError, damaged
from remote_payload.wire.stream import ChunkTable, DamagedStreamError, FinishedFacts, FrameKind, decode_bitmap

WINDOW_BYTES = 64 * 1024 * 1024
"""Sent and not yet acknowledged, at most: more than a long fat link holds, and bounded for the node's sake."""
MAX_SENDS_OF_A_CHUNK = 4
_TICK_S = 0.5


class Flight:
    """The sender asks it what to send; a thread in `take_answers` tells it what arrived."""

    def __init__(self, channel: FrameChannel, table: ChunkTable, have: bytearray) -> None:
        self._channel = channel
        self._table = table
        self._changed = threading.Condition()
        self._to_send = collections.deque(_missing(have))
        self._in_flight: set[int] = set()
        self._in_flight_bytes = 0
        self._acknowledged_bytes = 0
        self._taken_bytes = 0
        self._refusals: collections.Counter[int] = collections.Counter()
        self._answer: FinishedFacts | bytearray | None = None

    def take_answers(self) -> None:
        """Take in everything that the agent says until the file is finished. Runs in a thread of its own."""
        kinds = (FrameKind.ACK, FrameKind.REFUSED, FrameKind.ALIVE, FrameKind.HAVE, FrameKind.FINISHED)
        while True:
            header, body = self._channel.receive(*kinds)
            with self._changed:
                if header.kind is FrameKind.ALIVE:
                    self._taken_bytes = header.argument
                elif header.kind is FrameKind.HAVE:
                    self._answer = bitmap(body, len(self._table))
                elif header.kind is FrameKind.FINISHED:
                    self._answer = self._channel.decode(FinishedFacts, body)
                else:
                    self._settle(header.argument, is_good=header.kind is FrameKind.ACK)
                self._changed.notify_all()
            if header.kind is FrameKind.FINISHED:
                return

    def wake(self) -> None:
        """Let the sender look again; for when the thread of answers has ended."""
        with self._changed:
            self._changed.notify_all()

    def next_chunk(self, answers: Future[None], on_arrived: Callable[[int], None]) -> int | None:
        """The next chunk to send, once the window has room for it; None when all are acknowledged.

        `on_arrived` is told how many bytes have arrived on this stream. Raises what ended the thread of answers.
        """
        while True:
            with self._changed:
                arrived = max(self._acknowledged_bytes, self._taken_bytes)
                if self._to_send and self._has_room():
                    index = self._to_send.popleft()
                    self._in_flight.add(index)
                    self._in_flight_bytes += self._table.length(index)
                    break
                if not self._to_send and not self._in_flight:
                    return None
                if not answers.done():
                    self._changed.wait(_TICK_S)
            if answers.done():
                answers.result()
                raise StreamDamagedError("the node calls a file finished that is not")
            on_arrived(arrived)
        on_arrived(arrived)
        return index

    def was_refused(self, index: int) -> bool:
        with self._changed:
            return self._refusals[index] > 0

    def await_answer(self, answers: Future[None], timeout_s: float = 10 * IDLE_TIMEOUT_S) -> FinishedFacts | bytearray:
        """What the agent says to FINISH: the finished file, or a bitmap of what it has.

        The stream's idle timeout comes first where the agent is silent; `timeout_s` bounds even one that chatters.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._changed:
                if self._answer is None and not answers.done():
                    self._changed.wait(_TICK_S)
                answer, self._answer = self._answer, None
            if answer is not None:
                return answer
            if answers.done():
                answers.result()
            if time.monotonic() > deadline:
                raise CommandTimeoutError(f"the node did not finish the file within {timeout_s:g} s")

    def send_missing(self, have: bytearray) -> None:
        """Send again what the agent turned out not to have."""
        missing = _missing(have)
        if not missing:
            raise StreamDamagedError("the node has every chunk and does not finish the file")
        with self._changed:
            self._to_send.extend(missing)

    def _has_room(self) -> bool:
        """A single chunk always fits, whatever its size."""
        return not self._in_flight or self._in_flight_bytes + self._table.length(self._to_send[0]) <= WINDOW_BYTES

    def _settle(self, index: int, *, is_good: bool) -> None:
        if index not in self._in_flight:
            raise StreamDamagedError(f"the node speaks of chunk {index}, which is not on its way")
        self._in_flight.remove(index)
        length = self._table.length(index)
        self._in_flight_bytes -= length
        if is_good:
            self._acknowledged_bytes += length
            return
        self._refusals[index] += 1
        if self._refusals[index] >= MAX_SENDS_OF_A_CHUNK:
            raise IntegrityError(
                f"chunk {index} arrived damaged {MAX_SENDS_OF_A_CHUNK} times",
                action="Check the network and the node's memory; what has arrived is kept.",
            )
        self._to_send.appendleft(index)


def bitmap(body: bytes, count: int) -> bytearray:
    """The flags in a HAVE frame."""
    try:
        return decode_bitmap(body, count)
    except DamagedStreamError as error:
        raise damaged(error) from error


def _missing(have: bytearray) -> list[int]:
    return [index for index, is_there in enumerate(have) if not is_there]
