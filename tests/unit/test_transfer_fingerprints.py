"""Manifests of local files: right for any content, remembered, and never believed for changed bytes."""

from __future__ import annotations

import os
import random
import sqlite3
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from orchestrator.errors import CheckpointError, IntegrityError
from orchestrator.layout import LocalLayout
from orchestrator.transfer import fingerprints
from orchestrator.transfer.fingerprints import LocalFile, digest_local_file
from remote_payload.wire.chunks import CHUNK_BYTES, SAMPLE_CHUNKS, digest_file, sample_spans
from tests.support.agent_streams import even_cuts, manifest_of

MIB = 1024 * 1024


def later() -> int:
    """A clock past the time in which a file's time stamps prove nothing."""
    return time.time_ns() + 10 * fingerprints.SETTLED_NS


@pytest.fixture
def layout(tmp_path: Path) -> LocalLayout:
    return LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")


@pytest.fixture
def digest(layout: LocalLayout) -> Callable[[Path], LocalFile]:
    return lambda path: digest_local_file(path, layout, now_ns=later)


def rewrite_keeping_stamps(path: Path, content: bytes) -> None:
    """What `cp -p` over a file, or a restore, does: other bytes under the old size, mtime and inode."""
    facts = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (facts.st_size, facts.st_mtime_ns, facts.st_ino)


class Listener:
    """A `HashListener` that calls `hear` for each chunk."""

    def __init__(
        self,
        hear: Callable[[int], object],
        order: Callable[[Sequence[tuple[int, int]]], Iterable[int]] = lambda spans: range(len(spans)),
    ) -> None:
        self.digests: dict[int, str] = {}
        self._hear = hear
        self._order = order

    def begun(self, spans: Sequence[tuple[int, int]], /) -> Sequence[int]:
        return list(self._order(spans))

    def hashed(self, index: int, sha256: bytes, /) -> None:
        self.digests[index] = sha256.hex()
        self._hear(index)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
def test_the_manifest_is_the_one_of_a_single_plain_reading(
    tmp_path: Path, digest: Callable[[Path], LocalFile], size: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(size).randbytes(size))
    with path.open("rb") as file:
        assert digest(path).manifest == digest_file(file, size)


def test_chunks_of_a_zip_begin_at_its_records(tmp_path: Path, digest: Callable[[Path], LocalFile]) -> None:
    path = tmp_path / "zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"a" * 100_000)
        archive.writestr("b", b"b" * 200_000)
    with path.open("rb") as file:
        expected = digest_file(file, path.stat().st_size)
    assert digest(path).manifest == expected
    assert len(expected.chunks) > 2


def test_chunks_are_read_in_the_order_that_is_asked_for_and_told_with_their_digests(
    tmp_path: Path, layout: LocalLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "usable_processors", lambda: 1)
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(4 * CHUNK_BYTES))
    told: list[int] = []
    listener = Listener(told.append, lambda spans: reversed(range(len(spans))))
    manifest = digest_local_file(path, layout, listener).manifest
    assert told == [3, 2, 1, 0]
    assert [listener.digests[index] for index in range(4)] == [chunk.sha256 for chunk in manifest.chunks]


def test_what_one_thread_does_not_get_to_another_one_hashes(
    tmp_path: Path, layout: LocalLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "usable_processors", lambda: 2)
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(6 * CHUNK_BYTES))
    told: list[int] = []
    others_are_done = threading.Event()

    def hear(index: int) -> None:
        told.append(index)
        if index == 0:
            assert others_are_done.wait(30)
        elif len(told) == 6:
            others_are_done.set()

    digest_local_file(path, layout, Listener(hear))
    assert sorted(told) == list(range(6))


def test_an_unchanged_file_is_not_hashed_again(tmp_path: Path, layout: LocalLayout) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(CHUNK_BYTES + 5))
    hashed: list[int] = []
    first = digest_local_file(path, layout, Listener(hashed.append), now_ns=later)
    assert sorted(hashed) == [0, 1]
    second = digest_local_file(path, layout, Listener(hashed.append), now_ns=later)
    assert sorted(hashed) == [0, 1]
    assert second.was_remembered
    assert not first.was_remembered
    assert (second.manifest, second.fingerprint) == (first.manifest, first.fingerprint)


def test_a_rewrite_that_keeps_size_mtime_and_inode_is_seen(tmp_path: Path, digest: Callable[[Path], LocalFile]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 1000)
    old = digest(path)
    rewrite_keeping_stamps(path, b"b")
    new = digest(path)
    assert not new.was_remembered
    assert new.manifest != old.manifest


def test_a_rewrite_that_no_time_stamp_shows_is_caught_by_the_sample(
    tmp_path: Path, layout: LocalLayout, digest: Callable[[Path], LocalFile]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 1000)
    digest(path)
    rewrite_keeping_stamps(path, b"b")
    with sqlite3.connect(layout.fingerprint_cache) as database:
        database.execute("UPDATE manifests_2 SET ctime_ns = ?", (path.stat().st_ctime_ns,))
    database.close()
    new = digest(path)
    assert not new.was_remembered
    assert new.manifest == manifest_of(path.read_bytes(), [])


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, layout: LocalLayout) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"young")
    digest_local_file(path, layout)
    assert not digest_local_file(path, layout).was_remembered


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own elsewhere")
def test_who_sends_what_is_hashed_has_the_processors_before_those_who_hash(tmp_path: Path, layout: LocalLayout) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * CHUNK_BYTES))
    niceness: set[int] = set()
    digest_local_file(
        path, layout, Listener(lambda _: niceness.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    )
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert min(niceness) > own


def test_another_file_of_the_same_path_is_hashed(tmp_path: Path, digest: Callable[[Path], LocalFile]) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"a" * 100)
    digest(path)
    other.write_bytes(b"b" * 100)
    other.replace(path)
    assert digest(path).manifest == manifest_of(b"b" * 100, [])


def test_a_file_that_is_written_while_it_is_read_is_refused(tmp_path: Path, layout: LocalLayout) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * MIB))

    def write_more(_: int) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(IntegrityError, match="changed while it was read"):
        digest_local_file(path, layout, Listener(write_more), now_ns=later)


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path, layout: LocalLayout) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * MIB))
    with pytest.raises(IntegrityError, match="changed while it was read"):
        digest_local_file(path, layout, Listener(lambda _: os.truncate(path, 10)), now_ns=later)


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path, layout: LocalLayout) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * MIB))

    def replace(_: int) -> None:
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "new").replace(path)

    with pytest.raises(IntegrityError, match="changed while it was read"):
        digest_local_file(path, layout, Listener(replace), now_ns=later)


@pytest.mark.parametrize("junk", [b"this is no database at all" * 1000, b"", b"SQLite format 3\0" + bytes(100)])
def test_a_damaged_cache_costs_time_and_nothing_else(
    tmp_path: Path, layout: LocalLayout, digest: Callable[[Path], LocalFile], junk: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    layout.fingerprint_cache.parent.mkdir(parents=True)
    layout.fingerprint_cache.write_bytes(junk)
    assert digest(path).manifest == manifest_of(b"content", [])
    digest(path)
    assert digest(path).was_remembered


def test_a_cache_row_that_does_not_fit_its_digest_is_not_believed(
    tmp_path: Path, layout: LocalLayout, digest: Callable[[Path], LocalFile]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    digest(path)
    with sqlite3.connect(layout.fingerprint_cache) as database:
        database.execute("UPDATE manifests_2 SET digest = 'v1:" + "0" * 64 + "'")
    database.close()
    assert not digest(path).was_remembered


def test_a_name_that_is_no_text_is_remembered(tmp_path: Path, digest: Callable[[Path], LocalFile]) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff $(x)\n.pt"))
    path.write_bytes(b"content")
    digest(path)
    assert digest(path).was_remembered


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, digest: Callable[[Path], LocalFile], kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(CheckpointError):
        digest(path)


def test_a_sample_has_the_ends_and_stays_within_what_a_node_reads() -> None:
    content = random.Random(3).randbytes(10_000)
    manifest = manifest_of(content, even_cuts(len(content), 100))
    spans = sample_spans(manifest)
    assert len(spans) == SAMPLE_CHUNKS
    assert spans == sample_spans(manifest)
    assert spans[0][0] == 0
    assert spans[-1][0] + spans[-1][1] == len(content)
    everything = [(chunk.offset, chunk.length, chunk.sha256) for chunk in manifest.chunks]
    assert set(spans) <= set(everything)


@pytest.mark.parametrize("chunks", [0, 1, 2, 7])
def test_a_small_file_is_its_own_sample(chunks: int) -> None:
    content = bytes(range(chunks))
    assert len(sample_spans(manifest_of(content, even_cuts(chunks, 1)))) == chunks
