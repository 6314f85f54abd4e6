"""The stream protocol's frames and tables: what is written is read back, and nothing damaged passes."""

from __future__ import annotations

import hashlib
import io
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remote_payload.wire.chunk_table import (
    ChunkTable,
    decode_bitmap,
    encode_bitmap,
    manifest_pages,
    pack_chunks,
    page_chunk_count,
)
from remote_payload.wire.chunks import CHUNK_BYTES, file_digest
from remote_payload.wire.codec import WireError, from_json
from remote_payload.wire.messages import ListedFile
from remote_payload.wire.stream import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    DamagedStreamError,
    FinishedFacts,
    FrameHeader,
    FrameKind,
    FrameReader,
    decode_header,
    decode_json,
    encode_data_header,
    encode_frame,
    encode_json_frame,
)
from tests.support.agent_streams import manifest_of

CONTROL_KINDS = st.sampled_from([kind for kind in FrameKind if kind is not FrameKind.DATA])


def reader_of(data: bytes) -> FrameReader:
    source = io.BytesIO(data)

    def fill(view: memoryview) -> None:
        if source.readinto(view) != len(view):
            raise EOFError

    return FrameReader(fill)


def read_control(data: bytes) -> tuple[FrameHeader, bytes]:
    reader = reader_of(data)
    header = reader.header()
    return header, reader.body(header)


@pytest.mark.parametrize("mtime_ns", [2**63, -(2**63) - 1])
def test_a_listed_file_with_a_time_that_no_disk_could_hold_is_malformed(mtime_ns: int) -> None:
    with pytest.raises(WireError):
        from_json(ListedFile, {"name": "a", "size": 1, "mtime_ns": mtime_ns, "inode": 1})


@given(CONTROL_KINDS, st.integers(0, 2**64 - 1), st.binary(max_size=2000))
def test_a_control_frame_is_read_back_as_it_was_written(kind: FrameKind, argument: int, body: bytes) -> None:
    header, read = read_control(encode_frame(kind, argument, body))
    assert (header.kind, header.argument, read) == (kind, argument, body)


@given(CONTROL_KINDS, st.binary(max_size=40), st.data())
def test_no_flipped_bit_in_a_control_frame_passes(kind: FrameKind, body: bytes, data: st.DataObject) -> None:
    frame = bytearray(encode_frame(kind, 7, body))
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DamagedStreamError):
        read_control(bytes(frame))


@given(st.integers(0, HEADER_BYTES * 8 - 1), st.integers(0, 2**64 - 1), st.integers(0, CHUNK_BYTES))
def test_no_flipped_bit_in_a_data_header_passes_as_data(bit: int, argument: int, length: int) -> None:
    frame = bytearray(encode_data_header(argument, length))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DamagedStreamError):
        decode_header(bytes(frame))


@pytest.mark.parametrize("length", [MAX_CONTROL_BYTES + 1, 2**32 - 1])
def test_a_control_frame_that_would_not_fit_in_memory_is_refused_by_its_header(length: int) -> None:
    bare = encode_frame(FrameKind.MANIFEST)[:6] + length.to_bytes(4, "big") + bytes(8)
    with pytest.raises(DamagedStreamError, match="too long"):
        decode_header(bare + zlib.crc32(bare).to_bytes(4, "big"))


def test_a_data_frame_longer_than_a_chunk_is_refused() -> None:
    with pytest.raises(DamagedStreamError, match="too long"):
        decode_header(encode_data_header(0, CHUNK_BYTES + 1))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"path": 1, "digest": "", "size": 0}', b"[" * 100_000])
def test_a_malformed_json_body_is_a_damaged_stream(body: bytes) -> None:
    with pytest.raises(DamagedStreamError):
        decode_json(FinishedFacts, body)


def test_a_json_frame_carries_a_dataclass() -> None:
    facts = FinishedFacts("/a/ü\n", "v1:00", 3)
    _, body = read_control(encode_json_frame(FrameKind.FINISHED, facts))
    assert decode_json(FinishedFacts, body) == facts


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=20))
def test_a_chunk_table_gives_back_the_manifest_it_was_packed_from(content: bytes, cuts: list[int]) -> None:
    manifest = manifest_of(content, cuts)
    table = ChunkTable(pack_chunks(manifest.chunks), manifest.size)
    assert table.manifest() == manifest
    assert table.file_digest() == file_digest(manifest.chunks)
    for index, chunk in enumerate(manifest.chunks):
        assert (table.offset(index), table.length(index), table.sha256(index).hex()) == (
            chunk.offset,
            chunk.length,
            chunk.sha256,
        )


@pytest.mark.parametrize(
    ("lengths", "size"), [([5], 4), ([5], 6), ([0, 5], 5), ([CHUNK_BYTES + 1], CHUNK_BYTES + 1), ([], 1)]
)
def test_a_chunk_table_that_does_not_cover_the_file_exactly_is_refused(lengths: list[int], size: int) -> None:
    packed = b"".join(length.to_bytes(4, "big") + hashlib.sha256().digest() for length in lengths)
    with pytest.raises(WireError):
        ChunkTable(packed, size)


def test_a_chunk_table_with_half_an_entry_is_refused() -> None:
    with pytest.raises(WireError):
        ChunkTable(b"\0" * 35, 0)


def test_manifest_pages_join_to_the_table() -> None:
    packed = bytes(36) * 40_000
    pages = list(manifest_pages(packed))
    assert b"".join(page for _, page in pages) == packed
    assert [first for first, _ in pages] == [0, 16_384, 32_768]
    assert sum(page_chunk_count(page) for _, page in pages) == 40_000
    assert all(len(page) <= MAX_CONTROL_BYTES for _, page in pages)


@pytest.mark.parametrize("page", [b"", b"\0" * 35, b"\0" * 37])
def test_a_manifest_page_of_no_whole_entries_is_refused(page: bytes) -> None:
    with pytest.raises(DamagedStreamError):
        page_chunk_count(page)


@given(st.lists(st.booleans(), max_size=100))
def test_a_bitmap_gives_back_its_flags(flags: list[bool]) -> None:
    assert list(map(bool, decode_bitmap(encode_bitmap(bytearray(flags)), len(flags)))) == flags


def test_a_bitmap_of_another_length_is_refused() -> None:
    with pytest.raises(DamagedStreamError):
        decode_bitmap(b"\0\0", 8)
