"""Packed chunks are unpacked beside the reading of the stream: what that changes, and what it must not."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import NoSpaceError
from orchestrator.transfer.channel import FrameChannel
from remote_payload.agent import receive
from remote_payload.agent.failure import AgentError
from remote_payload.agent.partial_file import PartialFile
from remote_payload.wire import packing
from remote_payload.wire.chunk_table import manifest_pages, pack_chunks
from remote_payload.wire.stream import PACKED_ENCODING, RAW_ENCODING, FrameKind, ReceiveRequest, encode_data_header
from tests.support.agent_streams import ThreadOpener, check_stored, even_cuts, journalled, make_node_root, manifest_of
from tests.support.floats import bfloat16

CHUNK = 4000
COUNT = 6
CONTENT = bfloat16(CHUNK * COUNT // 2)
MANIFEST = manifest_of(CONTENT, even_cuts(len(CONTENT), CHUNK))
PATIENCE_S = 20.0


class SlowUnpacking:
    """Stands in for `unpack`: waits until it may go on."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.begun = threading.Event()

    def __call__(self, body: memoryview, length: int, into: bytearray) -> memoryview:
        self.begun.set()
        assert self.may_end.wait(PATIENCE_S)
        return packing.unpack(body, length, into)


@pytest.fixture
def unpacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowUnpacking]:
    found = SlowUnpacking()
    monkeypatch.setattr(receive, "unpack", found)
    yield found
    found.may_end.set()


class Client:
    def __init__(self, root: Path) -> None:
        request = ReceiveRequest(str(root), MANIFEST.digest, len(CONTENT), COUNT, secrets.token_hex(16))
        self.stream = ThreadOpener(root).open_agent_stream("receive", request, idle_timeout_s=PATIENCE_S)
        self.channel = FrameChannel(self.stream)
        for first, page in manifest_pages(pack_chunks(MANIFEST.chunks)):
            self.channel.send(FrameKind.MANIFEST, first, page)
        self.channel.receive(FrameKind.HAVE)

    def send(self, index: int, *, packed: bool) -> None:
        body = CONTENT[index * CHUNK : (index + 1) * CHUNK]
        if packed:
            body = packing.pack(body, 2)
        self.stream.write(encode_data_header(index, len(body), PACKED_ENCODING if packed else RAW_ENCODING))
        self.stream.write(body)

    def answer(self) -> tuple[FrameKind, int]:
        header, _ = self.channel.receive(FrameKind.ACK, FrameKind.REFUSED)
        return header.kind, header.argument


def test_the_stream_is_read_while_a_chunk_is_unpacked(tmp_path: Path, unpacking: SlowUnpacking) -> None:
    root = make_node_root(tmp_path)
    client = Client(root)
    client.send(0, packed=True)
    client.send(1, packed=False)
    assert client.answer() == (FrameKind.ACK, 1)
    client.send(2, packed=True)
    unpacking.may_end.set()
    assert [client.answer(), client.answer()] == [(FrameKind.ACK, 0), (FrameKind.ACK, 2)]
    for index in range(3, COUNT):
        client.send(index, packed=index % 2 == 0)
    client.channel.send(FrameKind.FINISH)
    assert sorted(client.answer() for _ in range(3, COUNT)) == [(FrameKind.ACK, index) for index in range(3, COUNT)]
    client.channel.receive(FrameKind.FINISHED)
    client.stream.close()
    check_stored(root, MANIFEST, CONTENT)


def test_a_chunk_that_is_being_unpacked_when_the_stream_ends_is_acknowledged_and_kept(
    tmp_path: Path, unpacking: SlowUnpacking
) -> None:
    root = make_node_root(tmp_path)
    client = Client(root)
    client.send(3, packed=True)
    assert unpacking.begun.wait(PATIENCE_S)
    client.stream.close_write()
    unpacking.may_end.set()
    assert client.answer() == (FrameKind.ACK, 3)
    client.stream.close()
    assert journalled(root, MANIFEST) == {3}


def test_a_disk_that_refuses_an_unpacked_chunk_is_told_though_nothing_more_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PartialFile, index: int, data: memoryview) -> None:
        raise AgentError("no_space", "the disk is full")

    client = Client(make_node_root(tmp_path))
    monkeypatch.setattr(PartialFile, "write", refuse)
    client.send(0, packed=True)
    with pytest.raises(NoSpaceError, match="the disk is full"):
        client.answer()
    client.stream.close()


def test_a_chunk_that_was_packed_wrongly_is_refused_and_taken_as_it_is(tmp_path: Path) -> None:
    client = Client(make_node_root(tmp_path))
    body = bytearray(packing.pack(CONTENT[:CHUNK], 2))
    body[-1] ^= 1
    for wrong in (bytes(body), bytes(body[:-1]), b"\2"):
        client.stream.write(encode_data_header(0, len(wrong), PACKED_ENCODING))
        client.stream.write(wrong)
        assert client.answer() == (FrameKind.REFUSED, 0)
    client.send(0, packed=False)
    assert client.answer() == (FrameKind.ACK, 0)
    client.stream.close()
