"""Where files are cut: by their tensors, wherever those stand, and soundly whatever the file holds."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_payload.wire.chunks import CHUNK_BYTES, ChunkManifest, chunk_spans, digest_file
from remote_payload.wire.records import MIN_RECORD_BYTES

LARGE = MIN_RECORD_BYTES + 1000


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def torch_like_zip(pickle: bytes, records: list[bytes]) -> bytes:
    """Stored members whose data stand at multiples of 64, as torch's writer pads them."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in [("model/data.pkl", pickle), *((f"model/data/{n}", r) for n, r in enumerate(records))]:
            info = zipfile.ZipInfo(name)
            start = target.tell() + 30 + len(name) + 4
            info.extra = struct.pack("<2sH", b"FB", -start % 64) + b"Z" * (-start % 64)
            archive.writestr(info, data)
    return target.getvalue()


def safetensors(tensors: list[bytes], note: str = "") -> bytes:
    header: dict[str, object] = {"__metadata__": {"note": note}}
    reached = 0
    for number, data in enumerate(tensors):
        offsets = [reached, reached + len(data)]
        header[f"t{number}"] = {"dtype": "U8", "shape": [len(data)], "data_offsets": offsets}
        reached += len(data)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(tensors)


def manifest(content: bytes) -> ChunkManifest:
    return digest_file(io.BytesIO(content), len(content))


def new_bytes(before: bytes, after: bytes) -> int:
    known = {chunk.sha256 for chunk in manifest(before).chunks}
    return sum(chunk.length for chunk in manifest(after).chunks if chunk.sha256 not in known)


@pytest.mark.parametrize("grown_by", [1, 63, 64, 1000])
def test_a_pickle_that_grows_costs_no_more_than_itself_and_the_gaps(grown_by: int) -> None:
    records = [noise(LARGE + n, n) for n in range(5)]
    before = torch_like_zip(b"p" * 500, records)
    after = torch_like_zip(b"p" * (500 + grown_by), records)
    assert new_bytes(before, after) < len(after) - sum(map(len, records)) + 1


def test_a_record_that_changes_costs_no_more_than_itself_and_the_gaps() -> None:
    records = [noise(LARGE + n, n) for n in range(5)]
    before = torch_like_zip(b"p" * 500, records)
    records[2] = noise(LARGE + 2, 99)
    assert new_bytes(before, torch_like_zip(b"p" * 500, records)) < LARGE + 2 + 3000


def test_a_safetensors_header_that_grows_costs_itself_alone() -> None:
    tensors = [noise(LARGE + n, n) for n in range(4)]
    before, after = safetensors(tensors), safetensors(tensors, "epoch 4 of 9")
    assert new_bytes(before, after) == len(after) - sum(map(len, tensors))


def test_small_records_are_bundled_with_their_neighbours() -> None:
    content = torch_like_zip(b"p", [noise(100, n) for n in range(500)])
    assert len(manifest(content).chunks) == 1


def test_a_record_longer_than_a_chunk_is_cut_from_its_own_start() -> None:
    record = noise(CHUNK_BYTES + LARGE, 3)
    lengths = [chunk.length for chunk in manifest(torch_like_zip(b"p", [record])).chunks]
    assert lengths[1:3] == [CHUNK_BYTES, LARGE]


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["zip", "safetensors", "noise"]),
    sizes=st.lists(st.integers(0, 3 * MIN_RECORD_BYTES), max_size=5),
    cut_off=st.integers(0, 300_000),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), max_size=4),
)
def test_chunks_cover_every_byte_of_any_file_in_order(
    kind: str, sizes: list[int], cut_off: int, damage: list[tuple[int, bytes]]
) -> None:
    parts = [noise(size, number) for number, size in enumerate(sizes)]
    whole = {"zip": lambda: torch_like_zip(b"p", parts), "safetensors": lambda: safetensors(parts)}
    content = bytearray(whole[kind]() if kind in whole else b"".join(parts))
    for at, data in damage:
        content[at % (len(content) + 1) :][: len(data)] = data
        start = at % (len(content) + 1)
        content[start : start + len(data)] = data[: max(0, len(content) - start)]
    size = max(0, len(content) - (cut_off if cut_off % 2 else 0))
    reached = 0
    for offset, length in chunk_spans(io.BytesIO(bytes(content[:size])), size):
        assert offset == reached
        assert 0 < length <= CHUNK_BYTES
        reached += length
    assert reached == size


@pytest.mark.parametrize(
    "header",
    [
        b"{" * 1000,
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a": {"data_offsets": [0, 1e400]}}',
        b'{"a": {"data_offsets": [-5, 99999999999999999999]}, "b": {"data_offsets": [true, false]}, "c": 3, "d": null}',
        b"[1, 2]",
        b'{"a": {"data_offsets": [0, 99999999]}, "b": {"data_offsets": [5, 99999]}}',
        b"{\xff}",
    ],
)
def test_a_hostile_safetensors_header_only_changes_where_the_file_is_cut(header: bytes) -> None:
    content = struct.pack("<Q", len(header)) + header + noise(2 * LARGE, 1)
    spans = list(chunk_spans(io.BytesIO(content), len(content)))
    assert sum(length for _, length in spans) == len(content)
