"""Rates, limits and waits, on clocks of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConnectionLostError, IntegrityError
from orchestrator.transfer.channel import ReconnectNotice, ReconnectPolicy, StreamDamagedError, with_reconnects
from orchestrator.transfer.progress import ProgressMeter, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Opener:
    def __init__(self) -> None:
        self.reconnects = 0

    def reconnect(self) -> None:
        self.reconnects += 1


AT_ONCE = ReconnectPolicy(max_fruitless=3, first_wait_s=0, longest_wait_s=0)


@given(st.lists(st.integers(1, 300), min_size=20, max_size=60), st.floats(1, 10_000))
def test_a_bandwidth_limit_holds_over_any_pieces(pieces: list[int], rate: float) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, clock, clock.sleep)
    begun = clock.now
    for piece in pieces:
        bucket.take(piece)
    took = clock.now - begun
    assert took >= sum(pieces) / rate - 0.25 - 1e-6
    assert took <= sum(pieces) / rate + 1e-6


def test_pieces_are_small_enough_for_a_slow_limit_to_flow_evenly() -> None:
    assert TokenBucket(100_000.0).piece_bytes(1_000_000) == 25_000
    assert TokenBucket(None).piece_bytes(1_000_000) == 1_000_000
    assert TokenBucket(1.0).piece_bytes(1_000_000) == 1024


def test_no_limit_never_waits() -> None:
    clock = Clock()
    TokenBucket(None, clock, clock.sleep).take(10**12)
    assert clock.now == 100.0


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_that_lets_nothing_through_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="limit"):
        TokenBucket(limit)


def test_rate_and_remaining_time_are_of_the_last_seconds() -> None:
    clock = Clock()
    meter = ProgressMeter(1000, clock)
    meter.measure(0, 100)
    clock.now += 100
    meter.measure(10, 100)
    clock.now += 1
    progress = meter.measure(110, 100)
    assert progress.bytes_done == 210
    assert progress.bytes_saved == 100
    clock.now += 1
    progress = meter.measure(210, 100)
    assert progress.bytes_per_s == pytest.approx(100, rel=0.1)
    assert progress.eta_s == pytest.approx(6.9, rel=0.1)


def test_nothing_moved_means_no_estimate() -> None:
    clock = Clock()
    meter = ProgressMeter(1000, clock)
    meter.measure(0, 0)
    clock.now += 1
    assert meter.measure(0, 0).eta_s is None


def test_work_that_gets_on_is_never_given_up() -> None:
    opener, durable, calls = Opener(), 0, 0

    def work() -> str:
        nonlocal durable, calls
        calls += 1
        if calls > 20:
            return "done"
        durable += 1
        raise ConnectionLostError("cut")

    assert with_reconnects(opener, work, lambda: durable, AT_ONCE) == "done"  # type: ignore[arg-type]
    assert opener.reconnects == 20


def test_fruitless_work_is_given_up_with_its_own_error() -> None:
    opener, notices = Opener(), list[ReconnectNotice]()

    def work() -> None:
        raise ConnectionLostError("cut")

    with pytest.raises(ConnectionLostError, match="cut") as raised:
        with_reconnects(opener, work, lambda: 0, AT_ONCE, notices.append)  # type: ignore[arg-type]
    assert raised.value.action == "Run it again; what has arrived is kept."
    assert [notice.fruitless for notice in notices] == [1, 2, 3]
    assert opener.reconnects == 3


def test_a_damaged_stream_is_opened_anew_without_a_new_login() -> None:
    opener = Opener()
    left = [StreamDamagedError("bad frame"), StreamDamagedError("bad frame")]

    def work() -> int:
        if left:
            raise left.pop()
        return 1

    assert with_reconnects(opener, work, lambda: 0, AT_ONCE) == 1  # type: ignore[arg-type]
    assert opener.reconnects == 0


def test_what_no_stream_can_mend_is_not_tried_again() -> None:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        raise IntegrityError("changed")

    with pytest.raises(IntegrityError):
        with_reconnects(Opener(), work, lambda: 0, AT_ONCE)  # type: ignore[arg-type]
    assert calls == 1


@given(st.integers(0, 1000))
def test_waits_grow_to_their_bound_and_not_beyond(fruitless: int) -> None:
    policy = ReconnectPolicy(first_wait_s=0.5, longest_wait_s=15)
    assert 0.375 <= policy.wait_s(fruitless) <= 15
