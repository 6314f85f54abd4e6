"""Which chunks a stream of an upload packs ahead, and what it sends meanwhile."""

from __future__ import annotations

import concurrent.futures
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.transfer.channel import FrameChannel, ReconnectPolicy
from orchestrator.transfer.packing import PackedChunk, Packer
from orchestrator.transfer.source import LocalFile
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import upload_file
from remote_payload.wire.packing_rates import PackingRates
from remote_payload.wire.stream import HEADER_BYTES, PACKED_ENCODING, FrameKind, decode_header
from tests.support.agent_streams import (
    CutStream,
    ThreadOpener,
    WatchedStream,
    check_stored,
    even_cuts,
    make_node_root,
    manifest_of,
)
from tests.support.floats import bfloat16

PATIENCE_S = 20.0
CHUNK = 300_000
COUNT = 12
CONTENT = b"".join(bytes((number, 0)) * 4 + bfloat16(CHUNK // 2)[8:] for number in range(COUNT))
MANIFEST = manifest_of(CONTENT, even_cuts(len(CONTENT), CHUNK))


class HeaderStream(WatchedStream):
    """Tells whether the chunk whose header is about to be written is packed."""

    def __init__(self, inner: object, on_chunk: Callable[[bool], None]) -> None:
        super().__init__(inner, 0, lambda: None)  # type: ignore[arg-type]
        self._on_chunk = on_chunk

    def write(self, data: bytes | memoryview) -> None:
        if len(data) == HEADER_BYTES and bytes(data[:2]) == b"RE":
            header = decode_header(bytes(data))
            if header.kind is FrameKind.DATA:
                self._on_chunk(header.encoding == PACKED_ENCODING)
        super().write(data)


class ReadFile(LocalFile):
    """Counts what is read to be packed, and all that is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads = 0
        self.read_bytes = 0
        self.changed_reads = threading.Condition()

    def read(self, offset: int, count: int) -> bytes:
        with self.changed_reads:
            self.reads += 1
            self.read_bytes += count
            self.changed_reads.notify_all()
        return super().read(offset, count)

    def send(self, channel: FrameChannel, offset: int, count: int) -> int:
        sent = super().send(channel, offset, count)
        with self.changed_reads:
            self.read_bytes += sent
        return sent

    def await_reads(self, count: int) -> bool:
        with self.changed_reads:
            return self.changed_reads.wait_for(lambda: self.reads >= count, PATIENCE_S)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "local"
    path.write_bytes(CONTENT)
    return path


def test_two_chunks_are_packed_while_one_that_is_packed_is_sent(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackingRates, "pays", lambda self, packers: True)
    monkeypatch.setattr(PackingRates, "knows_link", True)
    file, root, were_read = ReadFile(local), make_node_root(tmp_path), list[bool]()

    def on_chunk(is_packed: bool) -> None:
        if is_packed and len(were_read) < 4:
            were_read.append(file.await_reads(len(were_read) + 3))

    opener = ThreadOpener(root, [lambda inner: HeaderStream(inner, on_chunk)])
    upload_file(opener, file, MANIFEST, streams=StreamPolicy(fixed=1))
    check_stored(root, MANIFEST, CONTENT)
    assert were_read == [True] * 4


def test_what_is_packed_goes_before_another_chunk_as_it_is(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[PackedChunk] = []
    begin = Packer.begin

    def noted_begin(self: Packer, offset: int, length: int, read: Callable[[int, int], bytes]) -> PackedChunk | None:
        chunk = begin(self, offset, length, read)
        if chunk is not None:
            begun.append(chunk)
        return chunk

    monkeypatch.setattr(Packer, "begin", noted_begin)
    monkeypatch.setattr(PackingRates, "pays", lambda self, packers: len(begun) < 2)
    monkeypatch.setattr(PackingRates, "knows_link", True)
    went: list[bool] = []

    class SlowFile(LocalFile):
        def send(self, channel: FrameChannel, offset: int, count: int) -> int:
            assert not concurrent.futures.wait(begun, PATIENCE_S).not_done
            return super().send(channel, offset, count)

    opener = ThreadOpener(make_node_root(tmp_path), [lambda inner: HeaderStream(inner, went.append)])
    upload_file(opener, SlowFile(local), MANIFEST, streams=StreamPolicy(fixed=1))
    assert went.count(True) == 2
    # The first goes as it is at most because nothing is packed yet.
    assert not any(went[3:])


@pytest.mark.parametrize("content", [CONTENT, random.Random(1).randbytes(len(CONTENT))], ids=["floats", "noise"])
def test_what_was_read_to_be_packed_is_not_read_again_though_streams_are_lost(
    tmp_path: Path, local: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackingRates, "pays", lambda self, packers: True)
    monkeypatch.setattr(PackingRates, "knows_link", True)
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), CHUNK))
    root, file = make_node_root(tmp_path), ReadFile(local)
    opener = ThreadOpener(root, [lambda inner: CutStream(inner, 2 * CHUNK + 1, None)] * 3)
    upload_file(opener, file, manifest, streams=StreamPolicy(fixed=1), retry=ReconnectPolicy(first_wait_s=0.01))
    check_stored(root, manifest, content)
    assert opener.opened > 3
    assert file.read_bytes == len(content)
