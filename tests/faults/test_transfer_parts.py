"""Files of which only some chunks are asked for: those can be read, the others cannot, and come when needed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import UnreachableError, UsageError
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.progress import TransferProgress
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import upload_file
from remote_payload.checkpoint.errors import BytesNotSentError, MissingCheckpointError
from remote_payload.checkpoint.source import Source
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.layout import NodeLayout
from tests.support.agent_streams import (
    CutStream,
    ProcessOpener,
    ThreadOpener,
    check_not_stored,
    check_stored,
    even_cuts,
    make_node_root,
    manifest_of,
)

AGENT = [sys.executable, "-m", "remote_payload", "agent", "stream"]
NO_PATIENCE = ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0)
STUBBORN = ReconnectPolicy(max_fruitless=1000, first_wait_s=0.0, longest_wait_s=0.0)
CONTENT = random.Random(6).randbytes(10_000)
MANIFEST = manifest_of(CONTENT, even_cuts(len(CONTENT), 1000))
SOME = [8, 2, 3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "local"
    path.write_bytes(CONTENT)
    return path


def check_kept(root: Path, manifest: ChunkManifest, content: bytes, wanted: list[int]) -> list[int]:
    """Each chunk is read as it is or refused; those wanted are not refused. Returns the ones that are there."""
    here = []
    with Source(NodeLayout(str(root)).checkpoint(manifest.digest)) as source:
        for index, chunk in enumerate(manifest.chunks):
            with contextlib.suppress(BytesNotSentError):
                read = source.read(chunk.offset, chunk.length)
                assert read == content[chunk.offset : chunk.offset + chunk.length]
                here.append(index)
    assert set(wanted) <= set(here)
    return here


def test_what_was_asked_for_can_be_read_and_the_rest_is_all_that_follows(root: Path, local: Path) -> None:
    kept = upload_file(ThreadOpener(root), local, MANIFEST, order=SOME)
    assert (kept.is_complete, kept.bytes_sent, kept.bytes_saved) == (False, 3000, 0)
    assert kept.path_on_node == NodeLayout(str(root)).checkpoint(MANIFEST.digest)
    check_not_stored(root, MANIFEST)
    assert check_kept(root, MANIFEST, CONTENT, SOME) == sorted(SOME)
    again = upload_file(ThreadOpener(root), local, MANIFEST, order=SOME)
    assert (again.is_complete, again.bytes_sent, again.bytes_saved) == (False, 0, 3000)
    more = upload_file(ThreadOpener(root), local, MANIFEST, order=[3, 4])
    assert (more.is_complete, more.bytes_sent, more.bytes_saved) == (False, 1000, 1000)
    assert check_kept(root, MANIFEST, CONTENT, SOME) == [2, 3, 4, 8]
    whole = upload_file(ThreadOpener(root), local, MANIFEST)
    assert (whole.is_complete, whole.bytes_sent, whole.bytes_saved) == (True, 6000, 4000)
    check_stored(root, MANIFEST, CONTENT)
    late = upload_file(ThreadOpener(root), local, MANIFEST, order=SOME)
    assert (late.is_complete, late.bytes_sent) == (True, 0)


@settings(max_examples=80, deadline=None)
@given(
    content=st.binary(min_size=1, max_size=4000),
    borders=st.lists(st.integers(0, 4000), max_size=25),
    rounds=st.lists(
        st.tuples(st.lists(st.integers(0, 25), max_size=26), st.none() | st.integers(0, 6000), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    streams=st.integers(1, 3),
)
def test_any_parts_through_any_cuts_are_read_rightly_and_end_as_the_file_byte_for_byte(
    content: bytes, borders: list[int], rounds: list[tuple[list[int], int | None, bool]], streams: int
) -> None:
    """Contents are short, so that chunks repeat each other too."""
    with tempfile.TemporaryDirectory() as folder:
        root, local = make_node_root(Path(folder)), Path(folder) / "local"
        local.write_bytes(content)
        manifest = manifest_of(content, borders)
        policy = StreamPolicy(fixed=streams)
        promised: set[int] = set()
        for asked, cut_at, is_stubborn in rounds:
            order = list(dict.fromkeys(index for index in asked if index < len(manifest.chunks)))
            if not order:
                continue
            wraps = [] if cut_at is None else [lambda inner, at=cut_at: CutStream(inner, at, None)]
            opener = ThreadOpener(root, wraps)
            with contextlib.suppress(UnreachableError):
                retry = STUBBORN if is_stubborn else NO_PATIENCE
                upload_file(opener, local, manifest, order=order, retry=retry, streams=policy)
                promised |= set(order)
            with contextlib.suppress(MissingCheckpointError):
                check_kept(root, manifest, content, sorted(promised))
                continue
            assert not promised
        upload_file(ThreadOpener(root), local, manifest, streams=policy)
        check_stored(root, manifest, content)


def send_some_of_the_rest(root: Path, local: Path, count: int) -> list[int]:
    """Of the rest, `count` bytes in the file's order, then the link is lost; what can be read."""
    wraps = [lambda inner, most=most: CutStream(inner, most, None) for most in (count + 1_500, *[1] * 5)]
    with contextlib.suppress(UnreachableError):
        upload_file(ThreadOpener(root, wraps), local, MANIFEST, retry=NO_PATIENCE, streams=StreamPolicy(fixed=1))
    check_not_stored(root, MANIFEST)
    return check_kept(root, MANIFEST, CONTENT, SOME)


def test_what_arrives_of_the_rest_can_be_read_before_all_of_it_is_there(root: Path, local: Path) -> None:
    upload_file(ThreadOpener(root), local, MANIFEST, order=SOME)
    first = send_some_of_the_rest(root, local, 2_000)
    assert set(SOME) < set(first) < set(range(10))
    journal = Path(NodeLayout(str(root)).checkpoint_journal(MANIFEST.digest)).read_text().splitlines()[1:]
    assert first == sorted(int(line.split()[0]) for line in journal if line)
    upload_file(ThreadOpener(root), local, MANIFEST)
    check_stored(root, MANIFEST, CONTENT)


def test_what_was_journalled_and_not_listed_is_read_once_the_upload_goes_on(root: Path, local: Path) -> None:
    upload_file(ThreadOpener(root), local, MANIFEST, order=SOME)
    readable = Path(NodeLayout(str(root)).checkpoint_readable(MANIFEST.digest))
    before = readable.read_bytes()
    first = send_some_of_the_rest(root, local, 2_000)
    readable.write_bytes(before + b"\n0 10")
    assert check_kept(root, MANIFEST, CONTENT, SOME) == sorted(SOME)
    assert set(first) <= set(send_some_of_the_rest(root, local, 0))


def test_an_agent_killed_at_any_chunk_leaves_nothing_readable_that_is_not_there(root: Path, local: Path) -> None:
    for kill_at in (1, 1001, 2001):
        opener = ProcessOpener(root, lambda request: [*AGENT, request])

        def die(progress: TransferProgress, opener: ProcessOpener = opener, kill_at: int = kill_at) -> None:
            if progress.bytes_done >= kill_at:
                opener.kill()

        with contextlib.suppress(UnreachableError):
            upload_file(opener, local, MANIFEST, order=SOME, on_progress=die, retry=NO_PATIENCE)
        with contextlib.suppress(MissingCheckpointError):
            check_kept(root, MANIFEST, CONTENT, SOME)
    upload_file(ProcessOpener(root, lambda request: [*AGENT, request]), local, MANIFEST, order=SOME)
    check_kept(root, MANIFEST, CONTENT, SOME)


def test_clients_with_other_needs_do_not_hurt_each_other(root: Path, local: Path) -> None:
    """Whoever is first: what each asked for is there when it is done, and nothing goes twice."""
    needs: list[list[int] | None] = [[0, 1], [8, 9, 1], None, [5]]

    def upload(order: list[int] | None) -> int:
        opener = ProcessOpener(root, lambda request: [*AGENT, request])
        sent = upload_file(opener, local, MANIFEST, order=order, retry=NO_PATIENCE).bytes_sent
        check_kept(root, MANIFEST, CONTENT, order or list(range(10)))
        return sent

    with concurrent.futures.ThreadPoolExecutor(len(needs)) as clients:
        sent = list(clients.map(upload, needs))
    assert sum(sent) == len(CONTENT)
    check_stored(root, MANIFEST, CONTENT)


def test_a_reader_goes_on_while_the_part_becomes_the_file(root: Path, local: Path) -> None:
    upload_file(ThreadOpener(root), local, MANIFEST, order=SOME)
    path = NodeLayout(str(root)).checkpoint(MANIFEST.digest)
    is_over, failures = threading.Event(), []

    def read_on() -> None:
        while not is_over.is_set():
            with Source(path) as source:
                if source.read(8000, 1000) != CONTENT[8000:9000]:
                    failures.append("wrong bytes")

    reader = threading.Thread(target=read_on)
    with Source(path) as opened:
        reader.start()
        upload_file(ThreadOpener(root), local, MANIFEST)
        assert opened.read(2000, 2000) == CONTENT[2000:4000]
        with pytest.raises(BytesNotSentError):
            opened.read(0, 1000)
    is_over.set()
    reader.join(30)
    assert not failures
    check_stored(root, MANIFEST, CONTENT)


def lose_the_journal(layout: NodeLayout) -> None:
    Path(layout.checkpoint_journal(MANIFEST.digest)).unlink()


def shorten_the_part(layout: NodeLayout) -> None:
    os.truncate(layout.checkpoint_part(MANIFEST.digest), 5000)


def replace_the_part(layout: NodeLayout) -> None:
    part = Path(layout.checkpoint_part(MANIFEST.digest))
    part.rename(part.with_name("kept so that the inode is not used again"))
    part.write_bytes(bytes(len(CONTENT)))


@pytest.mark.parametrize("harm", [lose_the_journal, shorten_the_part, replace_the_part])
def test_a_part_that_is_begun_anew_is_another_file_than_the_one_that_a_job_has_open(
    root: Path, local: Path, harm: Callable[[NodeLayout], None]
) -> None:
    upload_file(ThreadOpener(root), local, MANIFEST, order=SOME)
    layout = NodeLayout(str(root))
    with Source(layout.checkpoint(MANIFEST.digest)) as opened:
        harm(layout)
        upload_file(ThreadOpener(root), local, MANIFEST, order=[0])
        assert opened.read(2000, 2000) == CONTENT[2000:4000]
        assert os.fstat(opened._descriptor).st_ino != Path(layout.checkpoint_part(MANIFEST.digest)).stat().st_ino
    assert check_kept(root, MANIFEST, CONTENT, [0]) == [0]
    upload_file(ThreadOpener(root), local, MANIFEST)
    assert Path(layout.checkpoint(MANIFEST.digest)).read_bytes() == CONTENT


def test_chunks_that_another_checkpoint_holds_are_read_and_not_sent(root: Path, local: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.write_bytes(CONTENT[2000:4000] + bytes(1000))
    upload_file(ThreadOpener(root), earlier, manifest_of(earlier.read_bytes(), even_cuts(3000, 1000)))
    kept = upload_file(ThreadOpener(root), local, MANIFEST, order=SOME)
    assert (kept.bytes_sent, kept.bytes_reused) == (1000, 2000)
    assert check_kept(root, MANIFEST, CONTENT, SOME) == sorted(SOME)


def test_where_all_the_rest_is_on_the_node_the_file_is_complete(root: Path, local: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.write_bytes(CONTENT[:9000] + bytes(1000))
    upload_file(ThreadOpener(root), earlier, manifest_of(earlier.read_bytes(), even_cuts(10_000, 1000)))
    kept = upload_file(ThreadOpener(root), local, MANIFEST, order=[9])
    assert (kept.is_complete, kept.bytes_sent) == (True, 1000)
    check_stored(root, MANIFEST, CONTENT)


@pytest.mark.parametrize("order", [[0, 0], [10], [-1]])
def test_an_order_that_names_what_is_not_there_is_refused(root: Path, local: Path, order: list[int]) -> None:
    with pytest.raises(UsageError):
        upload_file(ThreadOpener(root), local, MANIFEST, order=order)
