"""Fetching spans over several streams through cuts, flips, kills and changes: whole and verified, or not there."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import IntegrityError, LockedError, UsageError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer import fetch
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.fetch import FetchResult, fetch_file
from orchestrator.transfer.partial import SpanFile
from orchestrator.transfer.stream_count import StreamPolicy
from remote_payload.agent import send
from remote_payload.agent.listing import list_files
from remote_payload.wire.messages import ListedFile, ListRequest
from remote_payload.wire.stream import HEADER_BYTES, FrameKind, decode_header
from tests.support.agent_streams import CutStream, FlipStream, ThreadOpener, WatchedStream, Wrap, make_node_root

STUBBORN = ReconnectPolicy(max_fruitless=1000, first_wait_s=0.0, longest_wait_s=0.0)
KIB = 1024


@pytest.fixture(scope="module", autouse=True)
def small_spans() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "SPAN_BYTES", 1000)
        patch.setattr(send, "PIECE_BYTES", 300)
        yield


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(size + seed).randbytes(size)


def listed(root: Path, path: Path) -> ListedFile:
    return list_files(ListRequest(str(root), str(path))).files[0]


def bring(
    root: Path,
    source: Path,
    target: Path,
    wraps: list[Wrap] | None = None,
    streams: int = 1,
    *,
    overwrite: bool = False,
) -> FetchResult:
    return fetch_file(
        ThreadOpener(root, wraps or []),
        str(source),
        listed(root, source),
        target,
        overwrite=overwrite,
        streams=StreamPolicy(fixed=streams),
        retry=STUBBORN,
    )


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(0, 12_000),
    streams=st.integers(1, 3),
    cuts=st.lists(st.integers(50, 6000), max_size=4),
    flips=st.lists(st.integers(100, 6000), max_size=2),
)
def test_any_file_over_any_number_of_streams_through_any_cuts_arrives_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, size: int, streams: int, cuts: list[int], flips: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("fetch")
    root, source, target = make_node_root(folder), folder / "source", folder / "target"
    source.write_bytes(noise(size))
    wraps: list[Wrap] = [lambda inner, at=at: CutStream(inner, None, at) for at in cuts]  # type: ignore[misc]
    wraps += [lambda inner, at=at: FlipStream(inner, read_at=at) for at in flips]  # type: ignore[misc]
    done = bring(root, source, target, wraps, streams)
    assert target.read_bytes() == source.read_bytes()
    assert done.bytes_received == size
    assert sorted(path.name for path in folder.iterdir()) == ["node root", "source", "target"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "best \n $(x).pt"
    path.write_bytes(noise(100_000))
    return path


class FirstWants(WatchedStream):
    """Counts what is asked for before the first answer is looked at."""

    def __init__(self, inner: ByteStream) -> None:
        super().__init__(inner, 0, lambda: None)
        self.count = 0

    def write(self, data: bytes | memoryview) -> None:
        super().write(data)
        self.count += self.read_count == 0 and decode_header(bytes(data[:HEADER_BYTES])).kind is FrameKind.WANT


def test_little_is_asked_for_as_it_is_before_the_link_is_known(root: Path, source: Path, tmp_path: Path) -> None:
    streams: list[FirstWants] = []

    def watch(inner: ByteStream) -> ByteStream:
        streams.append(FirstWants(inner))
        return streams[-1]

    bring(root, source, tmp_path / "target", [watch])
    assert [stream.count for stream in streams] == [2]


def test_a_client_killed_in_the_middle_fetches_nothing_again_that_it_had_on_its_disk(
    root: Path, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.transfer import fetch, partial\n"
        "from orchestrator.transfer.stream_count import StreamPolicy\n"
        "from tests.faults.test_fetch_cuts import listed, ThreadOpener\n"
        "fetch.SPAN_BYTES, partial.SYNC_BYTES = 1000, 10_000\n"
        "root, source, target = map(Path, sys.argv[1:])\n"
        "def die(progress):\n"
        "    if progress.bytes_done >= 50_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "fetch.fetch_file(ThreadOpener(root), str(source), listed(root, source), target,\n"
        "    streams=StreamPolicy(fixed=1), bandwidth_limit_bytes_per_s=200_000, on_progress=die)\n"
    )
    command = [sys.executable, "-c", code, str(root), str(source), str(target)]
    killed = subprocess.run(command, timeout=120, capture_output=True, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not target.exists()
    done = bring(root, source, target)
    assert target.read_bytes() == source.read_bytes()
    assert done.bytes_saved >= 40_000
    assert done.bytes_received == 100_000 - done.bytes_saved


def test_a_file_that_changed_on_the_node_is_fetched_from_the_beginning(
    root: Path, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    file = SpanFile(target, "another file of the same name", 100)
    file.write(0, memoryview(b"x" * 1000))
    file.commit(0, 1000)
    file.close()
    assert bring(root, source, target).bytes_received == 100_000
    assert target.read_bytes() == source.read_bytes()


def test_a_journal_that_outlived_its_partial_file_is_not_believed(root: Path, source: Path, tmp_path: Path) -> None:
    target, facts = tmp_path / "target", listed(root, source)
    identity = json.dumps([str(source), facts.size, facts.mtime_ns, facts.inode, fetch.SPAN_BYTES])
    left = SpanFile(target, identity, fetch.span_count(facts.size))
    for index in range(100):
        left.write(index * 1000, memoryview(source.read_bytes()[index * 1000 : (index + 1) * 1000]))
        left.commit(index, 1000)
    left.close()
    # As a client leaves it that is killed behind the rename, before it deletes the journal.
    next(tmp_path.glob(".remote-eval-*.spans")).unlink()
    assert bring(root, source, target).bytes_received == 100_000
    assert target.read_bytes() == source.read_bytes()


def test_a_file_that_changes_while_it_is_fetched_is_refused(root: Path, source: Path, tmp_path: Path) -> None:
    before = listed(root, source)
    os.utime(source, ns=(1, 1))
    with pytest.raises(IntegrityError, match="changed"):
        fetch_file(ThreadOpener(root), str(source), before, tmp_path / "target", retry=STUBBORN)
    assert not (tmp_path / "target").exists()


def test_a_file_that_is_here_already_is_known_and_another_is_not_overwritten_unasked(
    root: Path, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    bring(root, source, target)
    assert bring(root, source, target).how == "unchanged"
    os.utime(target, ns=(1, 1))
    assert bring(root, source, target).how == "unchanged"
    changed = bytearray(source.read_bytes())
    changed[54_321] ^= 1
    target.write_bytes(changed)
    with pytest.raises(UsageError, match="another file"):
        bring(root, source, target)
    assert target.read_bytes() == changed
    assert bring(root, source, target, overwrite=True).how == "fetched"
    assert target.read_bytes() == source.read_bytes()


def with_sha256(root: Path, source: Path, target: Path, sha256: str, opener: ThreadOpener | None = None) -> FetchResult:
    return fetch_file(
        opener or ThreadOpener(root), str(source), listed(root, source), target, overwrite=True, sha256=sha256
    )


def test_a_file_that_has_the_promised_sha256_is_not_asked_for(root: Path, source: Path, tmp_path: Path) -> None:
    promised = hashlib.sha256(source.read_bytes()).hexdigest()
    target, opener = tmp_path / "target", ThreadOpener(root)
    target.write_bytes(source.read_bytes())
    assert with_sha256(root, source, target, promised, opener).how == "unchanged"
    assert opener.opened == 0
    target.write_bytes(noise(100_000, 1))
    assert with_sha256(root, source, target, promised, opener).how == "fetched"
    assert target.read_bytes() == source.read_bytes()


def test_a_file_that_is_not_what_was_promised_does_not_arrive(root: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="SHA-256"):
        with_sha256(root, source, tmp_path / "target", "0" * 64)
    assert not (tmp_path / "target").exists()


def test_what_an_earlier_fetch_left_and_the_disk_damaged_is_fetched_again(
    root: Path, source: Path, tmp_path: Path
) -> None:
    target, facts = tmp_path / "target", listed(root, source)
    identity = json.dumps([str(source), facts.size, facts.mtime_ns, facts.inode, fetch.SPAN_BYTES])
    left = SpanFile(target, identity, fetch.span_count(facts.size))
    left.write(7000, memoryview(b"x" * 1000))
    left.commit(7, 1000)
    left.close()
    promised = hashlib.sha256(source.read_bytes()).hexdigest()
    assert with_sha256(root, source, target, promised).bytes_received == 100_000
    assert target.read_bytes() == source.read_bytes()


def test_a_link_at_the_target_is_not_followed(root: Path, source: Path, tmp_path: Path) -> None:
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "target"
    elsewhere.write_bytes(b"mine")
    target.symlink_to(elsewhere)
    with pytest.raises(UsageError):
        bring(root, source, target)
    bring(root, source, target, overwrite=True)
    assert elsewhere.read_bytes() == b"mine"
    assert target.read_bytes() == source.read_bytes()


def test_two_fetches_to_one_target_do_not_mix(root: Path, source: Path, tmp_path: Path) -> None:
    file = SpanFile(tmp_path / "target", "whatever", 3)
    try:
        with pytest.raises(LockedError):
            bring(root, source, tmp_path / "target")
    finally:
        file.close()


def test_a_node_that_says_an_absurd_size_is_refused(root: Path, source: Path, tmp_path: Path) -> None:
    for size in (-1, 1 << 60):
        with pytest.raises(IntegrityError):
            fetch_file(ThreadOpener(root), str(source), ListedFile("", size, 0, 0), tmp_path / "target")
