"""A job that needs the whole checkpoint waits while the rest of it is on its way, and not for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from remote_payload.jobs.rest import Rest, RestNeverCameError
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.plan import JobSpec

DIGEST = "v1:" + "b" * 64


@pytest.fixture
def layout(tmp_path: Path) -> NodeLayout:
    layout = NodeLayout(str(tmp_path))
    part = Path(layout.checkpoint_part(DIGEST))
    part.parent.mkdir(parents=True)
    with part.open("wb") as file:
        file.truncate(1 << 20)
    return layout


def never(_waited_s: int, words: str) -> None:
    raise AssertionError(words)


def test_what_is_there_or_cannot_come_is_not_waited_for(layout: NodeLayout, tmp_path: Path) -> None:
    Rest("/data/best.pt", never).wait()
    Rest(str(tmp_path), never).wait()
    path, part = Path(layout.checkpoint(DIGEST)), Path(layout.checkpoint_part(DIGEST))
    part.rename(path)
    Rest(str(path), never).wait()
    path.unlink()
    Rest(str(path), never).wait()


def test_the_wait_ends_when_the_file_stands_or_its_part_is_gone(layout: NodeLayout) -> None:
    path, part = Path(layout.checkpoint(DIGEST)), Path(layout.checkpoint_part(DIGEST))
    said: list[str] = []

    def finish(_waited_s: int, words: str) -> None:
        said.append(words)
        part.rename(path)

    Rest(str(path), finish).wait()
    assert said == ["waiting for the rest of the checkpoint: 0 B of 1.0 MB are there"]
    path.rename(part)
    Rest(str(path), lambda *_: part.unlink()).wait()
    assert not path.exists()


def test_what_grows_is_waited_for_and_what_does_not_is_given_up_with_words(layout: NodeLayout) -> None:
    path, part = Path(layout.checkpoint(DIGEST)), Path(layout.checkpoint_part(DIGEST))
    looks = 0

    def grow(_waited_s: int, _words: str) -> None:
        nonlocal looks
        looks += 1
        if looks < 3:
            with part.open("r+b") as file:
                file.seek(looks * 100_000)
                file.write(b"x" * 50_000)

    with pytest.raises(RestNeverCameError, match=r"never came: .* of 1\.0 MB are there, and nothing more for 0 s"):
        Rest(str(path), grow, limit_s=0.0).wait()
    assert looks == 3


def test_reconstruct_of_ours_alone_reads_no_more_than_the_weights() -> None:
    assert JobSpec("reconstruct").reads_weights_only
    assert not JobSpec("reconstruct", "mine:run").reads_weights_only
    assert not JobSpec("health").reads_weights_only


def test_health_of_ours_alone_begins_before_the_file_stands() -> None:
    assert JobSpec("health").reads_as_it_arrives
    assert not JobSpec("health", "mine:run").reads_as_it_arrives
    assert not JobSpec("reconstruct").reads_as_it_arrives
