"""What the node has already is copied there, and verified; what it has not, or damaged, is sent."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import UnreachableError
from orchestrator.transfer.channel import FrameChannel, ReconnectPolicy
from orchestrator.transfer.source import LocalFile
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import UploadResult, upload_file
from remote_payload.agent.stored_chunks import manifest_lines
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.packing import pack
from remote_payload.wire.stream import PACKED_ENCODING
from tests.support.agent_streams import CutStream, ThreadOpener, check_stored, even_cuts, make_node_root, manifest_of
from tests.support.floats import float32

AT_ONCE = ReconnectPolicy(max_fruitless=3, first_wait_s=0.0, longest_wait_s=0.0)
NO_PATIENCE = ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0)
CHUNK = 1000


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def send(root: Path, content: bytes, cuts: list[int] | None = None) -> UploadResult:
    local = root.parent / "local"
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), CHUNK) if cuts is None else cuts)
    result = upload_file(ThreadOpener(root), local, manifest, retry=AT_ONCE)
    check_stored(root, manifest, content)
    return result


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


def stored_file(result: UploadResult) -> Path:
    return Path(result.path_on_node)


def test_only_what_changed_is_sent(root: Path) -> None:
    before = noise(50 * CHUNK)
    send(root, before)
    after = before[: 20 * CHUNK] + noise(CHUNK, 7) + before[21 * CHUNK :]
    result = send(root, after)
    assert (result.bytes_sent, result.bytes_saved, result.bytes_reused) == (CHUNK, 49 * CHUNK, 49 * CHUNK)


def test_chunks_are_found_in_any_checkpoint_of_the_store_and_at_any_offset(root: Path) -> None:
    parts = [noise(5 * CHUNK, seed) for seed in range(6)]
    for number, part in enumerate(parts):
        send(root, noise(number * CHUNK, 100 + number) + part)
    result = send(root, b"".join(reversed(parts)))
    assert (result.bytes_sent, result.bytes_reused) == (0, 30 * CHUNK)


def test_a_chunk_that_the_file_repeats_is_sent_once(root: Path) -> None:
    repeated, other = noise(CHUNK, 1), noise(CHUNK, 2)
    result = send(root, repeated * 20 + other + repeated * 3)
    assert (result.bytes_sent, result.bytes_saved, result.bytes_reused) == (2 * CHUNK, 22 * CHUNK, 0)


def test_a_damaged_source_is_not_believed(root: Path) -> None:
    before = noise(10 * CHUNK)
    stored = stored_file(send(root, before))
    stored.chmod(0o600)
    with stored.open("r+b") as file:
        file.seek(3 * CHUNK + 5)
        file.write(b"damage")
    result = send(root, before + noise(CHUNK, 3))
    assert (result.bytes_sent, result.bytes_reused) == (2 * CHUNK, 9 * CHUNK)


@pytest.mark.parametrize("kind", ["gone", "short", "link", "folder", "pipe", "no manifest", "garbage", "a link"])
def test_a_source_that_is_not_what_it_should_be_is_passed_over(root: Path, tmp_path: Path, kind: str) -> None:
    before = noise(10 * CHUNK)
    result = send(root, before)
    stored = stored_file(result)
    manifest = stored.parent / "chunks.json"
    if kind in ("gone", "link", "folder", "pipe"):
        stored.unlink()
    if kind == "short":
        stored.chmod(0o600)
        os.truncate(stored, 4 * CHUNK)
    elif kind == "link":
        other = tmp_path / "elsewhere"
        other.write_bytes(before)
        stored.symlink_to(other)
    elif kind == "folder":
        stored.mkdir()
    elif kind == "pipe":
        os.mkfifo(stored)
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "garbage":
        manifest.write_bytes(noise(100_000, 5) + b'\n{"offset": 99999999999999, "length": 1000, "sha256": "00"}\n')
    elif kind == "a link":
        shutil.move(manifest, tmp_path / "manifest")
        manifest.symlink_to(tmp_path / "manifest")
    again = send(root, noise(CHUNK, 9) + before)
    assert again.bytes_reused == (4 * CHUNK if kind == "short" else 0)
    assert again.bytes_sent == 11 * CHUNK - again.bytes_reused


def test_what_was_reused_before_a_cut_is_journalled_like_what_arrived(root: Path) -> None:
    before = noise(10 * CHUNK)
    send(root, before)
    content = before + noise(5 * CHUNK, 4)
    local = root.parent / "local"
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), CHUNK))
    opener = ThreadOpener(root, [lambda inner: CutStream(inner, 1500, None)] * 100)
    with pytest.raises(UnreachableError):
        upload_file(opener, local, manifest, retry=NO_PATIENCE, streams=StreamPolicy(fixed=1))
    shutil.rmtree(NodeLayout(str(root)).checkpoint_folder(manifest_of(before, even_cuts(len(before), CHUNK)).digest))
    result = upload_file(ThreadOpener(root), local, manifest, retry=AT_ONCE)
    assert result.bytes_reused == 0
    assert result.bytes_saved >= 10 * CHUNK
    check_stored(root, manifest, content)


BLOCKS = st.lists(st.integers(0, 9), max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    earlier=st.lists(st.tuples(BLOCKS, st.lists(st.integers(0, 4000), max_size=8)), max_size=3),
    blocks=BLOCKS,
    cuts=st.lists(st.integers(0, 4000), max_size=10),
    damage=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3000)), max_size=2),
    links=st.lists(st.integers(0, 6000), max_size=3),
    streams=st.integers(1, 4),
)
def test_any_file_through_any_cuts_and_streams_with_any_prior_store_arrives_byte_for_byte(
    earlier: list[tuple[list[int], list[int]]],
    blocks: list[int],
    cuts: list[int],
    damage: list[tuple[int, int]],
    links: list[int],
    streams: int,
) -> None:
    pieces = [noise(317, seed) for seed in range(9)] + [bytes(317)]
    with tempfile.TemporaryDirectory() as folder:
        root = make_node_root(Path(folder))
        stored = [
            stored_file(send(root, b"".join(pieces[b] for b in old), [*even_cuts(len(old) * 317, 317), *old_cuts]))
            for old, old_cuts in earlier
        ]
        for number, at in damage:
            if number < len(stored):
                stored[number].chmod(0o600)
                with stored[number].open("r+b") as file:
                    file.seek(at)
                    file.write(b"!")
        content = b"".join(pieces[block] for block in blocks)
        local = Path(folder) / "local"
        local.write_bytes(content)
        manifest = manifest_of(content, [*even_cuts(len(content), 317), *cuts])
        if any(Path(NodeLayout(str(root)).checkpoint(manifest.digest)) == path for path in stored):
            return  # the store holds it by its own digest, damaged or not
        wraps = [(lambda inner, cut=cut: CutStream(inner, cut, None)) for cut in links]
        policy = ReconnectPolicy(max_fruitless=100, first_wait_s=0.0, longest_wait_s=0.0)
        fixed = StreamPolicy(fixed=streams)
        result = upload_file(ThreadOpener(root, wraps), local, manifest, retry=policy, streams=fixed)
        check_stored(root, manifest, content)
        distinct = {chunk.sha256: chunk.length for chunk in manifest.chunks}
        assert links or result.bytes_sent <= sum(distinct.values())


def test_twenty_checkpoints_are_looked_through_line_by_line(tmp_path: Path) -> None:
    """The longest of lines and a manifest without line ends cost no memory."""
    path = tmp_path / "chunks.json"
    line = b'{"offset": 7, "length": 5, "sha256": "' + b"ab" * 32 + b'"}'
    path.write_bytes(b"x" * 10_000_000 + b"\n" + line + b",\n" + line)
    assert list(manifest_lines(str(path))) == [(7, 5, b"\xab" * 32)] * 2


class PackedFile(LocalFile):
    """A file that packs each of its chunks by itself."""

    def __init__(self, path: Path, packed: Callable[[bytes], bytes]) -> None:
        super().__init__(path)
        self._packed = packed

    def body(self, offset: int, count: int, /) -> tuple[int, bytes]:
        return PACKED_ENCODING, self._packed(self.read(offset, count))


@settings(max_examples=30, deadline=None)
@given(width=st.sampled_from([1, 2, 4, 8]), links=st.lists(st.integers(0, 30_000), max_size=3))
def test_packed_chunks_through_any_cuts_arrive_byte_for_byte(width: int, links: list[int]) -> None:
    content = b"".join(bytes([value % 7 * 16, value % 251]) for value in range(20_000))
    manifest = manifest_of(content, even_cuts(len(content), 5003))
    with tempfile.TemporaryDirectory() as folder:
        root, local = make_node_root(Path(folder)), Path(folder) / "local"
        local.write_bytes(content)
        wraps = [(lambda inner, cut=cut: CutStream(inner, cut, None)) for cut in links]
        result = upload_file(
            ThreadOpener(root, wraps),
            PackedFile(local, lambda data: pack(data, width)),
            manifest,
            retry=ReconnectPolicy(max_fruitless=100, first_wait_s=0.0, longest_wait_s=0.0),
        )
        check_stored(root, manifest, content)
        assert links or result.bytes_sent < len(content)


def test_a_packed_body_that_is_damaged_is_refused_and_its_chunk_sent_again_as_it_is(root: Path) -> None:
    content = b"\x3c\x01" * 5000
    bodies = []

    def damaged(data: bytes) -> bytes:
        body = bytearray(pack(data, 2))
        body[-1] ^= 1
        bodies.append(body)
        return bytes(body)

    local = root.parent / "local"
    local.write_bytes(content)
    manifest = manifest_of(content, [])
    sent = upload_file(ThreadOpener(root), PackedFile(local, damaged), manifest, retry=NO_PATIENCE)
    assert len(bodies) == 1
    assert sent.bytes_sent == len(content) + len(bodies[0])
    check_stored(root, manifest, content)


def test_a_slow_link_carries_weights_packed(root: Path) -> None:
    content = float32(500_000)
    local = root.parent / "local"
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 400_000))
    limit = 2e6
    plain = upload_file(
        ThreadOpener(make_node_root(root)), local, manifest, packing=False, bandwidth_limit_bytes_per_s=4 * limit
    )
    packed = upload_file(ThreadOpener(root), local, manifest, bandwidth_limit_bytes_per_s=limit)
    check_stored(root, manifest, content)
    assert plain.bytes_sent == len(content)
    assert packed.bytes_sent < 0.95 * len(content)
    assert (plain.bytes_packed, packed.bytes_packed) == (0, len(content) - packed.bytes_sent)


def test_streams_that_are_cut_give_back_what_is_being_packed(root: Path) -> None:
    content = float32(1_000_000) * 4
    content = b"".join(
        bytes((number,)) * 8 + content[at : at + 299_992] for number, at in enumerate(range(0, 12_000_000, 300_000))
    )
    local = root.parent / "local"
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 300_000))
    wraps = [
        (lambda inner, cut=cut: CutStream(inner, cut, None)) for cut in (2_900_000, 1_100_000, 3_300_000, 2_000_000)
    ]
    result = upload_file(
        ThreadOpener(root, wraps),
        local,
        manifest,
        retry=ReconnectPolicy(max_fruitless=100, first_wait_s=0.0, longest_wait_s=0.0),
        streams=StreamPolicy(fixed=3),
        bandwidth_limit_bytes_per_s=8e6,
    )
    check_stored(root, manifest, content)
    assert result.bytes_sent < len(content)


class ReadsWhileSending(LocalFile):
    """Reads, which packing alone does, end only when the stream has sent on meanwhile, or after a while."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.overlapped = 0
        self._sent = threading.Condition()
        self._sends = 0

    def send(self, channel: FrameChannel, offset: int, count: int) -> int:
        sent = super().send(channel, offset, count)
        with self._sent:
            self._sends += 1
            self._sent.notify_all()
        return sent

    def read(self, offset: int, count: int) -> bytes:
        with self._sent:
            before = self._sends
            self.overlapped += self._sent.wait_for(lambda: self._sends > before, 1.0)
        return super().read(offset, count)


def test_a_stream_sends_on_while_chunks_are_packed(root: Path) -> None:
    content = float32(1_000_000)
    local = root.parent / "local"
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 300_000))
    file = ReadsWhileSending(local)
    upload_file(
        ThreadOpener(root), file, manifest, streams=StreamPolicy(fixed=1), bandwidth_limit_bytes_per_s=2e6, wait_s=10.0
    )
    check_stored(root, manifest, content)
    assert file.overlapped >= 2
