"""Chunks are copied by threads, verified before they are written; blocks are shared where the file system can."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from remote_payload.agent import copying
from remote_payload.agent.copying import Copying, Place
from remote_payload.agent.verified import FileState, state_at
from remote_payload.wire.chunk_table import ChunkTable, pack_chunks
from remote_payload.wire.processors import usable_processors
from tests.support import sharing
from tests.support.agent_streams import even_cuts, manifest_of

CHUNK = 300_001
CONTENT = random.Random(3).randbytes(40 * CHUNK)
TABLE = ChunkTable(pack_chunks(manifest_of(CONTENT, even_cuts(len(CONTENT), CHUNK)).chunks), len(CONTENT))


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def copy(
    fd: int,
    source: Path,
    shift: int = 0,
    indices: Sequence[int] = range(len(TABLE)),
    threads: int = 4,
    verified: FileState | None = None,
) -> set[int]:
    """Copy the chunks from a file in which the content stands `shift` bytes further on."""
    work = [(index, [Place(str(source), TABLE.offset(index) + shift, verified)]) for index in indices]
    return {index for index in Copying(TABLE, fd, work).copied(threads, 60.0) if index is not None}


@pytest.fixture(params=["any", *sharing.mountable()])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(copying, "_SETTLED_S", 0.0)
    if request.param == "any":
        yield tmp_path
    else:
        with sharing.mounted(request.param, tmp_path) as folder:
            yield folder


@pytest.mark.parametrize("shift", [0, 1, 4096, 65536 * 3])
def test_wherever_the_chunks_stood_the_file_is_the_same(disk: Path, shift: int) -> None:
    (disk / "source").write_bytes(bytes(shift) + CONTENT)
    with opened(disk / "part") as fd:
        os.truncate(fd, len(CONTENT))
        assert copy(fd, disk / "source", shift) == set(range(len(TABLE)))
    assert (disk / "part").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", sharing.mountable())
def test_blocks_at_the_same_offset_within_a_block_are_shared(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_SETTLED_S", 0.0)
    with sharing.mounted(kind, tmp_path) as disk:
        (disk / "source").write_bytes(CONTENT)
        before = sharing.used_bytes(disk)
        with opened(disk / "part") as fd:
            os.truncate(fd, len(CONTENT))
            assert copy(fd, disk / "source", indices=[index for index in range(len(TABLE)) if index != 7])
            os.pwrite(fd, CONTENT[7 * CHUNK : 8 * CHUNK], 7 * CHUNK)
        assert sharing.used_bytes(disk) - before < len(CONTENT) / 4
        assert (disk / "part").read_bytes() == CONTENT
        assert (disk / "source").read_bytes() == CONTENT


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much each `preadv` has read."""
    counts: list[int] = []

    def read_at(fd: int, views: list[memoryview], offset: int, real: Callable[..., int] = os.preadv) -> int:
        counts.append(real(fd, views, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", read_at)
    return counts


@pytest.mark.parametrize("kind", sharing.mountable())
@pytest.mark.parametrize("shift", [0, 4096])
def test_what_was_verified_as_it_came_is_shared_and_no_more_read_than_does_not_fill_a_block(
    kind: str, shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: list[int]
) -> None:
    monkeypatch.setattr(copying, "_SETTLED_S", 0.0)
    with sharing.mounted(kind, tmp_path) as disk:
        (disk / "source").write_bytes(bytes(shift) + CONTENT)
        with opened(disk / "part") as fd:
            os.truncate(fd, len(CONTENT))
            verified = state_at(str(disk / "source"))
            assert copy(fd, disk / "source", shift, verified=verified) == set(range(len(TABLE)))
        assert 0 < sum(read_bytes) <= len(TABLE) * 2 * 4095
        assert (disk / "part").read_bytes() == CONTENT


@pytest.mark.parametrize("keeps_time", [False, True])
def test_what_was_written_to_since_it_was_verified_is_not_believed(disk: Path, keeps_time: bool) -> None:
    (disk / "source").write_bytes(CONTENT)
    verified = state_at(str(disk / "source"))
    assert verified is not None
    with opened(disk / "source") as source:
        os.pwrite(source, b"damage", 8 * 4096)
        os.utime(source, ns=(0, verified.mtime_ns if keeps_time else verified.mtime_ns + 1))
    (disk / "part").write_bytes(bytes(len(CONTENT)))
    with opened(disk / "part") as fd:
        assert copy(fd, disk / "source", verified=verified) == set(range(1, len(TABLE)))
    assert (disk / "part").read_bytes() == bytes(CHUNK) + CONTENT[CHUNK:]


@pytest.mark.parametrize("end", [0, 7, 12 * CHUNK + 5])
def test_a_verified_file_that_was_cut_short_gives_what_it_still_holds(disk: Path, end: int) -> None:
    (disk / "source").write_bytes(CONTENT[:end])
    verified = state_at(str(disk / "source"))
    with opened(disk / "part") as fd:
        os.truncate(fd, len(CONTENT))
        assert copy(fd, disk / "source", verified=verified) == set(range(end // CHUNK))


def test_what_is_written_to_the_source_between_verifying_and_sharing_does_not_come_along(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "source").write_bytes(CONTENT)

    real = fcntl.ioctl

    def clone(fd: int, request: int, argument: bytes) -> object:
        with opened(disk / "source") as source:
            os.pwrite(source, b"damage", 8 * 4096)
        return real(fd, request, argument)

    monkeypatch.setattr(copying.fcntl, "ioctl", clone)
    with opened(disk / "part") as fd:
        os.truncate(fd, len(CONTENT))
        assert copy(fd, disk / "source", indices=[0]) == {0}
        assert os.pread(fd, CHUNK, 0) == CONTENT[:CHUNK]


def test_what_a_damaged_source_holds_is_never_written(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(CONTENT[: CHUNK - 1] + b"!" + CONTENT[CHUNK:])
    (tmp_path / "part").write_bytes(bytes(len(CONTENT)))
    with opened(tmp_path / "part") as fd:
        assert copy(fd, tmp_path / "source") == set(range(1, len(TABLE)))
    assert (tmp_path / "part").read_bytes() == bytes(CHUNK) + CONTENT[CHUNK:]


def test_a_source_is_opened_once_by_each_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens: list[str] = []

    def noted(path: str, real: Callable[[str], int | None] = copying._open) -> int | None:
        opens.append(path)
        return real(path)

    monkeypatch.setattr(copying, "_open", noted)
    (tmp_path / "source").write_bytes(CONTENT)
    with opened(tmp_path / "part") as fd:
        copy(fd, tmp_path / "source", threads=3)
    assert 1 <= len(opens) <= 3


def test_a_file_that_cannot_be_written_to_ends_it_and_leaves_no_thread_behind(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    (tmp_path / "part").touch()
    with opened(tmp_path / "part", os.O_RDONLY) as fd, pytest.raises(OSError, match="Bad file descriptor"):
        copy(fd, tmp_path / "source")
    assert not [thread for thread in threading.enumerate() if thread.name == "copying"]


def test_whoever_stops_listening_ends_it_and_leaves_no_thread_behind(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    with opened(tmp_path / "part") as fd:
        work = [(index, [Place(str(tmp_path / "source"), TABLE.offset(index))]) for index in range(len(TABLE))]
        with contextlib.closing(Copying(TABLE, fd, work).copied(2, 60.0)) as copied:
            first = next(copied)
            assert first is not None
            assert os.pread(fd, CHUNK, TABLE.offset(first)) == CONTENT[TABLE.offset(first) :][:CHUNK]
        assert not [thread for thread in threading.enumerate() if thread.name == "copying"]


def test_threads_do_not_run_far_ahead_of_whoever_takes_note(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    with opened(tmp_path / "part") as fd:
        os.truncate(fd, len(CONTENT))
        work = [(index, [Place(str(tmp_path / "source"), TABLE.offset(index))]) for index in range(len(TABLE))]
        copying_all = Copying(TABLE, fd, work)
        with contextlib.closing(copying_all.copied(2, 60.0)) as copied:
            taken = 0
            for _ in copied:
                taken += 1
                written = sum(os.pread(fd, 64, TABLE.offset(index)) != bytes(64) for index in range(len(TABLE)))
                assert written <= taken + 2 + 4
                if taken == 1:
                    time.sleep(0.2)  # what would run ahead has the time to
            assert taken == len(TABLE)


def test_only_processors_that_may_be_used_count() -> None:
    counts: list[int] = []

    def look() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this thread alone
        counts.append(usable_processors())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert counts == [1]
