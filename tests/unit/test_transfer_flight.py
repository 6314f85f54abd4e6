"""A lane's window: what it sent and what is not acknowledged, without what it took to pack first."""

from __future__ import annotations

from orchestrator.transfer.flight import WINDOW_BYTES, Flight
from remote_payload.wire.chunk_table import ChunkTable, pack_chunks
from remote_payload.wire.chunks import CHUNK_BYTES, Chunk

COUNT = 12
IN_WINDOW = WINDOW_BYTES // CHUNK_BYTES


def new_flight() -> Flight:
    chunks = tuple(Chunk(number * CHUNK_BYTES, CHUNK_BYTES, f"{number:064x}") for number in range(COUNT))
    return Flight(ChunkTable(pack_chunks(chunks), COUNT * CHUNK_BYTES))


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
    assert flight.next_chunk(other, 0.0) == (9, False)
