"""Chunks are made durable beside the stream: it goes on meanwhile, and nothing is promised that the disk refused."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import ConnectionLostError, NodeUnfitError
from orchestrator.transfer.channel import FrameChannel
from remote_payload.agent import partial_file
from remote_payload.agent.background import Background
from remote_payload.wire.chunk_table import decode_bitmap, manifest_pages, pack_chunks
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import FrameKind, ReceiveRequest, encode_data_header
from tests.support.agent_streams import ThreadOpener, even_cuts, make_node_root, manifest_of

CHUNK = 1000
COUNT = 20
CONTENT = random.Random(5).randbytes(CHUNK * COUNT)
MANIFEST: ChunkManifest = manifest_of(CONTENT, even_cuts(len(CONTENT), CHUNK))
PATIENCE_S = 20.0


class SlowDisk:
    """Stands in for `fdatasync`: waits until it may go on, and then says what it is told to."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.begun = threading.Event()
        self.error: OSError | None = None
        self.threads: set[str] = set()

    def __call__(self, fd: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.begun.set()
        assert self.may_end.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        os.fsync(fd)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    found = SlowDisk()
    monkeypatch.setattr(partial_file, "SYNC_BYTES", 3 * CHUNK)
    yield found
    found.may_end.set()


class Client:
    def __init__(self, root: Path) -> None:
        opener = ThreadOpener(root)
        request = ReceiveRequest(str(root), MANIFEST.digest, len(CONTENT), COUNT, secrets.token_hex(16))
        self.stream = opener.open_agent_stream("receive", request, idle_timeout_s=PATIENCE_S)
        self.channel = FrameChannel(self.stream)
        for first, page in manifest_pages(pack_chunks(MANIFEST.chunks)):
            self.channel.send(FrameKind.MANIFEST, first, page)
        _, body = self.channel.receive(FrameKind.HAVE)
        self.have = [index for index, flag in enumerate(decode_bitmap(body, COUNT)) if flag]

    def send(self, index: int) -> None:
        self.stream.write(encode_data_header(index, CHUNK))
        self.stream.write(CONTENT[index * CHUNK : (index + 1) * CHUNK])

    def send_all(self) -> None:
        for index in range(COUNT):
            with contextlib.suppress(ConnectionLostError):  # the agent's last words tell why it left
                self.send(index)
            assert self.acknowledged() == index

    def acknowledged(self) -> int:
        return self.channel.receive(FrameKind.ACK)[0].argument


def journalled(root: Path) -> int:
    text = Path(NodeLayout(str(root)).checkpoint_journal(MANIFEST.digest)).read_bytes()
    return text.count(b".\n")


def test_the_stream_goes_on_while_the_disk_is_slow_and_waits_before_too_much_is_unwritten(
    tmp_path: Path, disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_node_root(tmp_path)
    client = Client(root)
    monkeypatch.setattr(partial_file, "_data_sync", disk)
    for index in range(5):
        client.send(index)
        assert client.acknowledged() == index
    assert disk.begun.wait(PATIENCE_S)
    assert journalled(root) == 0  # nothing is said to be here before it is durable
    client.send(5)
    assert client.acknowledged() == 5
    client.send(6)  # as much again has arrived: the agent waits for the disk before it takes more
    disk.may_end.set()
    assert client.acknowledged() == 6
    assert disk.threads == {"background"}
    client.stream.close()
    assert journalled(root) == 7
    again = Client(root)
    again.stream.close()
    assert again.have == list(range(7))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_it_is_synced_ends_the_stream_and_promises_nothing(
    tmp_path: Path, disk: SlowDisk, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    root = make_node_root(tmp_path)
    client = Client(root)
    monkeypatch.setattr(partial_file, "_data_sync", disk)
    disk.error = OSError(number, os.strerror(number))
    disk.may_end.set()
    with pytest.raises(NodeUnfitError):
        client.send_all()
    client.stream.close()
    assert journalled(root) == 0


def test_a_disk_that_refused_once_is_not_believed_when_it_then_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel could not write it tells once, and then calls the file written."""
    has_refused = threading.Event()

    def sync(fd: int) -> None:
        if not has_refused.is_set():
            has_refused.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)

    root = make_node_root(tmp_path)
    client = Client(root)
    monkeypatch.setattr(partial_file, "SYNC_BYTES", 3 * CHUNK)
    monkeypatch.setattr(partial_file, "_data_sync", sync)
    for index in range(4):
        client.send(index)
        assert client.acknowledged() == index
    assert has_refused.wait(PATIENCE_S)
    client.stream.close()
    assert journalled(root) == 0


def test_what_a_job_raises_is_raised_once_where_somebody_waits() -> None:
    background = Background()

    def fail() -> None:
        raise OSError(errno.EIO, "the disk")

    background.start(fail)
    with pytest.raises(OSError, match="the disk"):
        background.wait()
    background.wait()
    done: list[int] = []
    background.start(lambda: done.append(1))
    background.start(lambda: done.append(2))
    background.wait()
    assert done == [1, 2]
    assert not background.is_busy
