"""A lane's window: what it sent and what is not acknowledged, without what it took to pack first."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.transfer.channel import StreamDamagedError
from orchestrator.transfer.flight import WINDOW_BYTES, Flight, Lane
from remote_payload.wire.chunk_table import ChunkTable, pack_chunks
from remote_payload.wire.chunks import CHUNK_BYTES, Chunk

COUNT = 12
PATIENCE_S = 20.0
IN_WINDOW = WINDOW_BYTES // CHUNK_BYTES


def new_flight(order: Sequence[int] | None = None, *, is_growing: bool = False) -> Flight:
    chunks = tuple(Chunk(number * CHUNK_BYTES, CHUNK_BYTES, f"{number:064x}") for number in range(COUNT))
    return Flight(ChunkTable(pack_chunks(chunks), COUNT * CHUNK_BYTES), order, is_growing=is_growing)


def test_a_lane_takes_no_more_than_its_window_and_goes_on_with_what_is_acknowledged() -> None:
    flight = new_flight()
    lane = flight.join(bytearray(COUNT))
    assert [flight.next_chunk(lane, 0.0) for _ in range(IN_WINDOW)] == [(number, False) for number in range(IN_WINDOW)]
    assert flight.chunk_ahead(lane, 0) is None
    flight.acknowledge(lane, 1)
    assert flight.chunk_ahead(lane, 0) == (IN_WINDOW, False)
    assert flight.chunk_ahead(lane, 0) is None


def test_what_is_not_sent_yet_leaves_the_window_to_others() -> None:
    flight = new_flight()
    lane = flight.join(bytearray(COUNT))
    taken = [flight.next_chunk(lane, 0.0)] + [flight.chunk_ahead(lane, count * CHUNK_BYTES) for count in (1, 2)]
    assert None not in taken
    unsent = len(taken) * CHUNK_BYTES
    sent = 0
    while flight.chunk_ahead(lane, unsent) is not None:
        sent += 1
    assert sent == IN_WINDOW
    flight.leave(lane)
    other = flight.join(bytearray(COUNT))
    assert flight.next_chunk(other, 0.0) == (0, False)


def test_what_the_node_is_to_copy_is_named_first_over_one_stream_and_counts_for_nothing() -> None:
    flight = new_flight()
    lane, other = flight.join(bytearray(COUNT)), flight.join(bytearray(COUNT))
    for index in (11, 10):
        flight.name(index)
    assert flight.next_chunk(lane, 0.0) == (11, False)
    assert flight.next_chunk(other, 0.0) == (0, False)
    assert [flight.next_chunk(lane, 0.0) for _ in range(2)] == [(10, False), (1, False)]
    assert [index for index in range(COUNT) if flight.is_named(index)] == [10, 11]
    assert (lane.in_flight, other.in_flight) == ({1}, {0})
    flight.name(9)
    flight.leave(lane)
    assert [flight.next_chunk(other, 0.0) for _ in range(4)] == [(11, False), (10, False), (9, False), (1, False)]


def test_a_flight_is_idle_once_the_node_is_done_with_what_it_is_to_copy() -> None:
    flight = new_flight((), is_growing=True)
    lane = flight.join(bytearray(COUNT))
    for index in (3, 5):
        flight.name(index)
        assert not flight.is_idle
        flight.next_chunk(lane, 0.0)
    flight.copied(lane, 1)
    assert not flight.is_idle
    flight.copied(lane, 1)
    assert flight.is_idle
    with pytest.raises(StreamDamagedError):
        flight.copied(lane, 1)


def test_lanes_that_wait_for_the_last_chunks_of_others_end_when_those_are_acknowledged() -> None:
    flight = new_flight()
    have = bytearray([1] * (COUNT - 2)) + bytearray(2)
    lane, other, third = (flight.join(have) for _ in range(3))
    first, second = flight.next_chunk(lane, 0.0), flight.next_chunk(other, 0.0)
    assert (first, second) == ((COUNT - 2, False), (COUNT - 1, False))
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(flight.next_chunk, one, PATIENCE_S) for one in (lane, other, third)]
        flight.acknowledge(lane, COUNT - 2)
        assert not any(future.done() for future in waiting)
        flight.acknowledge(other, COUNT - 1)
        assert [future.result(PATIENCE_S / 2) for future in waiting] == [None, None, None]


def test_a_lane_that_waits_for_room_in_its_window_goes_on_with_its_own_acknowledgement() -> None:
    flight = new_flight()
    lane, other = flight.join(bytearray(COUNT)), flight.join(bytearray(COUNT))
    for _ in range(IN_WINDOW):
        flight.next_chunk(lane, 0.0)
    following = flight.next_chunk(other, 0.0)
    assert following == (IN_WINDOW, False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(flight.next_chunk, lane, PATIENCE_S)
        flight.acknowledge(other, IN_WINDOW)
        flight.acknowledge(lane, 0)
        assert waiting.result(PATIENCE_S / 2) == (IN_WINDOW + 1, False)


def test_a_chunk_more_in_a_queue_in_which_others_wait_wakes_nobody() -> None:
    flight = new_flight((), is_growing=True)
    flight.join(bytearray(COUNT))
    flight.add(0)
    flight.name(1)
    seen = flight.await_change(0, 0.0)
    for index in range(2, COUNT, 2):
        flight.add(index)
        flight.name(index + 1)
    assert flight.await_change(seen, 0.0) == seen


def test_lanes_that_wait_get_every_chunk_that_is_added_and_named() -> None:
    flight = new_flight((), is_growing=True)
    lanes = [flight.join(bytearray(COUNT)) for _ in range(3)]

    def take_all(lane: Lane) -> list[int]:
        taken = []
        while (following := flight.next_chunk(lane, PATIENCE_S)) is not None:
            taken.append(following[0])
            if flight.is_named(following[0]):
                flight.copied(lane, 1)
            else:
                flight.acknowledge(lane, following[0])
        return taken

    with ThreadPoolExecutor(3) as pool:
        taking = [pool.submit(take_all, lane) for lane in lanes]
        for index in range(COUNT):
            (flight.name if index % 3 else flight.add)(index)
        while not flight.is_idle:
            flight.await_change(0, 0.01)
        flight.stop()
        assert sorted(index for lane in taking for index in lane.result()) == list(range(COUNT))
