"""The receiving agent against rivals, several streams, damaged journals and clients that break the protocol."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import random
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import IntegrityError, LockedError, RemoteEvalError, UnreachableError, UsageError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.channel import FrameChannel, ReconnectPolicy
from orchestrator.transfer.progress import TransferProgress
from orchestrator.transfer.upload import upload_file
from remote_payload.wire.chunk_table import decode_bitmap, manifest_pages, pack_chunks
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.codec import to_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import (
    FrameKind,
    LeftFacts,
    ReceiveRequest,
    StreamCall,
    encode_data_header,
    encode_frame,
)
from tests.support.agent_streams import (
    CutStream,
    LocalOpener,
    ProcessOpener,
    ThreadOpener,
    check_not_stored,
    check_stored,
    even_cuts,
    make_node_root,
    manifest_of,
)
from tests.support.world import until

AGENT = [sys.executable, "-m", "remote_payload", "agent", "stream"]
NO_PATIENCE = ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0)
CONTENT = random.Random(5).randbytes(10_000)
MANIFEST = manifest_of(CONTENT, even_cuts(len(CONTENT), 1000))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "local"
    path.write_bytes(CONTENT)
    return path


class RawClient:
    """The client's end of `receive`, frame by frame."""

    def __init__(
        self, opener: LocalOpener, manifest: ChunkManifest, content: bytes, session: str, **changes: Any
    ) -> None:
        self.root = opener.layout.root
        request = self._told(manifest, content, session, **changes)
        self.stream: ByteStream = opener.open_agent_stream("receive", request, idle_timeout_s=20)
        self.channel = FrameChannel(self.stream)
        self._send_table()

    def perform(self, manifest: ChunkManifest, content: bytes) -> None:
        """Have an agent that stands by take another file."""
        request = self._told(manifest, content, secrets.token_hex(16))
        self.channel.send_json(FrameKind.PERFORM, StreamCall("receive", to_json(request)))
        self._send_table()

    def _told(self, manifest: ChunkManifest, content: bytes, session: str, **changes: Any) -> ReceiveRequest:
        self.manifest, self.content = manifest, content
        return ReceiveRequest(self.root, manifest.digest, manifest.size, len(manifest.chunks), session, **changes)

    def _send_table(self) -> None:
        for first, page in manifest_pages(pack_chunks(self.manifest.chunks)):
            self.channel.send(FrameKind.MANIFEST, first, page)

    def have(self) -> list[int]:
        header, body = self.channel.receive(FrameKind.HAVE, FrameKind.WAITING)
        while header.kind is FrameKind.WAITING:  # another stream of the session is preparing the folder
            header, body = self.channel.receive(FrameKind.HAVE, FrameKind.WAITING)
        return [index for index, flag in enumerate(decode_bitmap(body, len(self.manifest.chunks))) if flag]

    def send_chunk(self, index: int) -> None:
        chunk = self.manifest.chunks[index]
        self.stream.write(encode_data_header(index, chunk.length))
        self.stream.write(self.content[chunk.offset : chunk.offset + chunk.length])
        header, _ = self.channel.receive(FrameKind.ACK)
        assert header.argument == index

    def finish(self) -> None:
        self.channel.send(FrameKind.FINISH)
        self.channel.receive(FrameKind.FINISHED)

    def close(self) -> None:
        self.stream.close()


@contextlib.contextmanager
def raw_client(opener: LocalOpener, session: str | None = None, **changes: Any) -> Iterator[RawClient]:
    client = RawClient(opener, MANIFEST, CONTENT, session or secrets.token_hex(16), **changes)
    try:
        yield client
    finally:
        client.close()


OTHER = CONTENT[::-1]
OTHER_MANIFEST = manifest_of(OTHER, even_cuts(len(OTHER), 1000))


def test_a_stream_that_has_finished_a_file_takes_another(root: Path) -> None:
    with raw_client(ThreadOpener(root)) as client:
        for manifest, content in ((OTHER_MANIFEST, OTHER), (MANIFEST, CONTENT)):
            assert client.have() == []
            for index in range(len(client.manifest.chunks)):
                client.send_chunk(index)
            client.finish()
            client.perform(manifest, content)
        client.channel.receive(FrameKind.FINISHED)  # it is there already
        client.perform(OTHER_MANIFEST, OTHER)
        client.channel.receive(FrameKind.FINISHED)
    check_stored(root, MANIFEST, CONTENT)
    check_stored(root, OTHER_MANIFEST, OTHER)


def test_a_stream_that_leaves_a_file_to_others_has_made_durable_what_it_brought_and_takes_another(root: Path) -> None:
    with raw_client(ThreadOpener(root)) as client:
        client.have()
        client.send_chunk(3)
        client.channel.send(FrameKind.LEAVE, 1)  # only a draft is given up that way
        _, body = client.channel.receive(FrameKind.LEFT)
        assert client.channel.decode(LeftFacts, body) == LeftFacts(1000)
        client.perform(OTHER_MANIFEST, OTHER)
        assert client.have() == []
        client.channel.send(FrameKind.LEAVE)
        client.channel.receive(FrameKind.LEFT)
        client.perform(MANIFEST, CONTENT)
        assert client.have() == [3]


@pytest.mark.parametrize("opener_kind", ["threads", "processes"])
def test_clients_that_send_the_same_file_at_once_send_it_once(root: Path, local: Path, opener_kind: str) -> None:
    def upload(_: int) -> int:
        opener = ThreadOpener(root) if opener_kind == "threads" else ProcessOpener(root, lambda r: [*AGENT, r])
        return upload_file(opener, local, MANIFEST, retry=NO_PATIENCE).bytes_sent

    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        sent = list(clients.map(upload, range(4)))
    assert sum(sent) == len(CONTENT)
    check_stored(root, MANIFEST, CONTENT)


def test_a_client_that_waits_takes_over_where_the_other_one_broke_off(root: Path, local: Path) -> None:
    is_waiting = threading.Event()
    with raw_client(ThreadOpener(root)) as first, concurrent.futures.ThreadPoolExecutor(1) as clients:
        assert first.have() == []
        first.send_chunk(3)
        first.send_chunk(7)
        waiting = clients.submit(
            upload_file, ThreadOpener(root), local, MANIFEST, on_progress=lambda _: is_waiting.set()
        )
        assert is_waiting.wait(20)
        assert not waiting.done()
        first.close()
        result = waiting.result(30)
    assert (result.bytes_saved, result.bytes_sent) == (2000, 8000)
    check_stored(root, MANIFEST, CONTENT)


def test_a_client_that_waits_adopts_what_the_other_one_finished(root: Path, local: Path) -> None:
    is_waiting = threading.Event()

    def note(_: TransferProgress) -> None:
        is_waiting.set()

    with raw_client(ThreadOpener(root)) as first, concurrent.futures.ThreadPoolExecutor(1) as clients:
        first.have()
        waiting = clients.submit(upload_file, ThreadOpener(root), local, MANIFEST, on_progress=note)
        assert is_waiting.wait(20)
        for index in range(10):
            first.send_chunk(index)
        first.finish()
        result = waiting.result(30)
    assert (result.bytes_saved, result.bytes_sent) == (10_000, 0)


def test_a_rival_of_which_bytes_arrive_gets_on_though_no_chunk_of_its_is_whole(
    root: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, length = Path(NodeLayout(str(root)).checkpoint_journal(MANIFEST.digest)), MANIFEST.chunks[0].length
    may_look = threading.Semaphore(1)
    clock = itertools.count()

    def one_more() -> float:
        assert may_look.acquire(timeout=30)
        return next(clock)

    with raw_client(ThreadOpener(root)) as first, concurrent.futures.ThreadPoolExecutor(1) as clients:
        first.have()
        monkeypatch.setattr("remote_payload.agent.hold.time", SimpleNamespace(monotonic=one_more))
        with monkeypatch.context() as patch:
            patch.setattr("remote_payload.agent.receive.ALIVE_INTERVAL_S", -1.0)
            waiting = clients.submit(upload_file, ThreadOpener(root), local, MANIFEST, wait_s=2.0, retry=NO_PATIENCE)
            first.stream.write(encode_data_header(0, length))
            for at in range(20):
                before = journal.stat().st_mtime_ns
                first.stream.write(CONTENT[at : at + 1])
                until(lambda before=before: journal.stat().st_mtime_ns != before)
                may_look.release()
            first.stream.write(CONTENT[20:length])
            while first.channel.receive(FrameKind.ALIVE, FrameKind.ACK)[0].kind is not FrameKind.ACK:
                assert not waiting.done()
            may_look.release(1000)
        for index in range(1, 10):
            first.send_chunk(index)
        first.finish()
        assert waiting.result(30).bytes_sent == 0


def test_a_rival_that_does_not_get_on_is_waited_for_only_so_long(root: Path, local: Path) -> None:
    with raw_client(ThreadOpener(root)) as first:
        first.have()
        with pytest.raises(LockedError, match="does not get on"):
            upload_file(ThreadOpener(root), local, MANIFEST, wait_s=0.1, retry=NO_PATIENCE)
        for index in range(10):
            first.send_chunk(index)
        first.finish()
    check_stored(root, MANIFEST, CONTENT)


def test_streams_of_one_session_share_the_work(root: Path) -> None:
    session = secrets.token_hex(16)
    openers = [ProcessOpener(root, lambda request: [*AGENT, request]) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(raw_client(opener, session)) for opener in openers]
        assert [client.have() for client in clients] == [[], [], []]
        for index in range(10):
            clients[index % 3].send_chunk(index)
        # The others' chunks become durable as their streams end; the last stream then finishes for all.
        clients[1].close()
        clients[2].close()
        clients[0].finish()
    check_stored(root, MANIFEST, CONTENT)


def test_finishing_early_names_what_is_there_and_finishes_later(root: Path) -> None:
    with raw_client(ThreadOpener(root)) as client:
        client.have()
        client.send_chunk(4)
        client.channel.send(FrameKind.FINISH)
        assert client.have() == [4]
        check_not_stored(root, MANIFEST)
        for index in range(10):
            client.send_chunk(index)
        client.finish()
    check_stored(root, MANIFEST, CONTENT)


def test_a_stream_that_joins_a_session_is_told_what_is_durable(root: Path) -> None:
    session = secrets.token_hex(16)
    with raw_client(ThreadOpener(root), session) as first:
        first.have()
        first.send_chunk(2)
    with raw_client(ThreadOpener(root), session) as second, raw_client(ThreadOpener(root), session) as third:
        assert second.have() == [2]
        assert third.have() == [2]


def test_a_silent_client_is_given_up_and_what_it_sent_is_kept(root: Path) -> None:
    opener = ThreadOpener(root)
    with raw_client(opener, idle_s=0.2) as client:
        client.have()
        client.send_chunk(0)
        assert client.stream.read(1) == b""
    with raw_client(opener) as client:
        assert client.have() == [0]


BROKEN = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n" + bytes(100),
    "another version": b"RE\x02" + bytes(100),
    "an unknown chunk": encode_data_header(10, 1000),
    "a chunk of another length": encode_data_header(0, 999),
    "a frame out of turn": encode_frame(FrameKind.WANT),
    "the agent's own frame": encode_frame(FrameKind.FINISHED),
    "a table again": encode_frame(FrameKind.MANIFEST, 0, bytes(36)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_client_that_breaks_the_protocol_is_told_and_what_it_sent_before_is_kept(root: Path, kind: str) -> None:
    with raw_client(ThreadOpener(root)) as client:
        client.have()
        client.send_chunk(0)
        client.stream.write(BROKEN[kind])
        with pytest.raises(IntegrityError, match="stream is damaged"):
            client.channel.receive(FrameKind.ACK)
    with raw_client(ThreadOpener(root)) as client:
        assert client.have() == [0]
    check_not_stored(root, MANIFEST)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"digest": "v1:" + "0" * 64}, IntegrityError),
        ({"digest": "../../../etc"}, UsageError),
        ({"digest": "v1:../../x"}, UsageError),
        ({"size": 9999}, UsageError),
        ({"size": -1}, UsageError),
        ({"chunk_count": 9}, IntegrityError),
        ({"chunk_count": -1}, UsageError),
        ({"chunk_count": 10**9}, UsageError),
        ({"session": "../../x"}, UsageError),
        ({"root": "relative"}, RemoteEvalError),
        ({"root": "/"}, RemoteEvalError),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_leaves_nothing(
    root: Path, changes: dict[str, Any], error: type[Exception]
) -> None:
    facts = {"root": str(root), "digest": MANIFEST.digest, "size": 10_000, "chunk_count": 10, "session": "0" * 32}
    request = ReceiveRequest(**{**facts, **changes})  # type: ignore[arg-type]
    with ThreadOpener(root).open_agent_stream("receive", request, idle_timeout_s=20) as stream:
        channel = FrameChannel(stream)
        with contextlib.suppress(UnreachableError):
            channel.send(FrameKind.MANIFEST, 0, pack_chunks(MANIFEST.chunks))
        with pytest.raises(error):
            channel.receive(FrameKind.HAVE)
    stored = [path for path in root.rglob("*") if path.name in ("file", "file.part")]
    assert stored == []


@pytest.mark.parametrize("message", [{"protocol": 0}, {"verb": "rm -rf"}, {"params": None}, {"params": {"root": 3}}])
def test_a_malformed_opening_is_answered_with_a_failure(root: Path, message: dict[str, Any]) -> None:
    class Opener(ThreadOpener):
        def _start(self, request: dict[str, Any], nonce: str, idle_timeout_s: float) -> ByteStream:
            return super()._start({**request, **message}, nonce, idle_timeout_s)

    request = ReceiveRequest(str(root), MANIFEST.digest, 10_000, 10, "0" * 32)
    with Opener(root).open_agent_stream("receive", request) as stream, pytest.raises(UsageError):
        FrameChannel(stream).receive(FrameKind.HAVE)


def break_off(root: Path, local: Path) -> NodeLayout:
    """Leave a part with some chunks and a journal behind."""
    opener = ThreadOpener(root, [lambda inner: CutStream(inner, 6000, None)])
    with pytest.raises(UnreachableError):
        upload_file(opener, local, MANIFEST, retry=NO_PATIENCE)
    return opener.layout


@settings(max_examples=30, deadline=None)
@given(
    cut=st.integers(0, 400), tail=st.one_of(st.binary(max_size=60), st.from_regex(r"\n?[0-9]{1,3}( [0-9a-f]{0,16})?"))
)
def test_a_journal_torn_at_any_byte_and_followed_by_anything_never_spoils_the_file(cut: int, tail: bytes | str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, local = make_node_root(Path(folder)), Path(folder) / "local"
        local.write_bytes(CONTENT)
        journal = Path(break_off(root, local).checkpoint_journal(MANIFEST.digest))
        torn = journal.read_bytes()[:cut] + (tail if isinstance(tail, bytes) else tail.encode())
        journal.write_bytes(torn)
        result = upload_file(ThreadOpener(root), local, MANIFEST, retry=NO_PATIENCE)
        assert result.bytes_saved <= 5000
        assert result.bytes_saved + result.bytes_sent == len(CONTENT)
        check_stored(root, MANIFEST, CONTENT)


@pytest.mark.parametrize("line", ["9 0000000000000000.", "10 0000000000000000.", "09 x", "9999999 0000000000000000."])
def test_a_journal_line_without_its_chunks_digest_counts_for_nothing(root: Path, local: Path, line: str) -> None:
    with Path(break_off(root, local).checkpoint_journal(MANIFEST.digest)).open("a") as journal:
        journal.write(line + "\n")
    result = upload_file(ThreadOpener(root), local, MANIFEST, retry=NO_PATIENCE)
    assert result.bytes_saved <= 5000
    check_stored(root, MANIFEST, CONTENT)


def test_a_torn_line_does_not_swallow_the_next_ones(root: Path, local: Path) -> None:
    journal = Path(break_off(root, local).checkpoint_journal(MANIFEST.digest))
    with journal.open("ab") as file:
        file.write(b"1")
    with raw_client(ThreadOpener(root)) as client:
        before = client.have()
        client.send_chunk(8)
    with raw_client(ThreadOpener(root)) as client:
        assert client.have() == [*before, 8]


def test_a_part_that_was_replaced_is_not_believed_to_hold_what_the_journal_says(root: Path, local: Path) -> None:
    part = Path(break_off(root, local).checkpoint_part(MANIFEST.digest))
    part.rename(part.with_name("kept so that the inode is not used again"))
    part.write_bytes(bytes(len(CONTENT)))
    assert upload_file(ThreadOpener(root), local, MANIFEST).bytes_saved == 0
    assert Path(NodeLayout(str(root)).checkpoint(MANIFEST.digest)).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [0, 9_999, 10_001])
def test_a_part_of_another_size_is_begun_anew(root: Path, local: Path, size: int) -> None:
    part = Path(break_off(root, local).checkpoint_part(MANIFEST.digest))
    os.truncate(part, size)
    assert upload_file(ThreadOpener(root), local, MANIFEST).bytes_saved == 0
    check_stored(root, MANIFEST, CONTENT)


@pytest.mark.parametrize("missing", ["file.part", "file.journal", "lock", "everything"])
def test_an_upload_whose_leftovers_were_deleted_starts_over(root: Path, local: Path, missing: str) -> None:
    folder = Path(break_off(root, local).checkpoint_folder(MANIFEST.digest))
    for path in folder.iterdir():
        if missing in (path.name, "everything"):
            path.unlink()
    if missing == "everything":
        folder.rmdir()
    upload_file(ThreadOpener(root), local, MANIFEST)
    check_stored(root, MANIFEST, CONTENT)


@pytest.mark.parametrize("where", ["file.part", "file.journal", "lock", "file"])
def test_a_link_in_the_store_is_not_written_through(tmp_path: Path, root: Path, local: Path, where: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = Path(NodeLayout(str(root)).checkpoint_folder(MANIFEST.digest))
    folder.mkdir(parents=True, mode=0o700)
    (folder / where).symlink_to(victim)
    with contextlib.suppress(RemoteEvalError):
        upload_file(ThreadOpener(root), local, MANIFEST, retry=NO_PATIENCE)
        check_stored(root, MANIFEST, CONTENT)
    assert victim.read_bytes() == b"precious"


def test_a_stored_file_of_another_size_is_replaced(root: Path, local: Path) -> None:
    upload_file(ThreadOpener(root), local, MANIFEST)
    stored = Path(NodeLayout(str(root)).checkpoint(MANIFEST.digest))
    stored.chmod(0o600)
    os.truncate(stored, 5)
    assert upload_file(ThreadOpener(root), local, MANIFEST).bytes_sent == len(CONTENT)
    check_stored(root, MANIFEST, CONTENT)


def test_what_a_crash_after_the_rename_left_is_tidied(root: Path, local: Path) -> None:
    upload_file(ThreadOpener(root), local, MANIFEST)
    layout = NodeLayout(str(root))
    Path(layout.checkpoint_journal(MANIFEST.digest)).write_bytes(b"left behind")
    Path(layout.checkpoint_manifest(MANIFEST.digest)).unlink()
    assert upload_file(ThreadOpener(root), local, MANIFEST).bytes_sent == 0
    check_stored(root, MANIFEST, CONTENT)


def test_a_stored_file_cannot_be_overwritten_by_accident(root: Path, local: Path) -> None:
    path = Path(upload_file(ThreadOpener(root), local, MANIFEST).path_on_node)
    assert path.stat().st_mode & 0o777 == 0o400
    assert path.parent.stat().st_mode & 0o077 == 0
