"""Packed chunks: themselves again after unpacking, smaller where floats allow it, refused where they are damaged."""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import time
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.transfer.channel import StreamDamagedError
from orchestrator.transfer.packing import SPARE_CHUNKS, Packer, Unpacker
from remote_payload.wire.codec import WireError
from remote_payload.wire.packing import WIDTHS, best_planes, pack, pack_floats, unpack
from remote_payload.wire.packing_rates import MIN_BYTES, PackingRates, packing_pays
from remote_payload.wire.stream import PACKED_ENCODING, RAW_ENCODING
from tests.support.floats import bfloat16, float32

MIB = 1024 * 1024


def upcast(count: int) -> bytes:
    whole = bytearray(float32(count))
    whole[::4] = whole[1::4] = bytes(count)
    return bytes(whole)


@given(st.one_of(st.binary(max_size=600), st.builds(lambda b, n: b * n, st.binary(max_size=9), st.integers(0, 300))))
def test_any_bytes_at_any_width_are_themselves_again(data: bytes) -> None:
    for width in WIDTHS:
        assert unpack(pack(data, width), len(data)) == data
        longer = bytearray(b"\xa5" * (len(data) + 9))
        assert unpack(memoryview(pack(data, width, (width - 1,))), len(data), longer) == data
        assert longer[len(data) :] == b"\xa5" * 9


def exponents(count: int) -> bytes:
    """As those of weights, with some that are rare."""
    return bytes(
        random.Random(count).choices(range(90, 120), [2.0 ** -abs(place) for place in range(-15, 15)], k=count)
    )


KINDS = (bytes, random.Random(4).randbytes, exponents, lambda count: bfloat16(1000) * (count // 2000 + 1))


@given(pieces=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 20_000)), min_size=1, max_size=6))
def test_a_chunk_of_which_only_parts_are_floats_is_itself_again(
    pieces: list[tuple[Callable[[int], bytes], int]],
) -> None:
    data = b"".join(make(count)[:count] for make, count in pieces)
    packed = pack_floats(data)
    assert packed is None or (len(packed) < len(data) and unpack(packed, len(data)) == data)


@pytest.mark.parametrize(("make", "width"), [(bfloat16, 2), (float32, 4), (upcast, 4)])
def test_only_the_plane_of_exponents_is_coded(
    make: Callable[[int], bytes], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, new_coder, coded = make(200_000), zlib.compressobj, 0

    class Coder:
        def __init__(self, *settings: int) -> None:
            self._coder = new_coder(*settings)
            self.flush = self._coder.flush

        def compress(self, plane: bytes) -> bytes:
            nonlocal coded
            coded += len(plane)
            return self._coder.compress(plane)

    best = best_planes(data)
    monkeypatch.setattr(zlib, "compressobj", Coder)
    pack(data, best.width, best.coded)
    assert coded == len(data) // width // 2  # a byte for two exponents


@pytest.mark.parametrize(("make", "width", "at_most"), [(bfloat16, 2, 0.70), (float32, 4, 0.86), (upcast, 4, 0.36)])
def test_floats_are_recognised_and_shrink(make: Callable[[int], bytes], width: int, at_most: float) -> None:
    data = make(200_000)
    assert best_planes(data).width == width
    assert len(pack(data, width)) < at_most * len(data)


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 4097, 300_001, 300_002])
@pytest.mark.parametrize("values", [1, 2, 15, 16, 17, 256])
def test_planes_of_few_and_of_many_values_are_themselves_again(count: int, values: int) -> None:
    source = random.Random(values)
    some = bytes(source.sample(range(256), values))
    # All but the first 15 are rare, and stand at either end too.
    weights = [1.0 if place < 15 else 0.001 for place in range(values)]
    plane = some[-1:] + bytes(source.choices(some, weights, k=count)) + some[-1:]
    packed = pack(plane, 1)
    assert unpack(packed, len(plane)) == plane
    with contextlib.suppress(WireError):
        assert unpack(packed, len(plane) + 1) != plane


def test_a_paired_plane_with_too_many_other_values_or_too_few_is_refused() -> None:
    plane = exponents(100_000)
    body = pack(plane, 1)
    width, kind, length, common, count = struct.unpack_from(">BBI15sI", body)
    begin = struct.calcsize(">BBI15sI")
    assert (width, kind) == (1, 3)
    assert 0 < count < len(plane) / 64
    others, pairs = body[begin : begin + count], body[begin + count :]
    for wrong, reason in ((bytes(len(plane) // 64 + 1), "too many"), (others[1:], "lacks")):
        length = 19 + len(wrong) + len(pairs)
        head = struct.pack(">BBI15sI", width, kind, length, common, len(wrong))
        with pytest.raises(WireError, match=reason):
            unpack(head + wrong + pairs, len(plane))


def test_noise_is_recognised_as_what_does_not_shrink() -> None:
    assert best_planes(random.Random(1).randbytes(MIN_BYTES)).ratio > 0.99


@given(body=st.binary(max_size=200), length=st.integers(0, 500))
def test_no_body_unpacks_to_another_length(body: bytes, length: int) -> None:
    with contextlib.suppress(WireError):
        assert len(unpack(body, length)) == length


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_body_is_refused_or_has_the_chunks_length(at: int, flip: int) -> None:
    data = bfloat16(500)
    body = bytearray(pack(data, 2))
    body[at % len(body)] ^= flip
    with contextlib.suppress(WireError):
        assert len(unpack(bytes(body), len(data))) == len(data)


def test_a_bomb_is_refused_without_being_inflated() -> None:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(coder.compress(bytes(1 << 20)) for _ in range(64)) + coder.flush()
    body = bytes((1,)) + struct.pack(">BI", 1, len(bomb)) + bomb
    with pytest.raises(WireError, match="longer"):
        unpack(body, 1000)


def test_chunks_are_unpacked_one_after_the_other_into_the_same_memory() -> None:
    unpacker, memories = Unpacker(PackingRates()), []
    for data in (bfloat16(5000), exponents(999), b"", bfloat16(4000)):
        with unpacker.unpacked(memoryview(pack(data, 2)), len(data)) as unpacked:
            assert unpacked == data
            memories.append(unpacked.obj)
        with pytest.raises(StreamDamagedError), unpacker.unpacked(memoryview(b"\3"), len(data)):
            pytest.fail("a body that is none was unpacked")
    assert all(memory is memories[0] for memory in memories)


def test_chunks_that_are_unpacked_at_once_do_not_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.transfer.packing.usable_processors", lambda: 2)
    unpacker, one, other = Unpacker(PackingRates()), bfloat16(500), bfloat16(400)
    with (
        unpacker.unpacked(memoryview(pack(one, 2)), len(one)) as first,
        unpacker.unpacked(memoryview(pack(other, 2)), len(other)) as second,
    ):
        assert (first, second) == (one, other)


class Clock:
    """A clock that is moved by hand, and by `packing_s` with each look that a packer takes at it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.packing_s = 0.0

    def __call__(self) -> float:
        if threading.current_thread().name.startswith("packer"):
            self.now_s += self.packing_s
        return self.now_s


def new_packer(clock: Clock, workers: int) -> Packer:
    return Packer(PackingRates(clock), clock, workers)


def send(packer: Packer, clock: Clock, bytes_per_s: float, pieces: int, piece_bytes: int, streams: int = 1) -> None:
    """Hand over so many pieces, each of which takes a link of that rate its time."""
    with contextlib.ExitStack() as stack:
        for _ in range(streams):
            stack.enter_context(packer.rates.moving())
        for _ in range(pieces):
            clock.now_s += piece_bytes / bytes_per_s
            for _ in range(streams):
                packer.rates.note_moved(piece_bytes // streams)


def over_link(bytes_per_s: float, workers: int = 1, streams: int = 1) -> Packer:
    """A packer that has measured such a link for a second, shared by so many streams."""
    clock = Clock()
    packer = new_packer(clock, workers)
    send(packer, clock, bytes_per_s, 100, int(bytes_per_s / 100), streams)
    clock.now_s += 1000.0  # nobody sends: this says nothing of the link
    return packer


def pays(packer: Packer) -> bool:
    """Whether the rates alone say so, though no chunk was packed for a while."""
    packer.rates.note_tried()
    return packer.pays


def no_read(offset: int, length: int) -> bytes:
    pytest.fail("the file was read for nothing")


def test_chunks_go_packed_only_where_the_link_is_slower_than_packing() -> None:
    data = bfloat16(MIN_BYTES)
    chunk = over_link(1e6).begin(0, len(data), lambda offset, length: data)
    assert chunk is not None
    encoding, packed = chunk.result()
    assert encoding == PACKED_ENCODING
    assert unpack(packed, len(data)) == data
    fast = over_link(1e9)
    fast.rates.note_tried()
    assert fast.begin(0, len(data), no_read) is None


def test_until_the_link_is_measured_one_chunk_is_packed_for_each_worker() -> None:
    clock, data = Clock(), bfloat16(MIN_BYTES)
    packer = new_packer(clock, workers=2)
    begun = [packer.begin(0, len(data), lambda offset, length: data) for _ in range(3)]
    assert [chunk is not None for chunk in begun] == [True, True, False]
    send(packer, clock, 1e6, 1, MIB)
    assert packer.begin(0, len(data), lambda offset, length: data) is not None


def test_a_link_is_compared_with_all_packers_together() -> None:
    assert not pays(over_link(200e6, workers=1))
    assert pays(over_link(200e6, workers=2))


def test_what_packers_do_not_get_to_goes_as_it_is_so_they_may_be_somewhat_slower_than_the_link() -> None:
    assert pays(over_link(110e6, workers=1))  # a packer is taken for 80 until one was measured
    assert not pays(over_link(120e6, workers=1))


def test_streams_that_send_at_once_are_measured_as_one_link() -> None:
    packer = over_link(140e6, streams=2)  # though each sees 70
    assert not pays(packer)
    with packer.rates.moving():
        packer.rates.note_moved(1)
    assert not pays(packer)


@pytest.mark.parametrize(("slow", "pieces"), [(20e6, 40), (1e6, 2), (50e3, 1)])
def test_a_link_that_becomes_slow_gets_packed_chunks_soon(slow: float, pieces: int) -> None:
    clock = Clock()
    packer = new_packer(clock, workers=1)
    send(packer, clock, 1e9, 10_000, MIB)
    assert not pays(packer)
    send(packer, clock, slow, pieces, MIB)
    assert pays(packer)
    send(packer, clock, 1e9, 3000, MIB)
    assert not pays(packer)


def test_the_time_that_a_lost_stream_stood_still_is_not_the_links() -> None:
    clock = Clock()
    packer = new_packer(clock, workers=1)
    send(packer, clock, 1e9, 4000, MIB)
    with contextlib.suppress(OSError), packer.rates.moving():
        clock.now_s += 60.0
        raise BrokenPipeError
    send(packer, clock, 1e9, 400, MIB)
    assert not pays(packer)


def test_what_a_lost_stream_had_packed_is_given_to_the_next_one_that_asks() -> None:
    packer = over_link(1e5)
    data = bfloat16(MIN_BYTES)
    chunk = packer.begin(7, len(data), lambda offset, length: data)
    assert chunk is not None
    packer.leave(7, len(data), chunk)
    assert packer.begin(7, len(data), no_read) is chunk
    assert packer.begin(7, len(data), lambda offset, length: data) is not chunk


@pytest.mark.parametrize(
    ("link", "packers", "untried_s", "pays"),
    [
        (None, 160e6, 9.0, False),  # nothing is known of the link
        (100e6, 160e6, 0.0, True),
        (159e6, 160e6, 0.0, True),
        (161e6, 160e6, 1.9, False),
        (100e6, 1e6, 2.0, True),  # are they slower than they are now?
    ],
)
def test_packing_pays_on_a_slower_link_and_is_tried_now_and_then_on_a_faster_one(
    link: float | None, packers: float, untried_s: float, pays: bool
) -> None:
    assert packing_pays(link, packers, untried_s) is pays


def test_packers_that_were_slow_for_a_while_are_measured_again_by_one_chunk_after_a_while() -> None:
    clock = Clock()
    packer = new_packer(clock, workers=1)
    data = bfloat16(MIN_BYTES)

    def packs_one() -> bool:
        chunk = packer.begin(0, len(data), lambda offset, length: data)
        if chunk is not None:
            assert chunk.result()[0] == PACKED_ENCODING
            packer.end(chunk)
        return chunk is not None

    send(packer, clock, 5e6, 100, MIB)
    clock.packing_s = 0.2  # another program has the processor
    while packs_one():
        pass
    clock.now_s += 1.0
    assert not packs_one()
    clock.now_s += 1.5
    assert [packs_one(), packs_one()] == [True, False]  # one chunk tells that they are slow still
    clock.packing_s = 0.001
    clock.now_s += 2.5
    assert [packs_one() for _ in range(9)] == [True] * 9


def test_what_does_not_shrink_is_looked_at_now_and_then_on_a_fast_link() -> None:
    clock = Clock()
    packer = new_packer(clock, workers=1)
    data = random.Random(3).randbytes(MIN_BYTES)
    send(packer, clock, 1e9, 4000, MIB)
    for _ in range(2):
        chunk = packer.begin(0, len(data), lambda offset, length: data)
        assert chunk is not None
        assert chunk.result() == (RAW_ENCODING, data)
        packer.end(chunk)
        assert packer.begin(0, len(data), no_read) is None
        clock.now_s += 2.5


def test_what_does_not_shrink_goes_as_it_is_on_any_link() -> None:
    data = random.Random(2).randbytes(MIN_BYTES)
    chunk = over_link(1e5).begin(0, len(data), lambda offset, length: data)
    assert chunk is not None
    assert chunk.result() == (RAW_ENCODING, data)


def test_chunks_ahead_are_bounded_and_a_place_is_free_again_once_its_chunk_is_sent() -> None:
    packer = over_link(1e5)
    data = bfloat16(MIN_BYTES)
    chunks = [packer.begin(0, len(data), lambda offset, length: data) for _ in range(9)]
    held = [chunk for chunk in chunks if chunk is not None]
    assert len(held) == 1 + SPARE_CHUNKS
    for chunk in held:
        chunk.result()
    assert packer.begin(0, len(data), no_read) is None
    packer.end(held[0])
    assert packer.begin(0, len(data), lambda offset, length: data) is not None


def test_a_closed_packer_reads_nothing_any_more() -> None:
    packer = over_link(1e5)
    go_on, reads = threading.Event(), []

    def read(offset: int, length: int) -> bytes:
        reads.append(1)
        assert go_on.wait(30)
        return bytes(MIN_BYTES)

    begun = [packer.begin(0, MIN_BYTES, read) for _ in range(2)]
    deadline = time.monotonic() + 30
    while not reads and time.monotonic() < deadline:
        time.sleep(0.001)
    closing = threading.Thread(target=packer.close)
    closing.start()
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    assert all(chunk is not None and chunk.done() for chunk in begun)
    assert packer.begin(0, MIN_BYTES, no_read) is None
