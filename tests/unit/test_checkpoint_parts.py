"""Reading a checkpoint of which a node keeps a part: the right bytes or an error, never a hole's zeros."""

from __future__ import annotations

import json
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remote_payload.checkpoint.errors import BytesNotSentError, MissingCheckpointError
from remote_payload.checkpoint.source import Source, SourceWindow
from remote_payload.wire.codec import WireError, to_json
from remote_payload.wire.layout import NodeLayout, is_part, part_of
from remote_payload.wire.parts import ReadableSpans, added_lines, parse_readable

DIGEST = "v1:" + "a" * 64
PAGE = mmap.ALLOCATIONGRANULARITY
SIZE = 3 * PAGE
CONTENT = bytes(range(1, 256)) * (SIZE // 255 + 1)


@pytest.fixture
def layout(tmp_path: Path) -> NodeLayout:
    layout = NodeLayout(str(tmp_path))
    Path(layout.checkpoint_folder(DIGEST)).mkdir(parents=True)
    return layout


def keep(layout: NodeLayout, spans: list[tuple[int, int]], changes: dict[str, Any] | None = None) -> str:
    """A part that holds these bytes, and holes; its final path."""
    part = Path(layout.checkpoint_part(DIGEST))
    with part.open("wb") as file:
        file.truncate(SIZE)
        for begin, end in spans:
            file.seek(begin)
            file.write(CONTENT[begin:end])
    readable = to_json(ReadableSpans(part.stat().st_ino, SIZE, tuple(spans))) | (changes or {})
    Path(layout.checkpoint_readable(DIGEST)).write_text(json.dumps(readable))
    return layout.checkpoint(DIGEST)


SPANS = st.lists(st.integers(0, SIZE), max_size=10, unique=True).map(
    lambda at: list(zip(sorted(at)[::2], sorted(at)[1::2], strict=False))
)
READS = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 4000)), min_size=1, max_size=10)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SPANS, READS)
def test_every_way_to_read_gives_the_files_bytes_or_says_that_they_were_not_sent(
    layout: NodeLayout, spans: list[tuple[int, int]], reads: list[tuple[int, int]]
) -> None:
    with Source(keep(layout, spans)) as source:
        assert source.size == SIZE
        edges = [(begin, end - begin) for begin, end in spans]
        for offset, length in [*reads, *edges, *((begin - 1, n) for begin, n in edges if begin)]:
            length = min(length, SIZE - offset)
            is_sent = any(begin <= offset and offset + length <= end for begin, end in spans)
            check_reads(source, offset, length, is_sent)
            start = offset // PAGE * PAGE
            reaches = any(begin <= start and offset + length <= end for begin, end in spans)
            check_map(source, start, offset + length - start, reaches)


def check_reads(source: Source, offset: int, length: int, is_sent: bool) -> None:
    target = bytearray(length)
    if is_sent:
        assert source.read(offset, length) == CONTENT[offset : offset + length]
        source.read_into(offset, memoryview(target))
        assert target == CONTENT[offset : offset + length]
        assert SourceWindow(source, offset, length).read(0, length) == target
        return
    for read in (
        lambda: source.read(offset, length),
        lambda: source.read_into(offset, memoryview(target)),
        lambda: SourceWindow(source, offset, length).read(0, length),
    ):
        with pytest.raises(BytesNotSentError, match="has not arrived in full"):
            read()
    assert target == bytes(length)


def check_map(source: Source, start: int, length: int, is_sent: bool) -> None:
    if is_sent:
        with source.map(start, length) as mapped:
            assert mapped[:] == CONTENT[start : start + length]
        return
    with pytest.raises(BytesNotSentError):
        source.map(start, length)


def test_the_descriptor_is_given_for_what_is_there_alone(layout: NodeLayout) -> None:
    with Source(keep(layout, [(0, SIZE - 1)])) as source:
        assert os.pread(source.descriptor_for(5, SIZE - 6), 10, 5) == CONTENT[5:15]
        with pytest.raises(BytesNotSentError):
            source.descriptor_for(5, SIZE - 5)
    Path(layout.checkpoint_part(DIGEST)).rename(layout.checkpoint(DIGEST))
    with Source(layout.checkpoint(DIGEST)) as source:
        assert os.fstat(source.descriptor_for(0, SIZE)).st_size == SIZE


def add(layout: NodeLayout, begin: int, end: int) -> None:
    with Path(layout.checkpoint_part(DIGEST)).open("r+b") as file:
        file.seek(begin)
        file.write(CONTENT[begin:end])
    with Path(layout.checkpoint_readable(DIGEST)).open("ab") as file:
        file.write(added_lines([(begin, end)]))


def test_what_arrives_is_read_from_the_next_look_on_and_all_once_the_file_stands(layout: NodeLayout) -> None:
    with Source(keep(layout, [(0, 100)])) as source:
        add(layout, 100, 300)
        assert not source.holds(0, 200)
        source.look_again()
        assert source.read(0, 300) == CONTENT[:300]
        assert (source.holds(0, 301), source.is_whole) == (False, False)
        with Path(layout.checkpoint_part(DIGEST)).open("r+b") as file:
            file.write(CONTENT[:SIZE])
        Path(layout.checkpoint_readable(DIGEST)).unlink()
        source.look_again()
        assert not source.holds(0, 301)
        Path(layout.checkpoint_part(DIGEST)).rename(layout.checkpoint(DIGEST))
        source.look_again()
        assert source.is_whole
        assert source.read(0, SIZE) == CONTENT[:SIZE]


def test_another_part_is_not_looked_at_and_another_file_is_once_it_stands(layout: NodeLayout) -> None:
    with Source(keep(layout, [(0, 100)])) as source:
        Path(layout.checkpoint_part(DIGEST)).unlink()
        keep(layout, [(200, 300)])
        source.look_again()
        assert source.read(0, 100) == CONTENT[:100]
        assert not source.holds(200, 100)
        Path(layout.checkpoint(DIGEST)).write_bytes(CONTENT[: SIZE - 1])
        source.look_again()
        assert not source.is_whole
        Path(layout.checkpoint(DIGEST)).write_bytes(CONTENT[:SIZE])
        source.look_again()
        assert source.read(0, SIZE) == CONTENT[:SIZE]


@pytest.mark.parametrize(
    "changes",
    [
        {"part_inode": 1},
        {"size": SIZE - 1},
        {"spans": [[0, SIZE + 1]]},
        {"spans": [[0, 10], [10, 20]]},
        {"spans": [[20, 30], [0, 10]]},
        {"spans": [[5, 5]]},
        {"spans": [[-5, 5]]},
        {"spans": [[0, 5, 9]]},
        {"spans": [[0, True]]},
        {"spans": None},
    ],
)
def test_a_list_of_another_part_or_without_sense_makes_nothing_readable(
    layout: NodeLayout, changes: dict[str, Any]
) -> None:
    path = keep(layout, [(0, 100)], changes)
    with pytest.raises(MissingCheckpointError):
        Source(path)


@settings(max_examples=100, deadline=None)
@given(SPANS, st.lists(SPANS, max_size=4), st.integers(0, 12))
def test_what_is_added_to_the_list_counts_with_it_and_half_a_line_for_nothing(
    first: list[tuple[int, int]], more: list[list[tuple[int, int]]], cut: int
) -> None:
    head = json.dumps(to_json(ReadableSpans(7, SIZE, tuple(first)))).encode()
    torn = b"\n0 %d." % SIZE
    found = parse_readable(head + torn[:cut] + b"".join(map(added_lines, more)))
    spans = [(0, SIZE)] * (cut >= len(torn)) + [span for added in (first, *more) for span in added]
    held = {at for begin, end in spans for at in range(begin, end)}
    assert {at for begin, end in found.spans for at in range(begin, end)} == held
    assert all(end < begin for (_, end), (begin, _) in zip(found.spans, found.spans[1:], strict=False)) or not more


def test_bytes_that_the_part_does_not_have_are_not_added() -> None:
    head = json.dumps(to_json(ReadableSpans(7, 10, ()))).encode()
    with pytest.raises(WireError, match="added to the list"):
        parse_readable(head + added_lines([(5, 11)]))


@pytest.mark.parametrize("missing", ["list", "part", "both"])
def test_a_part_that_nobody_keeps_for_jobs_is_no_checkpoint(layout: NodeLayout, missing: str) -> None:
    path = keep(layout, [(0, SIZE)])
    if missing != "list":
        Path(layout.checkpoint_part(DIGEST)).unlink()
    if missing != "part":
        Path(layout.checkpoint_readable(DIGEST)).unlink()
    with pytest.raises(MissingCheckpointError):
        Source(path)


@pytest.mark.parametrize("which", ["checkpoint_part", "checkpoint_readable"])
def test_no_link_is_followed_to_a_part(layout: NodeLayout, tmp_path: Path, which: str) -> None:
    path = keep(layout, [(0, SIZE)])
    real = Path(getattr(layout, which)(DIGEST))
    real.rename(tmp_path / "elsewhere")
    real.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MissingCheckpointError):
        Source(path)


def test_a_part_is_looked_for_in_a_store_alone(tmp_path: Path) -> None:
    layout = NodeLayout(str(tmp_path))
    assert part_of(layout.checkpoint(DIGEST)) == (layout.checkpoint_part(DIGEST), layout.checkpoint_readable(DIGEST))
    for path in (
        "/data/file",
        "file",
        layout.checkpoint_part(DIGEST),
        f"{tmp_path}/checkpoints/v1-{'A' * 64}/file",
        f"{tmp_path}/checkpoints/v1-{'a' * 64}/other",
        f"{tmp_path}/elsewhere/v1-{'a' * 64}/file",
        f"checkpoints/v1-{'a' * 64}/file",
        "",
    ):
        assert part_of(path) is None
    assert is_part(layout.checkpoint_part(DIGEST))
    assert not is_part(layout.checkpoint(DIGEST))
    assert not is_part("/data/file.part")


def test_a_part_that_becomes_the_file_at_any_time_is_read_as_one_or_the_other(layout: NodeLayout) -> None:
    for _ in range(100):
        path = keep(layout, [(0, PAGE)])
        begins = threading.Barrier(2)

        def finish() -> None:
            begins.wait(30)  # noqa: B023 - joined before the next round
            Path(layout.checkpoint_part(DIGEST)).rename(layout.checkpoint(DIGEST))
            Path(layout.checkpoint_readable(DIGEST)).unlink()

        finisher = threading.Thread(target=finish)
        finisher.start()
        begins.wait(30)
        for _ in range(20):
            with Source(path) as source:
                assert source.read(100, 1000) == CONTENT[100:1100]
        finisher.join(30)
        Path(path).unlink()
