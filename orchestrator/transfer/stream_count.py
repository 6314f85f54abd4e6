"""How many streams a transfer should use: a pure controller that climbs while the rate rises."""

from __future__ import annotations

import dataclasses
import math

MAX_STREAMS = 16
NEAR_S = 0.005
"""Within such a round trip a new stream is at full speed at once, and little is on its way: less time settles it."""
MANY_BYTES = 128 * 1024 * 1024
"""Where so much arrived, a rate is no matter of chance, however short the time."""
HOLD_S = 20.0
LONGEST_HOLD_S = 160.0
_WORTH_IT = 0.25
"""A step up is kept if it brings this share of what it would bring were the rate in proportion to the streams."""
_NO_WORSE = 0.97
_FELL = 0.7
_BYTES_PER_S_OF_A_STREAM = 4 * 1024 * 1024
_WINDOW_BYTES = 2 * 1024 * 1024
"""An SSH channel holds so much on its way: what one stream carries in a round trip."""
_FIRST_GUESS_BYTES_PER_S = 125e6
_FIRST_GUESS_AT_MOST = 4
_MANY_PROCESSORS = 8
_PROCESSORS_LIMIT_BYTES_PER_S = 400e6
"""No near link of 2.5 Gbit/s carries so much: streams wait for the processors that encrypt, each of them for one."""
_FIRST_LOOK_S = 0.1
_FIRST_LOOK_BYTES = MANY_BYTES // 4


@dataclasses.dataclass(frozen=True)
class _Times:
    """How long a number of streams settles, and how long its rate is measured: less where much arrives."""

    settle_s: float
    measure_much_s: float
    measure_s: float


_FAR = _Times(settle_s=0.7, measure_much_s=1.3, measure_s=1.3)
_NEAR = _Times(settle_s=0.15, measure_much_s=0.2, measure_s=0.52)


@dataclasses.dataclass(frozen=True)
class StreamPolicy:
    """`fixed`: so many streams, no more and no fewer, as far as the node lets us; None: as many as pay."""

    fixed: int | None = None
    at_most: int = MAX_STREAMS

    def __post_init__(self) -> None:
        if not 1 <= (1 if self.fixed is None else self.fixed) <= MAX_STREAMS or not 1 <= self.at_most <= MAX_STREAMS:
            raise ValueError(f"a transfer uses 1 to {MAX_STREAMS} streams")


def first_guess(round_trip_s: float | None, processors: int) -> int:
    """How many streams fill a link of 1 Gbit/s over such a path; 1 where it is not known. The link to a near node may
    be a faster one: 2 where so many processors can feed them."""
    if round_trip_s is not None and round_trip_s < NEAR_S:
        return 2 if processors >= _MANY_PROCESSORS else 1
    needed = math.ceil(_FIRST_GUESS_BYTES_PER_S * (round_trip_s or 0.0) / _WINDOW_BYTES)
    return max(1, min(_FIRST_GUESS_AT_MOST, needed))


class StreamCount:
    """Tells the number of streams from how many bytes have arrived when.

    It doubles while the rate rises, goes back when a step did not pay, and then holds, longer each time; a rate that
    falls by itself ends the hold. After a hold one step up or one step down is tried in turn. Where processors are the
    limit, which the first bytes tell, the first step takes half of them, and none takes more: sixteen that both send to
    themselves and receive did best so.
    """

    def __init__(self, policy: StreamPolicy, bandwidth_limit_bytes_per_s: float | None = None) -> None:
        most = policy.at_most
        if bandwidth_limit_bytes_per_s is not None:
            # A limited transfer gains nothing by more streams than fill it, and each must be fed within its idle time.
            most = max(1, min(most, int(bandwidth_limit_bytes_per_s / _BYTES_PER_S_OF_A_STREAM)))
        self._fixed = policy.fixed
        self._most = policy.fixed or most
        self._wanted = policy.fixed or 1
        self._doubling = True
        self._tried_from: tuple[int, float] | None = None
        self._rate_held = 0.0
        self._hold_s = HOLD_S
        self._hold_until = float("-inf")
        self._next_step_up = True
        self._since: tuple[float, int] | None = None
        self._settled_at: float | None = None
        self._times = _FAR
        self._processors = 0
        self._first_seen: tuple[float, int] | None = None
        self._is_judged = False

    @property
    def is_far(self) -> bool:
        return self._times is _FAR

    @property
    def wanted(self) -> int:
        return self._wanted

    def observe(self, now_s: float, bytes_arrived: int, open_streams: int) -> int:
        """`bytes_arrived` grows from the start of the transfer. Returns how many streams there should be."""
        if self._fixed is not None or bytes_arrived <= 0:
            return self._wanted
        self._look_first(now_s, bytes_arrived)
        if open_streams != self._wanted:
            self._settled_at = self._since = None
            return self._wanted
        if self._settled_at is None:
            self._settled_at = now_s
        if now_s - self._settled_at < self._times.settle_s:
            return self._wanted
        if self._since is None:
            self._since = (now_s, bytes_arrived)
            return self._wanted
        then_s, bytes_then = self._since
        is_much = bytes_arrived - bytes_then >= MANY_BYTES
        if now_s - then_s < (self._times.measure_much_s if is_much else self._times.measure_s):
            return self._wanted
        self._since = (now_s, bytes_arrived)
        self._judge(now_s, max(0, bytes_arrived - bytes_then) / (now_s - then_s))
        return self._wanted

    def disregard(self) -> int:
        """What arrives now tells nothing of the streams: measure anew from the next observation on."""
        self._tried_from = self._settled_at = self._since = self._first_seen = None
        return self._wanted

    def path_is(self, round_trip_s: float | None, processors: int) -> int:
        """The path became known, before anything has arrived: start with what it needs."""
        if round_trip_s is not None and round_trip_s < NEAR_S:
            self._times = _NEAR
        self._processors = processors
        if self._fixed is None and self._tried_from is None and self._wanted == 1:
            self._go(min(self._most, first_guess(round_trip_s, processors)))
        return self._wanted

    def refused(self, now_s: float, open_streams: int) -> int:
        """The node turned a stream away: no more than what is open, at least for as long as the longest hold."""
        if open_streams < self._wanted:
            self._most = max(1, min(self._most, open_streams))
            self._wanted = self._most
            self._tried_from = None
            self._hold(now_s)
        return self._wanted

    def _look_first(self, now_s: float, bytes_arrived: int) -> None:
        """Step up at once where processors are the limit, however many streams are open yet."""
        if self._is_judged or self.is_far:
            return
        if self._first_seen is None:
            self._first_seen = now_s, bytes_arrived
        seconds, count = now_s - self._first_seen[0], bytes_arrived - self._first_seen[1]
        if seconds >= _FIRST_LOOK_S and count >= _FIRST_LOOK_BYTES:
            self._first_seen = None
            if count / seconds >= _PROCESSORS_LIMIT_BYTES_PER_S:
                self._judge(now_s, count / seconds)

    def _judge(self, now_s: float, rate: float) -> None:
        self._is_judged = True
        if self._tried_from is not None:
            self._judge_step(now_s, rate)
        elif now_s >= self._hold_until or rate < _FELL * self._rate_held:
            if rate < _FELL * self._rate_held:
                self._hold_s, self._next_step_up = HOLD_S, True
            self._step(now_s, rate)
        else:
            # Slowly follows a rate that drifts, so that only a sudden fall counts as one.
            self._rate_held += 0.25 * (rate - self._rate_held)

    def _judge_step(self, now_s: float, rate: float) -> None:
        before, rate_before = self._tried_from or (self._wanted, rate)
        if self._wanted > before:
            is_good = rate >= rate_before * (1 + _WORTH_IT * (self._wanted / before - 1))
        else:
            is_good = rate >= rate_before * _NO_WORSE
        was_up = self._wanted > before
        self._tried_from = None
        if is_good:
            self._rate_held = rate
            self._next_step_up = was_up
            self._step(now_s, rate)
            return
        self._doubling = False
        self._rate_held = rate_before
        self._next_step_up = not was_up
        self._go(before)
        self._hold(now_s)

    def _step(self, now_s: float, rate: float) -> None:
        target = self._one_step_up(rate) if self._next_step_up else max(1, self._wanted - 1)
        if target == self._wanted:
            self._rate_held = rate
            self._next_step_up = not self._next_step_up
            self._hold(now_s)
            return
        self._tried_from = (self._wanted, rate)
        self._go(target)

    def _one_step_up(self, rate: float) -> int:
        target = self._wanted + (self._wanted if self._doubling else 1)
        if not self.is_far and rate >= _PROCESSORS_LIMIT_BYTES_PER_S:
            target = max(self._wanted, 2, self._processors // 2)
        return min(self._most, target)

    def _go(self, target: int) -> None:
        self._wanted = target
        self._settled_at = self._since = None

    def _hold(self, now_s: float) -> None:
        self._hold_until = now_s + self._hold_s
        self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S)
