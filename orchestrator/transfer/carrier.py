"""Carrying chunks over as many streams as pay: what an upload does, whether its file's digest is known yet or not."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from orchestrator.errors import UnreachableError
from orchestrator.ssh.transport import BulkStream, ByteStream, StreamFacts
from orchestrator.transfer.channel import IDLE_TIMEOUT_S, ReconnectPolicy, StreamOpener
from orchestrator.transfer.flight import Flight
from orchestrator.transfer.packing import Packer
from orchestrator.transfer.progress import TokenBucket
from orchestrator.transfer.stream_count import StreamCount, StreamPolicy
from orchestrator.transfer.streams import MAX_LOGINS_AT_ONCE, MAX_NEAR_LOGINS_AT_ONCE, StreamEnd, StreamPool
from remote_payload.wire.packing_rates import PackingRates
from remote_payload.wire.processors import usable_processors
from remote_payload.wire.stream import ReceiveRequest

_TICK_S = 0.05


class Pace:
    """What limits an upload and what was learned of its path; it outlives streams and attempts."""

    def __init__(
        self,
        *,
        bandwidth_limit_bytes_per_s: float | None = None,
        streams: StreamPolicy | None = None,
        packing: bool = True,
        rates: PackingRates | None = None,
        retry: ReconnectPolicy | None = None,
    ) -> None:
        self.bucket = TokenBucket(bandwidth_limit_bytes_per_s)
        self.count = StreamCount(streams or StreamPolicy(), bandwidth_limit_bytes_per_s)
        self.rates = rates or PackingRates()
        self.packer = Packer(self.rates) if packing else None
        self.retry = retry or ReconnectPolicy()

    def close(self) -> None:
        """Nothing is read for packing any more afterwards."""
        if self.packer is not None:
            self.packer.close()


@dataclasses.dataclass
class Sent:
    """What has gone over all streams so far. `facts`: of each stream that was ever open, how it travelled, as far as
    that is known. For several threads, through `add`."""

    bytes_sent: int = 0
    bytes_packed: int = 0
    facts: list[StreamFacts] = dataclasses.field(default_factory=list)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, count: int, spared: int) -> None:
        with self._lock:
            self.bytes_sent += count
            self.bytes_packed += spared

    def add_stream(self, stream: ByteStream) -> StreamFacts | None:
        """The facts of the first stream of all, else None."""
        if not isinstance(stream, BulkStream):
            return None
        with self._lock:
            self.facts.append(stream.facts)
            return stream.facts if len(self.facts) == 1 else None


def carry(
    opener: StreamOpener,
    request: ReceiveRequest,
    flight: Flight,
    serve: Callable[[ByteStream], bool],
    pace: Pace,
    sent: Sent,
    *,
    expected_bytes: int,
    has_begun: Callable[[], bool],
    is_over: Callable[[], bool],
    on_tick: Callable[[int], None],
    idle_timeout_s: float = IDLE_TIMEOUT_S,
) -> None:
    """Have streams serve `flight` until `is_over`, or, where they were asked to stop, until all have left.

    Their number is not probed while the flight grows, unless the link is what it waits for: the rate is then that of
    whoever adds to it, or of the processors that he uses. `has_begun`: whether it is known what is missing; until then
    one stream is enough. `on_tick` hears how many streams there are.
    Raises when no stream is left, or one met what no other would survive either.
    """

    def serve_one(stream: ByteStream) -> bool:
        first = sent.add_stream(stream)
        if first is not None:
            pace.count.path_is(first.round_trip_s, usable_processors())
        return serve(stream)

    pool = StreamPool(
        opener,
        "receive",
        request,
        serve_one,
        flight.wake,
        idle_timeout_s=idle_timeout_s,
        expected_bytes=expected_bytes,
    )
    pace.count.disregard()
    with pool:
        seen, losses, open_again_at = 0, 0, float("-inf")
        while True:
            now = time.monotonic()
            if not flight.is_growing or (pace.count.is_far and flight.is_fed):
                wanted = pace.count.observe(now, flight.arrived_bytes, pool.open_count)
            else:
                wanted = pace.count.disregard()
            flight.keep(wanted)
            is_needed = pool.count == 0 or (has_begun() and flight.has_work)
            # Looked at behind the count: the last stream ends it before it leaves.
            if now >= open_again_at and is_needed and not (is_over() or flight.is_stopped):
                pool.open_up_to(wanted, MAX_LOGINS_AT_ONCE if pace.count.is_far else MAX_NEAR_LOGINS_AT_ONCE)
            seen = flight.await_change(seen, _TICK_S)
            on_tick(pool.open_count)
            for end in pool.ended():
                if not is_over() and _was_lost(end, pool, pace.count):
                    losses += 1
                    open_again_at = time.monotonic() + pace.retry.wait_s(losses)
            if is_over() or (flight.is_stopped and pool.count == 0):
                return


def _was_lost(end: StreamEnd, pool: StreamPool, count: StreamCount) -> bool:
    """Whether a stream was lost that others make up for. Raises its error where none does."""
    if end.error is None:
        return False
    if not end.is_local or pool.count == 0:
        raise end.error
    if not end.was_open and isinstance(end.error, UnreachableError):
        count.refused(time.monotonic(), pool.open_count)
    return True
