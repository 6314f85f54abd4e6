"""Uploads through cuts, flips, kills and full disks: the file on the node is the file here, or there is none."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import IntegrityError, NodeUnfitError, UnreachableError, UsageError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer import sender
from orchestrator.transfer.channel import ReconnectPolicy, StreamEndedError
from orchestrator.transfer.progress import TransferProgress
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import LocalFileChangedError, UploadResult, upload_file
from remote_payload.agent import receive
from remote_payload.wire.chunks import CHUNK_BYTES, Chunk, ChunkManifest, digest_file, file_digest
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import (
    HEADER_BYTES,
    FinishedFacts,
    FrameKind,
    LeftFacts,
    decode_header,
    encode_frame,
    encode_json_frame,
)
from tests.support.agent_node import agent_node, interpreter_name, interpreters
from tests.support.agent_streams import (
    CutStream,
    FlipStream,
    ProcessOpener,
    ThreadOpener,
    WatchedStream,
    Wrap,
    check_not_stored,
    check_stored,
    even_cuts,
    make_node_root,
    manifest_of,
)

MIB = 1024 * 1024
AGENT = [sys.executable, "-m", "remote_payload", "agent", "stream"]
NO_PATIENCE = ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0)
AT_ONCE = ReconnectPolicy(max_fruitless=3, first_wait_s=0.0, longest_wait_s=0.0)
STUBBORN = ReconnectPolicy(max_fruitless=1000, first_wait_s=0.0, longest_wait_s=0.0)


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def start_agent(request: str) -> list[str]:
    return [*AGENT, request]


def cut_after(written: int | None = None, read: int | None = None) -> Wrap:
    return lambda inner: CutStream(inner, written, read)


def each_wrapped(wrap: Wrap, times: int = 100) -> list[Wrap]:
    return [wrap] * times


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "best $(touch x) \n checkpoint.pt"


CUTS = st.lists(
    st.one_of(
        st.builds(lambda n: (n, None), st.integers(0, 6000)), st.builds(lambda n: (None, n), st.integers(0, 1200))
    ),
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(
    content=st.binary(max_size=4000),
    borders=st.lists(st.integers(0, 4000), max_size=25),
    sessions=st.lists(CUTS, min_size=1, max_size=3),
)
def test_any_content_through_any_cuts_in_any_number_of_sessions_arrives_byte_for_byte(
    content: bytes, borders: list[int], sessions: list[list[tuple[int | None, int | None]]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, local = make_node_root(Path(folder)), Path(folder) / "local"
        local.write_bytes(content)
        manifest = manifest_of(content, borders)
        for cuts in sessions[:-1]:
            opener = ThreadOpener(root, [cut_after(*cut) for cut in cuts[:1]])
            with contextlib.suppress(UnreachableError):
                upload_file(opener, local, manifest, retry=NO_PATIENCE)
        cuts = sessions[-1]
        opener = ThreadOpener(root, [cut_after(*cut) for cut in cuts])
        result = upload_file(opener, local, manifest, retry=STUBBORN)
        assert result.path_on_node == opener.layout.checkpoint(manifest.digest)
        assert opener.reconnects <= len(cuts)
        check_stored(root, manifest, content)


class SaysUnasked(CutStream):
    """Once data has gone, an answer that nobody asked for comes between two frames of the agent's."""

    def __init__(self, inner: ByteStream, answer: bytes) -> None:
        super().__init__(inner, None, None)
        self._answer = answer
        self._has_data_gone = self._is_saying = False

    def read(self, max_bytes: int) -> bytes:
        self._is_saying |= self._has_data_gone and max_bytes == HEADER_BYTES
        if not (self._is_saying and self._answer):
            return super().read(max_bytes)
        said, self._answer = self._answer[:max_bytes], self._answer[max_bytes:]
        return said

    def write(self, data: bytes | memoryview) -> None:
        super().write(data)
        is_header = len(data) == HEADER_BYTES and bytes(data[:2]) == b"RE"
        self._has_data_gone |= is_header and decode_header(bytes(data)).kind is FrameKind.DATA


@pytest.mark.parametrize(
    "answer",
    [
        encode_json_frame(FrameKind.FINISHED, FinishedFacts("/somewhere", "v1:" + "0" * 64, 1)),
        encode_json_frame(FrameKind.LEFT, LeftFacts(0)),
        encode_frame(FrameKind.HAVE, 8, b"\xff"),
    ],
    ids=["FINISHED", "LEFT", "HAVE"],
)
def test_an_answer_that_nobody_asked_for_ends_the_stream_and_another_goes_on(
    root: Path, local: Path, answer: bytes
) -> None:
    content = noise(8000)
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 1000))
    streams: list[ByteStream] = []

    def spoil(inner: ByteStream) -> ByteStream:
        streams.append(SaysUnasked(inner, answer))
        return streams[-1]

    opener = ThreadOpener(root, [spoil])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sender, "_NEXT_CHUNK_S", 5.0)
        upload_file(opener, local, manifest, streams=StreamPolicy(fixed=1), retry=AT_ONCE)
    assert opener.opened == 2
    check_stored(root, manifest, content)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 400).map(noise), st.integers(20, 100), st.booleans(), st.integers(0, 1500))
def test_a_bit_flipped_anywhere_on_the_wire_never_reaches_the_file(
    content: bytes, chunk_bytes: int, is_written: bool, at: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, local = make_node_root(Path(folder)), Path(folder) / "local"
        local.write_bytes(content)
        manifest = manifest_of(content, even_cuts(len(content), chunk_bytes))
        flip: Wrap = lambda inner: FlipStream(inner, *((at, None) if is_written else (None, at)))  # noqa: E731
        upload_file(ThreadOpener(root, [flip]), local, manifest, retry=AT_ONCE)
        check_stored(root, manifest, content)


@pytest.mark.parametrize("python", interpreters(), ids=interpreter_name)
@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 77])
def test_files_around_a_chunks_size_arrive_through_the_real_payload(
    tmp_path: Path, local: Path, python: str, size: int
) -> None:
    content = noise(size)
    local.write_bytes(content)
    with local.open("rb") as file:
        manifest = digest_file(file, size)
    with agent_node(tmp_path, python) as node:
        opener = ProcessOpener(Path(node.root), lambda request: node.command("agent", "stream", request))
        result = upload_file(opener, local, manifest, retry=AT_ONCE)
        assert (result.bytes_sent, result.bytes_saved) == (size, 0)
        check_stored(Path(node.root), manifest, content)
        again = upload_file(opener, local, manifest, retry=AT_ONCE)
        assert (again.bytes_sent, again.bytes_saved) == (0, size)
        located = node.call("locate", digest=manifest.digest, size=size)
        assert (located["how"], located["path"]) == ("store", result.path_on_node)


def test_a_new_client_sends_nothing_again_that_was_acknowledged_before_a_cut(root: Path, local: Path) -> None:
    content = noise(40_000)
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 1000))
    seen: list[TransferProgress] = []
    with pytest.raises(UnreachableError):
        upload_file(
            ThreadOpener(root, [cut_after(written=25_000)]), local, manifest, retry=NO_PATIENCE, on_progress=seen.append
        )
    result = upload_file(ThreadOpener(root), local, manifest, retry=NO_PATIENCE)
    assert result.bytes_saved >= max(progress.bytes_done for progress in seen)
    assert result.bytes_saved > 0
    assert result.bytes_saved + result.bytes_sent == len(content)


def test_progress_ends_with_everything_there_and_says_what_was_saved(root: Path, local: Path) -> None:
    content = noise(5000)
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 100))
    with pytest.raises(UnreachableError):
        upload_file(ThreadOpener(root, [cut_after(written=4000)]), local, manifest, retry=NO_PATIENCE)
    seen: list[TransferProgress] = []
    result = upload_file(ThreadOpener(root), local, manifest, on_progress=seen.append)
    assert seen[-1].bytes_done == seen[-1].bytes_total == 5000
    assert seen[-1].bytes_saved == result.bytes_saved > 0
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)


def test_a_chunk_that_takes_long_gives_signs_of_life(root: Path, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "ALIVE_INTERVAL_S", 0.0)
    content = noise(3 * MIB)
    local.write_bytes(content)
    manifest = manifest_of(content, [])
    opener = ThreadOpener(root)
    seen: list[TransferProgress] = []
    upload_file(opener, local, manifest, on_progress=seen.append, bandwidth_limit_bytes_per_s=12 * MIB)
    check_stored(root, manifest, content)


@pytest.mark.parametrize("kill_at", [1, 3 * MIB, 12 * MIB, 20 * MIB])
def test_killing_the_agent_at_any_instant_costs_only_a_new_stream(root: Path, local: Path, kill_at: int) -> None:
    content = noise(20 * MIB)
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), MIB))
    opener = ProcessOpener(root, start_agent, [lambda inner: WatchedStream(inner, kill_at, lambda: opener.kill())])
    upload_file(opener, local, manifest, retry=AT_ONCE)
    assert opener.opened == 2
    check_stored(root, manifest, content)


def test_killing_the_client_loses_nothing_that_it_had_seen_arrive(root: Path, local: Path) -> None:
    content = noise(5 * CHUNK_BYTES + 11)
    local.write_bytes(content)
    command = [sys.executable, "-m", "tests.support.upload_client", str(root), str(local)]
    killed = subprocess.run([*command, str(2 * CHUNK_BYTES)], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with local.open("rb") as file:
        manifest = digest_file(file, len(content))
    check_not_stored(root, manifest)
    finished = subprocess.run([*command, str(1 << 60)], capture_output=True, timeout=120)
    assert finished.returncode == 0, finished.stderr.decode()
    assert int(finished.stdout.split()[0]) <= len(content) - 2 * CHUNK_BYTES
    check_stored(root, manifest, content)


def test_memory_does_not_grow_with_the_file(root: Path, local: Path) -> None:
    with local.open("wb") as file:
        body = os.urandom(CHUNK_BYTES - 8)
        for number in range(600 * MIB // CHUNK_BYTES):  # no two chunks alike: those would be sent once
            file.write(number.to_bytes(8, "big") + body)
    command = [sys.executable, "-m", "tests.support.upload_client", str(root), str(local), str(1 << 60)]
    # A process counts the memory of the one that it was forked from; a shell between us keeps the tests' own out of it.
    done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    sent, client_kib, agent_kib = map(int, done.stdout.split())
    assert sent == 600 * MIB
    assert client_kib < 200 * 1024
    assert agent_kib < 100 * 1024


def test_a_damaged_chunk_is_sent_again(root: Path, local: Path) -> None:
    content = noise(10_000)
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 1000))
    opener = ThreadOpener(root, [lambda inner: FlipStream(inner, write_at=5000)])
    result = upload_file(opener, local, manifest, retry=NO_PATIENCE)
    assert result.bytes_sent == 11_000
    assert opener.opened == 1
    check_stored(root, manifest, content)


class AlwaysFlipping(FlipStream):
    """Damages every large write in the middle: chunks and not headers."""

    def write(self, data: bytes | memoryview) -> None:
        self._write_at = self.written + len(data) // 2 if len(data) >= 1000 else None
        super().write(data)


def test_a_link_that_damages_everything_ends_in_an_integrity_error_and_no_file(root: Path, local: Path) -> None:
    content = noise(10_000)
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 1000))
    with pytest.raises(IntegrityError, match="damaged"):
        upload_file(ThreadOpener(root, each_wrapped(AlwaysFlipping)), local, manifest, retry=AT_ONCE)
    check_not_stored(root, manifest)


@pytest.mark.parametrize("new", [b"x" * 10_000, b"short", b""], ids=["rewritten", "cut", "emptied"])
def test_a_local_file_that_is_not_what_was_fingerprinted_is_not_sent_as_it(root: Path, local: Path, new: bytes) -> None:
    content = noise(10_000)
    manifest = manifest_of(content, even_cuts(len(content), 1000))
    local.write_bytes(new)
    with pytest.raises(LocalFileChangedError, match="changed while it was being sent"):
        upload_file(ThreadOpener(root), local, manifest, retry=AT_ONCE)
    check_not_stored(root, manifest)


def test_a_missing_local_file_is_a_usage_error(root: Path, local: Path) -> None:
    with pytest.raises(UsageError, match="cannot open"):
        upload_file(ThreadOpener(root), local, manifest_of(b"", []))


def huge_manifest(size: int) -> ChunkManifest:
    chunks = tuple(Chunk(offset, min(CHUNK_BYTES, size - offset), "0" * 64) for offset in range(0, size, CHUNK_BYTES))
    return ChunkManifest(file_digest(chunks), size, chunks)


def test_a_file_larger_than_the_free_space_is_refused_before_a_byte_is_sent(root: Path, local: Path) -> None:
    local.write_bytes(b"")
    facts = os.statvfs(root)
    manifest = huge_manifest(facts.f_bavail * facts.f_frsize + 10**12)
    with pytest.raises(NodeUnfitError, match=r"are still to come and .* are free on the disk at"):
        upload_file(ThreadOpener(root), local, manifest, retry=AT_ONCE)
    check_not_stored(root, manifest)


def test_a_folder_that_is_no_node_root_receives_nothing(tmp_path: Path, local: Path) -> None:
    local.write_bytes(b"content")
    foreign = tmp_path / "home"
    foreign.mkdir(mode=0o700)
    with pytest.raises(NodeUnfitError, match="not a node root"):
        upload_file(ThreadOpener(foreign), local, manifest_of(b"content", []), retry=AT_ONCE)
    assert list(foreign.iterdir()) == []


def test_a_store_that_cannot_be_written_is_said_to_be_unfit(root: Path, local: Path) -> None:
    local.write_bytes(b"content")
    Path(NodeLayout(str(root)).checkpoints).write_text("in the way")
    with pytest.raises(NodeUnfitError):
        upload_file(ThreadOpener(root), local, manifest_of(b"content", []), retry=AT_ONCE)


def test_an_agent_that_keeps_dying_is_not_called_a_lost_connection(root: Path, local: Path) -> None:
    local.write_bytes(noise(MIB))
    manifest = manifest_of(local.read_bytes(), even_cuts(MIB, 1000))

    def kill_early(inner: ByteStream) -> ByteStream:
        return WatchedStream(inner, 1, opener.kill)

    opener = ProcessOpener(root, start_agent, each_wrapped(kill_early))
    with pytest.raises(StreamEndedError, match="exit status 137"):
        upload_file(opener, local, manifest, retry=AT_ONCE)
    assert opener.reconnects == 0


def test_a_bandwidth_limit_is_kept(root: Path, local: Path) -> None:
    content = noise(MIB)
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 64 * 1024))
    result: UploadResult = upload_file(ThreadOpener(root), local, manifest, bandwidth_limit_bytes_per_s=2 * MIB)
    assert result.seconds >= 0.25
