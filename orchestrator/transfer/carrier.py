"""Carrying chunks over as many streams as pay: what an upload does, whether its file's digest is known yet or not, and
one upload after the other."""

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
from remote_payload.wire.messages import Assembled
from remote_payload.wire.packing_rates import PackingRates
from remote_payload.wire.processors import usable_processors
from remote_payload.wire.stream import ReceiveRequest, ReusedFacts

_TICK_S = 0.05
_WAS_CHANGED = "the stored copy was changed since it was verified; it is sent again"
_WAS_READ = "the stored copy was touched since it was verified; it was read anew in full, and is what it was"


@dataclasses.dataclass
class Sent:
    """What has gone over all streams so far. `facts`: of each stream that ever served it, how it travelled, as far as
    that is known. For several threads, through `add`. `note`: what became of a stored copy that the node did not
    believe."""

    bytes_sent: int = 0
    bytes_packed: int = 0
    note: str = ""
    facts: list[StreamFacts] = dataclasses.field(default_factory=list)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, count: int, spared: int) -> None:
        with self._lock:
            self.bytes_sent += count
            self.bytes_packed += spared

    def add_stream(self, facts: StreamFacts) -> None:
        with self._lock:
            self.facts.append(facts)


def note_of(found: ReusedFacts | Assembled) -> str:
    """What a person is told of a stored copy that the node did not believe; nothing where there was none."""
    return _WAS_CHANGED if found.was_changed else _WAS_READ if found.was_read else ""


class Carrier:
    """The streams to a node, what limits them, and what was learned of the path: for one file after another, through
    all attempts at each. Leaving the context ends the streams, and nothing is read for packing any more."""

    def __init__(
        self,
        opener: StreamOpener,
        *,
        bandwidth_limit_bytes_per_s: float | None = None,
        streams: StreamPolicy | None = None,
        packing: bool = True,
        rates: PackingRates | None = None,
        retry: ReconnectPolicy | None = None,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        self.opener = opener
        self.bucket = TokenBucket(bandwidth_limit_bytes_per_s)
        self.rates = rates or PackingRates()
        self.packer = Packer(self.rates) if packing else None
        self.retry = retry or ReconnectPolicy()
        self.idle_timeout_s = idle_timeout_s
        self.count = StreamCount(streams or StreamPolicy(), bandwidth_limit_bytes_per_s)
        self.pool = StreamPool(opener, idle_timeout_s=idle_timeout_s)
        self._is_path_known = False

    @property
    def expected_bytes(self) -> int:
        return self.pool.expected_bytes

    def expect(self, count: int) -> None:
        """So many bytes are to come, in one file or several: whether a login pays is judged by that."""
        self.pool.expected_bytes = count

    def end_streams(self) -> None:
        """Break off what goes on; no stream is opened any more."""
        self.pool.close()

    def close(self) -> None:
        self.pool.close()
        if self.packer is not None:
            self.packer.close()

    def __enter__(self) -> Carrier:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def carry(
        self,
        request: ReceiveRequest,
        flight: Flight,
        serve: Callable[[ByteStream], None],
        sent: Sent,
        *,
        has_begun: Callable[[], bool],
        is_over: Callable[[], bool],
        on_tick: Callable[[int], None],
    ) -> None:
        """Have streams serve `flight` until `is_over`, or, where they were asked to stop, until all have left.

        Their number is not probed while the flight grows, unless the link is what it waits for: the rate is then that
        of whoever adds to it, or of the processors that he uses. `has_begun`: whether it is known what is missing;
        until then one stream is enough. `on_tick` hears how many streams there are.
        Raises when no stream is left, or one met what no other would survive either.
        """

        def serve_one(stream: ByteStream) -> None:
            if isinstance(stream, BulkStream):
                sent.add_stream(stream.facts)
            self.learn(stream)
            serve(stream)

        count, pool = self.count, self.pool
        count.disregard()
        with pool.work("receive", request, serve_one, flight.wake):
            seen, losses, open_again_at = 0, 0, float("-inf")
            while True:
                now = time.monotonic()
                if not flight.is_growing or (count.is_far and flight.is_fed):
                    wanted = count.observe(now, flight.arrived_bytes, pool.open_count)
                else:
                    wanted = count.disregard()
                flight.keep(wanted)
                is_needed = pool.count == 0 or (has_begun() and flight.has_work)
                # Looked at behind the count: the last stream ends it before it leaves.
                if now >= open_again_at and is_needed and not (is_over() or flight.is_stopped):
                    at_once = MAX_LOGINS_AT_ONCE if count.is_far else MAX_NEAR_LOGINS_AT_ONCE
                    pool.open_up_to(wanted if has_begun() else 1, at_once)
                seen = flight.await_change(seen, _TICK_S)
                on_tick(pool.open_count)
                for end in pool.ended():
                    if not is_over() and self.was_lost(end):
                        losses += 1
                        open_again_at = time.monotonic() + self.retry.wait_s(losses)
                if is_over() or (flight.is_stopped and pool.open_count == 0):
                    return

    def learn(self, stream: ByteStream) -> None:
        """How far the node is, from the first stream that knows."""
        if not self._is_path_known and isinstance(stream, BulkStream):
            self._is_path_known = True
            self.count.path_is(stream.facts.round_trip_s, usable_processors())

    def was_lost(self, end: StreamEnd) -> bool:
        """Whether a stream was lost that others make up for. Raises its error where none does."""
        if end.error is None or (end.is_local and end.was_open and not end.is_fresh):
            return False  # while it stood by, as a rule: another takes its place at once
        if not end.is_local or self.pool.is_empty:
            raise end.error
        if not end.was_open and isinstance(end.error, UnreachableError):
            self.count.refused(time.monotonic(), self.pool.open_count)
        return True
