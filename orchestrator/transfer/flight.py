"""What is missing, on its way and acknowledged: one queue of chunks that all streams of an upload share."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Sequence

from orchestrator.errors import IntegrityError
from orchestrator.transfer.channel import StreamDamagedError, damaged
from remote_payload.wire.chunk_table import ChunkTable, decode_bitmap
from remote_payload.wire.stream import DamagedStreamError

WINDOW_BYTES = 32 * 1024 * 1024
"""Sent on one stream and not yet acknowledged, at most: more than an SSH channel holds; bounds what a cut costs."""
MAX_SENDS_OF_A_CHUNK = 4


@dataclasses.dataclass(eq=False)
class Lane:
    """One stream's share of the flight. Only `Flight` touches its fields."""

    news: threading.Condition
    in_flight: set[int] = dataclasses.field(default_factory=set)
    in_flight_bytes: int = 0
    copying: collections.deque[int] = dataclasses.field(default_factory=collections.deque)
    acknowledged_bytes: int = 0
    taken_bytes: int = 0
    retires: bool = False
    error: BaseException | None = None


class Flight:
    """Chunks to lanes and back. All methods may be called from several threads.

    An acknowledgement wakes its own lane alone, unless it was the last that was awaited, and a chunk more in a queue in
    which others wait wakes nobody: at hundreds in a second, more would cost more than the sending.
    """

    def __init__(self, table: ChunkTable, order: Sequence[int] | None = None, *, is_growing: bool = False) -> None:
        """`order`: the indices of all chunks in the order in which they shall go; None: as they stand in the file.
        `is_growing`: more may be added until `stop`."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._table = table
        self._order = order if order is not None else range(len(table))
        self._to_send: collections.deque[int] = collections.deque()
        self._to_name: collections.deque[int] = collections.deque()
        self._named = set[int]()
        self._namer: Lane | None = None
        self._here = bytearray(len(table))
        self._is_begun = False
        self.is_growing = is_growing
        self._is_stopped = False
        self._lanes: list[Lane] = []
        self._settled_bytes = 0
        self._refusals: collections.Counter[int] = collections.Counter()
        self._version = 0

    def join(self, have: bytearray) -> Lane:
        """A new stream, whose agent has `have`. Of the first one it decides what is missing; the agents of later ones
        may not know yet what went over the others."""
        lane = Lane(threading.Condition(self._lock))
        with self._changed:
            lane.retires = self._is_stopped
            if not self._is_begun:
                self._is_begun = True
                self._here[:] = have
                self._to_send.extend(index for index in self._order if not have[index])
                named, self._named, self._to_name = self._to_name, set(), collections.deque()
                for index in named:
                    self.name(index)
            self._lanes.append(lane)
            self._tell()
        return lane

    def add(self, index: int) -> None:
        """A chunk more is to be sent, behind all others."""
        with self._changed:
            self._to_send.append(index)
            if len(self._to_send) == 1:
                self._tell()

    def name(self, index: int) -> None:
        """The node is told to copy a chunk that it has elsewhere: before others, and over one stream as long as that
        lasts. One that is in its place already is not named."""
        with self._changed:
            if self._here[index]:
                return
            self._named.add(index)
            self._to_name.append(index)
            if len(self._to_name) == 1:
                self._tell()

    def is_named(self, index: int) -> bool:
        """Whether the chunk is one that the node is told to copy, and is not sent."""
        return index in self._named

    def stop(self) -> None:
        """Every lane ends what it has under way, and takes nothing more."""
        with self._changed:
            self._is_stopped = True
            for lane in self._lanes:
                lane.retires = True
            self._tell()

    def next_chunk(self, lane: Lane, timeout_s: float) -> tuple[int, bool] | None:
        """(chunk, whether it was refused before) once the lane's window has room; None when the lane has no more to do:
        everything is acknowledged, or it retires and its own chunks are. Raises what `fail` was told of the lane,
        `TimeoutError`."""
        with self._changed:
            if not lane.news.wait_for(lambda: self._has_news(lane), timeout_s):
                raise TimeoutError
            if lane.error is not None:
                raise lane.error
            return None if self._is_done(lane) else self._take(lane)

    def chunk_ahead(self, lane: Lane, unsent_bytes: int) -> tuple[int, bool] | None:
        """As `next_chunk`, for a lane that has not sent so much of what it took, which does not count for its window:
        None where it would have to wait for one."""
        with self._changed:
            if lane.error is not None:
                raise lane.error
            return self._take(lane) if self._can_take(lane, unsent_bytes) else None

    def acknowledge(self, lane: Lane, index: int) -> None:
        with self._changed:
            length = self._settle(lane, index)
            lane.acknowledged_bytes += length
            self._here[index] = 1
            if self._to_send or any(other.in_flight for other in self._lanes):
                lane.news.notify_all()
            else:
                self._tell()

    def copied(self, lane: Lane, count: int) -> None:
        """With so many more of the chunks that the lane named, the first ones, the node is done."""
        with self._changed:
            if count > len(lane.copying):
                raise StreamDamagedError(f"the node speaks of {count} copies, {len(lane.copying)} are awaited")
            for _ in range(count):
                lane.copying.popleft()
            self._tell()

    def refuse(self, lane: Lane, index: int) -> None:
        """Raises `IntegrityError` for a chunk that is refused again and again."""
        with self._changed:
            self._settle(lane, index)
            self._refusals[index] += 1
            if self._refusals[index] >= MAX_SENDS_OF_A_CHUNK:
                raise IntegrityError(
                    f"chunk {index} arrived damaged {MAX_SENDS_OF_A_CHUNK} times",
                    action="Check the network and the node's memory; what has arrived is kept.",
                )
            self._to_send.appendleft(index)
            self._tell()

    def take_note(self, lane: Lane, taken_bytes: int) -> None:
        """The lane's agent has taken so many bytes of data, acknowledged or not."""
        with self._changed:
            lane.taken_bytes = taken_bytes

    def fail(self, lane: Lane, error: BaseException) -> None:
        """The lane's stream has ended: its `next_chunk` raises `error`."""
        with self._changed:
            lane.error = lane.error or error
            self._tell()

    def leave(self, lane: Lane) -> None:
        """Take the lane out; what it had under way goes back to the front of the queues."""
        with self._changed:
            if lane in self._lanes:
                self._lanes.remove(lane)
                self._settled_bytes += lane.acknowledged_bytes
                self._to_send.extendleft(sorted(lane.in_flight, reverse=True))
                self._to_name.extendleft(reversed(lane.copying))
                lane.in_flight.clear()
                lane.in_flight_bytes = 0
            if self._namer is lane:
                self._namer = None
            self._tell()

    def is_last(self, lane: Lane) -> bool:
        """Whether the lane, which has no more to do, is to finish the file. Any other retires with this call."""
        with self._changed:
            if self._to_send or any(other.in_flight for other in self._lanes):
                lane.retires = True
                return False
            if not lane.retires and all(other is lane or other.retires for other in self._lanes):
                return True
            lane.retires = True
            return False

    def await_alone(self, lane: Lane, timeout_s: float) -> bool:
        """Wait until every other lane has left, which makes what went over them durable."""
        with self._changed:
            return self._changed.wait_for(lambda: lane.error is not None or self._lanes == [lane], timeout_s)

    def keep(self, count: int) -> None:
        """Let the youngest lanes beyond `count` end what they have under way and take nothing more."""
        with self._changed:
            staying = [lane for lane in self._lanes if not lane.retires]
            for lane in staying[count:]:
                lane.retires = True
            if len(staying) > count:
                self._tell()

    def send_missing(self, have: bytearray) -> None:
        """Send again what the agent turned out not to have; for the only lane."""
        missing = [index for index in self._order if not have[index]]
        if not missing:
            raise StreamDamagedError("the node has every chunk and does not finish the file")
        with self._changed:
            for index in missing:
                self._here[index] = 0
            self._to_send.extend(missing)
            self._tell()

    def wake(self) -> None:
        with self._changed:
            self._tell()

    def await_change(self, since: int, timeout_s: float) -> int:
        """Wait, for so long at most, until more than bytes has changed since `since`, an earlier answer; 0 at first."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != since, timeout_s)
            return self._version

    @property
    def arrived_bytes(self) -> int:
        """How many bytes have arrived over all streams so far."""
        with self._changed:
            return self._settled_bytes + sum(max(lane.acknowledged_bytes, lane.taken_bytes) for lane in self._lanes)

    @property
    def is_stopped(self) -> bool:
        with self._changed:
            return self._is_stopped

    @property
    def is_fed(self) -> bool:
        """Whether more chunks wait than the streams are about to take."""
        with self._changed:
            return len(self._to_send) > 2 * len(self._lanes)

    @property
    def has_work(self) -> bool:
        """Whether chunks wait for a stream."""
        with self._changed:
            is_to_name = bool(self._to_name) and self._namer is None
            return (is_to_name or bool(self._to_send)) and not self._is_stopped

    @property
    def is_idle(self) -> bool:
        """Whether no chunk waits for a stream, and none is on its way or being copied by the node."""
        with self._changed:
            is_under_way = any(lane.in_flight or lane.copying for lane in self._lanes)
            return not (self._to_name or self._to_send or is_under_way)

    def _tell(self) -> None:
        self._version += 1
        self._changed.notify_all()
        for lane in self._lanes:
            lane.news.notify_all()

    def _has_news(self, lane: Lane) -> bool:
        return lane.error is not None or self._is_done(lane) or self._can_take(lane)

    def _can_take(self, lane: Lane, unsent_bytes: int = 0) -> bool:
        """A single chunk always fits, whatever its size."""
        if lane.retires:
            return False
        if self._can_name(lane):
            return True
        if not self._to_send:
            return False
        sent_bytes = lane.in_flight_bytes - unsent_bytes
        return not lane.in_flight or sent_bytes + self._table.length(self._to_send[0]) <= WINDOW_BYTES

    def _can_name(self, lane: Lane) -> bool:
        return bool(self._to_name) and self._namer in (None, lane)

    def _take(self, lane: Lane) -> tuple[int, bool]:
        if self._can_name(lane):
            self._namer = lane
            lane.copying.append(self._to_name.popleft())
            return lane.copying[-1], False
        index = self._to_send.popleft()
        lane.in_flight.add(index)
        lane.in_flight_bytes += self._table.length(index)
        return index, self._refusals[index] > 0

    def _is_done(self, lane: Lane) -> bool:
        if lane.retires:
            return not lane.in_flight
        return not self.is_growing and not self._to_send and not any(other.in_flight for other in self._lanes)

    def _settle(self, lane: Lane, index: int) -> int:
        if index not in lane.in_flight:
            raise StreamDamagedError(f"the node speaks of chunk {index}, which is not on its way")
        lane.in_flight.remove(index)
        length = self._table.length(index)
        lane.in_flight_bytes -= length
        return length


def bitmap(body: bytes, count: int) -> bytearray:
    """The flags in a HAVE frame."""
    try:
        return decode_bitmap(body, count)
    except DamagedStreamError as error:
        raise damaged(error) from error
