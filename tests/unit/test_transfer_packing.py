"""Packed chunks: themselves again after unpacking, smaller where floats allow it, refused where they are damaged."""

from __future__ import annotations

import array
import contextlib
import random
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.transfer.packing import MIN_BYTES, Packer, best_width
from remote_payload.wire.codec import WireError
from remote_payload.wire.packing import WIDTHS, pack, unpack


def float32(count: int) -> bytes:
    source = random.Random(count)
    return array.array("f", (source.gauss(0, 0.02) for _ in range(count))).tobytes()


def bfloat16(count: int) -> bytes:
    whole = float32(count)
    halves = bytearray(2 * count)
    halves[::2], halves[1::2] = whole[2::4], whole[3::4]
    return bytes(halves)


def upcast(count: int) -> bytes:
    whole = bytearray(float32(count))
    whole[::4] = whole[1::4] = bytes(count)
    return bytes(whole)


@given(st.one_of(st.binary(max_size=600), st.builds(lambda b, n: b * n, st.binary(max_size=9), st.integers(0, 300))))
def test_any_bytes_at_any_width_are_themselves_again(data: bytes) -> None:
    for width in WIDTHS:
        assert unpack(pack(data, width), len(data)) == data


@pytest.mark.parametrize(("make", "width", "at_most"), [(bfloat16, 2, 0.70), (float32, 4, 0.86), (upcast, 4, 0.36)])
def test_floats_are_recognised_and_shrink(make: Callable[[int], bytes], width: int, at_most: float) -> None:
    data = make(200_000)
    assert best_width(data)[0] == width
    assert len(pack(data, width)) < at_most * len(data)


def test_noise_is_recognised_as_what_does_not_shrink() -> None:
    assert best_width(random.Random(1).randbytes(MIN_BYTES))[1] > 0.99


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


def test_chunks_go_packed_only_where_the_link_is_slower_than_packing() -> None:
    data = bfloat16(MIN_BYTES)
    packer = Packer()
    assert packer.pack(len(data), lambda: data) is None  # nothing is known of the link
    packer.note_sent(8_000_000, 8.0)
    packed = packer.pack(len(data), lambda: data)
    assert packed is not None
    assert unpack(packed, len(data)) == data
    fast = Packer()
    fast.note_sent(8_000_000, 0.01)
    assert fast.pack(len(data), lambda: pytest.fail("the file was read for nothing")) is None


def test_what_does_not_shrink_goes_as_it_is_on_any_link() -> None:
    packer = Packer()
    packer.note_sent(8_000_000, 80.0)
    data = random.Random(2).randbytes(MIN_BYTES)
    assert packer.pack(len(data), lambda: data) is None
