"""Transfers over real SSH: through both transports, a server that dies in the middle, and a link that goes silent."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.cli.output import transfer_event, transfer_line
from orchestrator.errors import UnreachableError
from orchestrator.layout import LocalLayout
from orchestrator.node import Node
from orchestrator.payload import build_payload
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.settings import ConnectionSettings
from orchestrator.ssh.transport import ByteStream, Transport
from orchestrator.standby import Standby
from orchestrator.transfer import draft as drafts
from orchestrator.transfer import fingerprints
from orchestrator.transfer.carrier import Carrier
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.download import Download, download_files
from orchestrator.transfer.fetch import fetch_file
from orchestrator.transfer.fingerprints import digest_local_file
from orchestrator.transfer.progress import TransferProgress
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import upload_file
from remote_payload.wire.chunks import CHUNK_BYTES
from remote_payload.wire.messages import FileList, KnownChunks, KnownRequest, ListRequest, Located, LocateRequest
from tests.support.agent_streams import ChunkLedger, WatchedStream, Wrap, even_cuts, journalled, manifest_of
from tests.support.floats import bfloat16
from tests.support.relay import relay_to
from tests.support.sshd import Sshd, start_sshd
from tests.support.world import until

MIB = 1024 * 1024
CONTENT = random.Random(11).randbytes(40 * MIB + 123)
Connect = Callable[..., Transport]
NEXT_TIME = ReconnectPolicy(max_fruitless=5, first_wait_s=0.05, longest_wait_s=0.5)


class WatchedNode(Node):
    """A node whose next streams can be watched: one wrap each, in order."""

    wraps: tuple[Wrap, ...] = ()

    @property
    def started(self) -> list[str]:
        """The verbs of all streams that were started, in order."""
        return self.__dict__.setdefault("_started", [])

    def _start_stream(self, verb: str, request: object, idle_timeout_s: float, is_bulk: bool) -> ByteStream:
        self.started.append(verb)
        return super()._start_stream(verb, request, idle_timeout_s, is_bulk)

    def await_prepared(self) -> ByteStream:
        """The stream of `prepare_streams`, once it is up, which stays prepared."""
        stream = self._standbys[0].take(60.0)
        assert stream is not None
        self._standbys[0] = Standby(lambda: stream)
        return stream

    def open_agent_stream(
        self, verb: str, request: object, *, idle_timeout_s: float = 60.0, expected_bytes: int | None = None
    ) -> ByteStream:
        stream = super().open_agent_stream(verb, request, idle_timeout_s=idle_timeout_s, expected_bytes=expected_bytes)
        return self._wrapped(stream)

    def prepared_stream(self, expected_bytes: int, /) -> ByteStream | None:
        stream = super().prepared_stream(expected_bytes)
        return stream and self._wrapped(stream)

    def _wrapped(self, stream: ByteStream) -> ByteStream:
        if not self.wraps:
            return stream
        wrap, *rest = self.wraps
        self.wraps = tuple(rest)
        return wrap(stream)


class WatchedReads(WatchedStream):
    """Calls `when_written` once, after so many bytes were read."""

    def write(self, data: bytes | memoryview) -> None:
        self.inner.write(data)

    def read(self, max_bytes: int) -> bytes:
        data = self.inner.read(max_bytes)
        self._left -= len(data)
        if self._left <= 0 and self._when_written is not None:
            call, self._when_written = self._when_written, None
            call()
        return data


@pytest.fixture
def layout(tmp_path: Path) -> LocalLayout:
    return LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")


@pytest.fixture
def make_node(tmp_path: Path, layout: LocalLayout, connect_to: Connect) -> Iterator[Callable[..., WatchedNode]]:
    nodes: list[WatchedNode] = []

    def make(settings: ConnectionSettings) -> WatchedNode:
        profile = ClusterProfile.model_validate(
            {
                "host": settings.host,
                "node_root": str(tmp_path / "node root $(x)"),
                "python": {"path": sys.executable},
                "retry": {"patience_s": 30, "longest_wait_s": 1},
            }
        )
        retry = profile.retry_policy()
        nodes.append(WatchedNode(profile, build_payload(layout), lambda: connect_to(settings, retry=retry)))
        return nodes[-1]

    yield make
    for node in nodes:
        node.disconnect()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "best $(touch x) \n ü.pt"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def mortal_sshd(tmp_path: Path) -> Iterator[Sshd]:
    server = start_sshd(tmp_path / "mortal")
    yield server
    server.stop()


def fetch(node: Node, path: str, target: Path, idle_timeout_s: float = 60.0) -> None:
    wanted = Download(path, target, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    download_files(node, [wanted], retry=NEXT_TIME, idle_timeout_s=idle_timeout_s)
    assert target.read_bytes() == CONTENT


def test_a_file_goes_up_and_comes_back(
    make_node: Callable[..., WatchedNode],
    settings: ConnectionSettings,
    layout: LocalLayout,
    local: Path,
    tmp_path: Path,
) -> None:
    node = make_node(settings)
    manifest = digest_local_file(local, layout).manifest
    seen: list[TransferProgress] = []
    sent = upload_file(node, local, manifest, on_progress=seen.append)
    assert Path(sent.path_on_node).read_bytes() == CONTENT
    assert seen[-1].bytes_done == len(CONTENT)
    fetch(node, sent.path_on_node, tmp_path / "back")
    assert upload_file(node, local, manifest).bytes_sent == 0
    assert node.counts.logins == 1


def test_a_file_goes_while_it_is_hashed_and_the_rest_of_it_over_the_same_logins(
    make_node: Callable[..., WatchedNode],
    settings: ConnectionSettings,
    layout: LocalLayout,
    local: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafts, "WORTH_S", -1.0)
    node, ledger = make_node(settings), ChunkLedger()
    node.wraps = (ledger.around, ledger.around)
    sent_by_draft: list[int] = []

    class SlowlyHashed(drafts.Draft):
        """Waits, behind the third chunk, until the draft has arrived so far."""

        def hashed(self, index: int, sha256: bytes, /) -> None:
            super().hashed(index, sha256)
            if index == 2:
                until(lambda: self.bytes_arrived >= 3 * CHUNK_BYTES)
                sent_by_draft.append(self.bytes_arrived)

    _ = node.hello  # installs the payload, which a stream cannot
    node.prepare_streams(lambda _: 1)
    draft = SlowlyHashed(
        Carrier(node, streams=StreamPolicy(fixed=1)),
        local,
        order=lambda spans: range(len(spans)),
        ask_known=lambda size: node.call("known_chunks", KnownRequest(node.root, size), KnownChunks),
        on_progress=lambda _: None,
    )
    monkeypatch.setattr(fingerprints, "usable_processors", lambda: 1)
    with draft:
        manifest = digest_local_file(local, layout, draft).manifest
        sent = upload_file(node, local, manifest, draft=draft)
    assert Path(sent.path_on_node).read_bytes() == CONTENT
    assert (sent.bytes_sent, sent.bytes_saved) == (len(CONTENT), 0)
    assert sent_by_draft[0] >= 3 * CHUNK_BYTES
    assert node.started == ["standby"]


def test_what_packing_took_off_weights_is_told_as_they_go(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings, local: Path
) -> None:
    content = bfloat16(4 * MIB)
    local.write_bytes(content)
    seen: list[TransferProgress] = []
    sent = upload_file(
        make_node(settings),
        local,
        manifest_of(content, even_cuts(len(content), MIB)),
        on_progress=seen.append,
        bandwidth_limit_bytes_per_s=6e6,
    )
    assert Path(sent.path_on_node).read_bytes() == content
    assert seen[-1].bytes_packed == sent.bytes_packed == len(content) - sent.bytes_sent > 0
    assert transfer_event("checkpoint", seen[-1])["saved"]["packed"] == sent.bytes_packed
    assert transfer_line("checkpoint", seen[-1]).endswith("saved by packing")
    assert [one.bytes_packed for one in seen] == sorted(one.bytes_packed for one in seen)


def test_weights_come_back_packed_over_a_slow_link(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings, local: Path, tmp_path: Path
) -> None:
    content = bfloat16(2 * MIB) * 12
    local.write_bytes(content)
    node = make_node(settings)
    listed = node.call("list_files", ListRequest(node.layout.root, str(local)), FileList)
    seen: list[TransferProgress] = []
    target = tmp_path / "back"
    done = fetch_file(
        node, listed.path, listed.files[0], target, on_progress=seen.append, bandwidth_limit_bytes_per_s=15e6
    )
    assert target.read_bytes() == content
    assert seen[-1].bytes_packed == done.bytes_packed == len(content) - done.bytes_received > 0
    plain = fetch_file(node, listed.path, listed.files[0], tmp_path / "plain", packing=False)
    assert (plain.bytes_received, plain.bytes_packed) == (len(content), 0)


def test_a_server_that_dies_in_the_middle_is_survived_both_ways(
    make_node: Callable[..., WatchedNode], mortal_sshd: Sshd, layout: LocalLayout, local: Path, tmp_path: Path
) -> None:
    node = make_node(mortal_sshd.settings())
    manifest = digest_local_file(local, layout).manifest
    node.wraps = tuple(
        lambda inner, at=at: WatchedStream(inner, at, mortal_sshd.kill_sessions)  # type: ignore[misc]
        for at in (MIB, 20 * MIB, 12 * MIB)
    )
    sent = upload_file(node, local, manifest, retry=NEXT_TIME)
    assert Path(sent.path_on_node).read_bytes() == CONTENT
    node.wraps = tuple(
        lambda inner, at=at: WatchedReads(inner, at, mortal_sshd.kill_sessions)  # type: ignore[misc]
        for at in (MIB, 20 * MIB)
    )
    fetch(node, sent.path_on_node, tmp_path / "back")
    assert node.counts.logins >= 4


def test_a_link_that_goes_silent_is_noticed_and_the_transfer_goes_on_over_a_new_one(
    make_node: Callable[..., WatchedNode], mortal_sshd: Sshd, layout: LocalLayout, local: Path, tmp_path: Path
) -> None:
    manifest = digest_local_file(local, layout).manifest
    with relay_to(mortal_sshd.port) as relay, concurrent.futures.ThreadPoolExecutor(1) as healer:
        mortal_sshd.also_known_at(relay.port)
        node = make_node(dataclasses.replace(mortal_sshd.settings(), port=relay.port))
        mend_on_reconnect = node.reconnect

        def reconnect() -> None:
            healer.submit(relay.mend)
            mend_on_reconnect()

        node.reconnect = reconnect  # type: ignore[method-assign]
        node.wraps = (lambda inner: WatchedStream(inner, 10 * MIB, relay.hold),)
        sent = upload_file(node, local, manifest, retry=NEXT_TIME, idle_timeout_s=1.5)
        assert Path(sent.path_on_node).read_bytes() == CONTENT
        node.wraps = (lambda inner: WatchedReads(inner, 10 * MIB, relay.hold),)
        fetch(node, sent.path_on_node, tmp_path / "back", idle_timeout_s=1.5)
        assert node.counts.logins == 3


@pytest.mark.parametrize("is_told", [True, False])
def test_a_client_that_comes_back_over_another_network_sends_no_verified_chunk_again(
    make_node: Callable[..., WatchedNode], mortal_sshd: Sshd, local: Path, tmp_path: Path, is_told: bool
) -> None:
    manifest = manifest_of(CONTENT, even_cuts(len(CONTENT), MIB))
    ledger, root = ChunkLedger(), tmp_path / "node root $(x)"
    with relay_to(mortal_sshd.port) as relay:
        mortal_sshd.also_known_at(relay.port)
        node = make_node(dataclasses.replace(mortal_sshd.settings(), port=relay.port))
        has_left: list[bool] = []

        def leave_the_network(progress: TransferProgress) -> None:
            if progress.bytes_done > 15 * MIB and not has_left:
                has_left.append(True)
                relay.strand(is_told=is_told)
                # The agents behind the old connections live on, hear nothing and are told nothing.
                until(lambda: ledger.acknowledged <= journalled(root, manifest), 20.0)

        node.wraps = (ledger.around,) * 10
        sent = upload_file(
            node,
            local,
            manifest,
            retry=NEXT_TIME,
            streams=StreamPolicy(fixed=1),
            idle_timeout_s=60.0 if is_told else 3.0,
            bandwidth_limit_bytes_per_s=30e6,
            on_progress=leave_the_network,
        )
        assert Path(sent.path_on_node).read_bytes() == CONTENT
    assert has_left
    assert ledger.sent_after_acknowledged == []


def test_a_fresh_connection_is_asked_once_before_the_first_chunk_goes(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings, layout: LocalLayout, local: Path
) -> None:
    _ = make_node(settings).hello  # installs the payload
    node = make_node(settings)
    manifest = digest_local_file(local, layout).manifest
    request = LocateRequest(node.root, digest=manifest.digest, size=manifest.size)
    assert not node.call("locate", request, Located).found
    sent = upload_file(node, local, manifest)
    assert (node.counts.logins, node.counts.calls) == (1, 1)
    assert Path(sent.path_on_node).read_bytes() == CONTENT
    again = LocateRequest(node.root, digest=manifest.digest, size=manifest.size)
    assert node.call("locate", again, Located).path == sent.path_on_node
    assert node.counts.calls == 2


def test_the_first_call_installs_the_payload_and_learns_the_node(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings
) -> None:
    node = make_node(settings)
    assert not node.call("locate", LocateRequest(node.root, path="/no/such/file"), Located).found
    calls = node.counts.calls
    assert node.layout.root == node.root
    assert abs(node.clock_offset_s()) < 60.0  # both are this machine
    assert node.counts.calls == calls


def test_a_clock_that_was_told_by_a_long_call_is_asked_for_anew(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.node.CLOCK_DOUBT_S", 0.0)
    node = make_node(settings)
    _ = node.hello
    calls = node.counts.calls
    assert abs(node.clock_offset_s()) < 60.0
    assert node.counts.calls == calls + 1


def test_how_far_the_node_is_tells_the_connection_where_it_is_ours(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings, transport_name: str
) -> None:
    node = make_node(settings)
    _ = node.hello
    told: list[float | None] = []
    node.prepare_streams(lambda round_trip_s: len(told.append(round_trip_s) or told))  # type: ignore[func-returns-value]
    if sys.platform.startswith("linux"):
        assert (told[0] is not None) == (transport_name == "fabric")
    assert told[0] is None or 0 <= told[0] < 1


def test_a_prepared_stream_carries_the_next_upload(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings, layout: LocalLayout, local: Path
) -> None:
    node = make_node(settings)
    _ = node.hello  # installs the payload, without which no stream comes up
    node.prepare_streams(lambda _: 1)
    sent = upload_file(node, local, digest_local_file(local, layout).manifest, streams=StreamPolicy(fixed=1))
    assert Path(sent.path_on_node).read_bytes() == CONTENT
    assert node.started == ["standby"]


def test_a_prepared_stream_that_was_lost_is_done_without(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings, layout: LocalLayout, local: Path
) -> None:
    node = make_node(settings)
    _ = node.hello  # installs the payload, without which no stream comes up
    node.prepare_streams(lambda _: 1)
    node.await_prepared().close()
    manifest = digest_local_file(local, layout).manifest
    sent = upload_file(node, local, manifest, streams=StreamPolicy(fixed=1), retry=NEXT_TIME)
    assert Path(sent.path_on_node).read_bytes() == CONTENT
    assert node.started == ["standby"] * 2
    assert node.counts.logins == 1


def test_a_prepared_stream_that_nobody_asks_for_ends_with_the_connection(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings
) -> None:
    node = make_node(settings)
    _ = node.hello  # installs the payload, without which no stream comes up
    node.prepare_streams(lambda _: 1)
    stream = node.await_prepared()
    node.disconnect()
    with pytest.raises(UnreachableError):
        stream.write(b"x" * MIB)


def test_a_small_file_leaves_prepared_streams_to_others(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings, tmp_path: Path, layout: LocalLayout
) -> None:
    node = make_node(settings)
    _ = node.hello
    node.prepare_streams(lambda _: 1)
    prepared = node.await_prepared()
    small = tmp_path / "small"
    small.write_bytes(b"small")
    upload_file(node, small, digest_local_file(small, layout).manifest)
    assert node.prepared_stream(len(CONTENT)) is prepared
    prepared.close()


def test_as_many_streams_are_prepared_as_the_path_needs(
    make_node: Callable[..., WatchedNode], settings: ConnectionSettings, layout: LocalLayout, local: Path
) -> None:
    node = make_node(settings)
    _ = node.hello
    node.prepare_streams(lambda _: 3)
    node.await_prepared()
    sent = upload_file(node, local, digest_local_file(local, layout).manifest, streams=StreamPolicy(fixed=3))
    assert Path(sent.path_on_node).read_bytes() == CONTENT
    if any(facts.carried_by == "ssh" for facts in sent.streams):
        assert node.started[:3] == ["standby"] * 3
