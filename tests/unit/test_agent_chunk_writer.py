import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from remote_payload.agent import chunk_writer, quota
from remote_payload.agent.chunk_writer import ChunkWriter, write_mapped
from tests.support.small_disk import small_file_system

MIB = 1024 * 1024
DISK_BYTES = 4 * MIB
FILE_BYTES = 16 * MIB


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[Path], int]]:
    """A sparse file in a folder, open until the end of the test."""
    fds: list[int] = []

    def open_in(folder: Path) -> int:
        fds.append(os.open(folder / "file", os.O_RDWR | os.O_CREAT, 0o600))
        os.ftruncate(fds[-1], FILE_BYTES)
        return fds[-1]

    yield open_in
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 70_001, FILE_BYTES - 100_000])
def test_what_is_written_through_a_mapping_stands_where_it_belongs_and_nowhere_else(
    tmp_path: Path, opened: Callable[[Path], int], offset: int
) -> None:
    data, fd = random.Random(offset).randbytes(100_000), opened(tmp_path)
    assert write_mapped(fd, memoryview(data), offset)
    assert (tmp_path / "file").read_bytes() == bytes(offset) + data + bytes(FILE_BYTES - offset - len(data))


def test_nothing_is_mapped_beyond_the_end_of_the_file(tmp_path: Path, opened: Callable[[Path], int]) -> None:
    assert not write_mapped(opened(tmp_path), memoryview(bytes(2)), FILE_BYTES - 1)
    assert (tmp_path / "file").stat().st_size == FILE_BYTES


def test_a_writer_that_waits_for_others_goes_through_a_mapping_and_tries_again_later(
    tmp_path: Path, opened: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []

    def noting(fd: int, data: memoryview, offset: int) -> bool:
        mapped.append(offset)
        return write_mapped(fd, data, offset)

    monkeypatch.setattr(chunk_writer, "write_mapped", noting)
    monkeypatch.setattr(chunk_writer, "CONTENDED_BYTES_PER_S", 1e15)
    monkeypatch.setattr(chunk_writer, "MAPPED_IN_A_ROW", 2)
    monkeypatch.setattr(quota, "file_system_type", lambda _path: "tmpfs")
    writer, content = ChunkWriter(opened(tmp_path), str(tmp_path)), random.Random(1).randbytes(70)
    for number in range(7):
        writer.write(memoryview(content)[10 * number : 10 * number + 10], 10 * number)
    assert mapped == [10, 20, 40, 50]
    assert (tmp_path / "file").read_bytes()[:70] == content


def test_nothing_is_mapped_on_a_disk(
    tmp_path: Path, opened: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_writer, "CONTENDED_BYTES_PER_S", 1e15)
    monkeypatch.setattr(chunk_writer, "write_mapped", lambda *_: pytest.fail("mapped"))
    monkeypatch.setattr(quota, "file_system_type", lambda _path: "ext4")
    writer = ChunkWriter(opened(tmp_path), str(tmp_path))
    writer.write(memoryview(b"one"), 0)
    writer.write(memoryview(b"two"), 3)
    assert (tmp_path / "file").read_bytes()[:6] == b"onetwo"


def test_a_full_memory_file_system_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, opened: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_writer, "CONTENDED_BYTES_PER_S", 1e15)
    monkeypatch.setattr(quota, "file_system_type", lambda _path: "tmpfs")
    with small_file_system(tmp_path, DISK_BYTES) as disk:
        writer = ChunkWriter(opened(disk.root if disk else tmp_path), str(tmp_path))
        writer.write(memoryview(bytes(MIB)), 0)
        if disk is None:  # this user may mount nothing; there is room then
            writer.write(memoryview(bytes(8 * MIB)), MIB)
            return
        with pytest.raises(OSError, match=r".") as refused:
            writer.write(memoryview(bytes(8 * MIB)), MIB)
        assert refused.value.errno == errno.ENOSPC
