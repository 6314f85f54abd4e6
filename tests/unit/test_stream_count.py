"""The number of streams, against simulated links, whose rate is a function of how many streams there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.transfer.stream_count import MAX_STREAMS, StreamCount, StreamPolicy, first_guess

MB = 1_000_000
TICK_S = 0.2


class Link:
    """Runs a controller over `rate(streams, now_s)`, in bytes/s; streams open at once."""

    def __init__(self, count: StreamCount, rate: Callable[[int, float], float]) -> None:
        self.count = count
        self.rate = rate
        self.now_s = 0.0
        self.arrived = 0.0
        self.seen: list[int] = []

    def run(self, seconds: float) -> int:
        """Returns how many streams there are in the end."""
        end = self.now_s + seconds
        while self.now_s < end:
            self.arrived += self.rate(self.count.wanted, self.now_s) * TICK_S
            self.now_s += TICK_S
            self.seen.append(self.count.observe(self.now_s, int(self.arrived), self.count.wanted))
        return self.seen[-1]


def lan(streams: int, _: float) -> float:
    return 118 * MB


def lossy(streams: int, _: float) -> float:
    return min(4 * MB * streams, 125 * MB)


def crowded(streams: int, _: float) -> float:
    """Rises to four streams and falls beyond."""
    return 30 * MB * min(streams, 4) * (1.0 if streams <= 4 else 0.8)


def test_a_link_that_one_stream_fills_gets_one_but_for_short_trials() -> None:
    link = Link(StreamCount(StreamPolicy()), lan)
    link.run(120)
    assert max(link.seen) <= 2
    assert link.seen.count(1) > 0.8 * len(link.seen)


def test_streams_grow_while_the_rate_grows_with_them() -> None:
    link = Link(StreamCount(StreamPolicy()), lossy)
    assert link.run(30) >= MAX_STREAMS - 1


@pytest.mark.parametrize(("round_trip_s", "streams"), [(0.0002, 8), (0.016, 2), (None, 2)])
def test_a_near_node_that_takes_what_eight_streams_send_gets_as_many_within_three_seconds(
    round_trip_s: float | None, streams: int
) -> None:
    link = Link(StreamCount(StreamPolicy()), lambda n, _: 300 * MB * min(n, 8))
    link.count.path_is(round_trip_s, 16)
    assert link.run(2.6) == streams


def processor_bound(streams: int, _: float) -> float:
    """Sixteen processors, eight of which encrypt and eight decrypt."""
    return 375 * MB * min(streams, 8)


def test_a_near_node_that_is_as_fast_as_processors_are_gets_half_of_them_at_once_and_no_more() -> None:
    link = Link(StreamCount(StreamPolicy()), processor_bound)
    link.count.path_is(0.0001, 16)
    link.run(30)
    steps = [count for count, before in zip(link.seen[1:], link.seen, strict=False) if count != before]
    assert steps[:1] == [8]
    assert max(link.seen) == 8


def test_the_first_bytes_tell_that_processors_are_the_limit_before_all_streams_are_open() -> None:
    count = StreamCount(StreamPolicy())
    assert count.path_is(0.0001, 16) == 2
    seen = [count.observe(tick * 0.05, tick * 30 * MB, 1) for tick in range(1, 5)]
    assert seen == [2, 2, 8, 8]


def test_processors_that_were_slow_to_begin_are_seen_to_be_the_limit_a_little_later() -> None:
    count = StreamCount(StreamPolicy())
    count.path_is(0.0001, 16)
    arrived = [300, 315, 330, 345, 400, 450, 500, 550]
    assert [count.observe(tick * 0.05, mb * MB, 1) for tick, mb in enumerate(arrived)][-2:] == [8, 8]


def test_the_first_bytes_of_a_slower_link_or_of_a_far_one_tell_nothing() -> None:
    for round_trip_s, rate in ((0.0001, 300 * MB), (0.02, 900 * MB)):
        count = StreamCount(StreamPolicy())
        before = count.path_is(round_trip_s, 16)
        assert [count.observe(tick * 0.05, int(tick * 0.05 * rate), 1) for tick in range(1, 9)][-1] == before


def test_a_machine_of_two_processors_sends_over_no_more_than_two_streams_where_these_are_the_limit() -> None:
    link = Link(StreamCount(StreamPolicy()), lambda n, _: 420 * MB if n <= 2 else 450 * MB)
    link.count.path_is(0.0001, 2)
    link.run(120)
    assert max(link.seen) == 2


def test_a_near_link_that_is_slower_than_processors_gets_more_streams_than_there_are_of_them() -> None:
    link = Link(StreamCount(StreamPolicy()), lossy)
    link.count.path_is(0.002, 2)
    assert link.run(30) >= MAX_STREAMS - 1


@pytest.mark.parametrize(("processors", "streams"), [(1, 1), (4, 1), (8, 2), (128, 2)])
def test_a_near_node_gets_more_streams_at_once_from_a_machine_that_can_feed_them(processors: int, streams: int) -> None:
    assert first_guess(0.0002, processors) == streams


def test_a_rate_of_three_chunks_is_no_reason_for_another_stream() -> None:
    link = Link(StreamCount(StreamPolicy()), lan)
    link.count.path_is(0.0002, 2)
    link.run(0.8)
    assert set(link.seen) == {1}


def test_what_was_measured_while_others_decided_the_rate_is_not_held_against_a_number_of_streams() -> None:
    count = StreamCount(StreamPolicy())
    link = Link(count, lossy)
    link.run(3.0)
    tried = count.wanted
    assert tried > 1
    link.rate = lambda _, __: MB
    assert count.disregard() == tried
    link.run(2.4)
    assert count.wanted >= tried


def test_a_rate_that_falls_with_more_streams_takes_them_back() -> None:
    link = Link(StreamCount(StreamPolicy()), crowded)
    link.run(120)
    assert link.seen.count(4) > 0.7 * len(link.seen)


def test_a_link_that_becomes_lossy_gets_more_streams_before_a_hold_is_over() -> None:
    link = Link(StreamCount(StreamPolicy()), lambda n, now_s: lan(n, now_s) if now_s < 60 else lossy(n, now_s))
    link.run(60)
    assert link.run(25) >= 8


def test_a_refused_login_means_no_more_than_there_are_and_is_no_failure() -> None:
    link = Link(StreamCount(StreamPolicy()), lossy)
    link.run(6)
    assert link.count.wanted > 2
    assert link.count.refused(link.now_s, 2) == 2
    assert link.run(60) <= 2


@pytest.mark.parametrize("open_streams", [0, 1])
def test_a_refusal_leaves_at_least_one_stream_wanted(open_streams: int) -> None:
    count = StreamCount(StreamPolicy(fixed=4))
    assert count.refused(0.0, open_streams) == 1


def test_a_fixed_number_is_kept_whatever_the_rate() -> None:
    link = Link(StreamCount(StreamPolicy(fixed=3)), crowded)
    link.run(60)
    assert set(link.seen) == {3}


def test_nothing_is_judged_while_streams_are_still_being_opened() -> None:
    count = StreamCount(StreamPolicy())
    assert [count.observe(second, second * MB, 0) for second in range(60)] == [1] * 60


def test_a_narrow_limit_allows_one_stream_and_a_wide_one_more() -> None:
    narrow = Link(StreamCount(StreamPolicy(), 1 * MB), lossy)
    wide = Link(StreamCount(StreamPolicy(), 20 * MB), lossy)
    assert narrow.run(60) == 1
    assert 1 < wide.run(60) <= 4


@pytest.mark.parametrize("number", [0, -1, MAX_STREAMS + 1])
def test_a_number_of_streams_that_makes_no_sense_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="streams"):
        StreamPolicy(fixed=number)


@pytest.mark.parametrize(
    ("round_trip_s", "wanted"), [(None, 1), (0.0, 1), (0.0002, 1), (0.016, 1), (0.03, 2), (0.06, 4), (5.0, 4)]
)
def test_a_long_path_starts_with_the_streams_that_fill_a_gigabit(round_trip_s: float | None, wanted: int) -> None:
    assert first_guess(round_trip_s, 2) == StreamCount(StreamPolicy()).path_is(round_trip_s, 2) == wanted


@pytest.mark.parametrize(
    ("policy", "limit", "wanted"),
    [(StreamPolicy(fixed=1), None, 1), (StreamPolicy(at_most=2), None, 2), (StreamPolicy(), 4.0 * 1024 * 1024, 1)],
)
def test_a_long_path_asks_for_no_more_than_is_allowed(policy: StreamPolicy, limit: float | None, wanted: int) -> None:
    assert StreamCount(policy, limit).path_is(0.2, 2) == wanted


def test_a_start_with_several_streams_is_climbed_from_and_taken_back_as_any() -> None:
    for rate, expected in ((lossy, range(12, MAX_STREAMS + 1)), (lan, range(1, 4))):
        count = StreamCount(StreamPolicy())
        assert count.path_is(0.06, 2) == 4
        assert Link(count, rate).run(900) in expected


def test_what_was_found_by_measuring_is_not_overridden_by_the_path() -> None:
    count = StreamCount(StreamPolicy())
    wanted = Link(count, lossy).run(30)
    assert count.path_is(0.06, 2) == wanted
