"""One file over several streams at once: any of them may die, the file arrives byte for byte."""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConnectionLostError, UnreachableError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer import streams as pool
from orchestrator.transfer.channel import FrameChannel, ReconnectPolicy
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import upload_file
from remote_payload.wire.stream import FrameKind, SendRequest
from tests.support.agent_streams import CutStream, ThreadOpener, Wrap, check_stored, make_node_root, manifest_of

STUBBORN = ReconnectPolicy(max_fruitless=1000, first_wait_s=0.0, longest_wait_s=0.0)
NO_PATIENCE = ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0)
CUTS = st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 1200)), max_size=5)


def cut_after(written: int | None = None, read: int | None = None) -> Wrap:
    return lambda inner: CutStream(inner, written, read)


@settings(max_examples=25, deadline=None)
@given(
    content=st.binary(max_size=4000),
    borders=st.lists(st.integers(0, 4000), max_size=25),
    streams=st.integers(1, 5),
    earlier=CUTS,
    cuts=CUTS,
)
def test_any_content_over_any_number_of_streams_through_any_cuts_arrives_byte_for_byte(
    content: bytes,
    borders: list[int],
    streams: int,
    earlier: list[tuple[int, int]],
    cuts: list[tuple[int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "LOGIN_SPACING_S", 0.0)
        root, local = make_node_root(Path(folder)), Path(folder) / "local"
        local.write_bytes(content)
        manifest = manifest_of(content, borders)
        policy = StreamPolicy(fixed=streams)
        if earlier:
            with contextlib.suppress(UnreachableError):
                opener = ThreadOpener(root, [cut_after(*cut) for cut in earlier])
                upload_file(opener, local, manifest, retry=NO_PATIENCE, streams=policy)
        opener = ThreadOpener(root, [cut_after(*cut) for cut in cuts])
        # Slow enough that later streams find something left to carry.
        limit = max(1.0, 10.0 * len(content))
        upload_file(opener, local, manifest, retry=STUBBORN, streams=policy, bandwidth_limit_bytes_per_s=limit)
        check_stored(root, manifest, content)


def test_one_stream_that_dies_does_not_stop_the_others(tmp_path: Path) -> None:
    root, local = make_node_root(tmp_path), tmp_path / "local"
    content = random.Random(3).randbytes(8_000_000)
    local.write_bytes(content)
    manifest = manifest_of(content, list(range(50_000, len(content), 50_000)))
    opener = ThreadOpener(root, [lambda inner: inner, cut_after(written=400_000)])
    sent = upload_file(
        opener,
        local,
        manifest,
        retry=NO_PATIENCE,
        streams=StreamPolicy(fixed=2),
        bandwidth_limit_bytes_per_s=10_000_000,
    )
    assert opener.opened >= 2
    assert opener.reconnects == 0
    assert sent.bytes_sent >= len(content)
    check_stored(root, manifest, content)


def test_as_many_streams_are_opened_as_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LOGIN_SPACING_S", 0.0)
    root, local = make_node_root(tmp_path), tmp_path / "local"
    content = random.Random(4).randbytes(4_000_000)
    local.write_bytes(content)
    manifest = manifest_of(content, list(range(20_000, len(content), 20_000)))
    opener, seen = ThreadOpener(root), set()
    upload_file(
        opener,
        local,
        manifest,
        streams=StreamPolicy(fixed=4),
        bandwidth_limit_bytes_per_s=10_000_000,
        on_progress=lambda progress: seen.add(progress.streams),
    )
    assert opener.opened == 4
    assert 4 in seen
    check_stored(root, manifest, content)


class LateOpener(ThreadOpener):
    """All streams but the first are under way until `may_open` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.is_asked, self.may_open, self.is_there = threading.Event(), threading.Event(), threading.Event()
        self.was_let: list[bool] = []
        self.late: list[ByteStream] = []

    def open_agent_stream(self, verb: str, request: object, **options: Any) -> ByteStream:
        if not self.opened:
            return super().open_agent_stream(verb, request, **options)
        self.is_asked.set()
        self.was_let.append(self.may_open.wait(20))
        self.late.append(super().open_agent_stream(verb, request, **options))
        self.is_there.set()
        return self.late[0]


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LateOpener:
    monkeypatch.setattr(pool, "LOGIN_SPACING_S", 0.0)
    return LateOpener(make_node_root(tmp_path))


class Errand:
    """Work that is done as soon as a stream is told of it."""

    def __init__(self, opener: LateOpener, streams: pool.StreamPool) -> None:
        self.served: list[ByteStream] = []
        self._opener, self._streams = opener, streams

    def serve(self, stream: ByteStream) -> None:
        FrameChannel(stream).send(FrameKind.LEAVE)
        self.served.append(stream)

    def run_until(self, holds: Callable[[], bool]) -> None:
        request = SendRequest(self._opener.layout.root)
        with self._streams.work("send", request, self.serve, lambda: None):
            deadline = time.monotonic() + 20
            while not holds():
                assert time.monotonic() < deadline
                self._streams.open_up_to(1 if not self.served else 2)
                time.sleep(0.01)


def test_the_end_waits_for_no_login_whose_stream_is_closed_when_it_comes(late: LateOpener) -> None:
    with pool.StreamPool(late, idle_timeout_s=20.0) as streams:
        Errand(late, streams).run_until(late.is_asked.is_set)
    assert streams.open_count == 0
    late.may_open.set()
    assert late.is_there.wait(20)
    assert late.was_let == [True]
    with pytest.raises(ConnectionLostError):
        late.late[0].read(1)  # as long as it is open there is nothing to read
    assert late.opened == 2


def test_a_login_that_one_piece_of_work_did_not_wait_for_serves_the_next(late: LateOpener) -> None:
    with pool.StreamPool(late, idle_timeout_s=20.0) as streams:
        Errand(late, streams).run_until(late.is_asked.is_set)
        late.may_open.set()
        errand = Errand(late, streams)
        errand.run_until(lambda: bool(late.late) and late.late[0] in errand.served)
    assert late.opened == 2
