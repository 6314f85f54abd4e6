"""Small files of a folder come over one stream, whole or not at all, and only those that are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import IntegrityError, UnreachableError, UsageError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.fetch import FetchResult
from orchestrator.transfer.small_files import RemoteFile, fetch_small_files
from remote_payload.agent.listing import list_files
from remote_payload.wire.messages import ListRequest
from tests.support.agent_streams import CutStream, FlipStream, ThreadOpener, TurnStream, make_node_root
from tests.support.world import digests

NO_PATIENCE = ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0)
AT_ONCE = ReconnectPolicy(max_fruitless=3, first_wait_s=0.0, longest_wait_s=0.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    folder = tmp_path / "there"
    folder.mkdir()
    for number in range(300):
        (folder / f"part {number}").write_bytes(f"{number}".encode() * number)
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def bring(
    opener: ThreadOpener, there: Path, here: Path, *, overwrite: bool = False, retry: ReconnectPolicy = AT_ONCE
) -> list[FetchResult]:
    listed = list_files(ListRequest(opener.layout.root, str(there))).files
    files = [RemoteFile(str(there / file.name), file, here / file.name) for file in listed]
    return fetch_small_files(opener, files, overwrite=overwrite, retry=retry)


def received(results: list[FetchResult]) -> int:
    return sum(result.bytes_received for result in results)


def test_three_hundred_files_take_one_stream_on_which_wants_run_ahead(root: Path, there: Path, here: Path) -> None:
    streams: list[TurnStream] = []

    def watched(inner: ByteStream) -> ByteStream:
        streams.append(TurnStream(inner))
        return streams[-1]

    bring(ThreadOpener(root, [watched]), there, here)
    assert digests(here) == digests(there)
    assert len(streams) == 1
    # After the first wants each answer makes room for one more, which nobody waits for.
    assert streams[0].turns <= 300 - 64 + 1
    assert (here / "part 7").stat().st_mtime_ns == (there / "part 7").stat().st_mtime_ns


def test_what_is_here_is_compared_and_only_the_rest_comes(root: Path, there: Path, here: Path) -> None:
    bring(ThreadOpener(root), there, here)
    (here / "part 200").unlink()
    again = bring(ThreadOpener(root), there, here)
    assert received(again) == (there / "part 200").stat().st_size
    assert [result.how for result in again].count("unchanged") == 299
    assert digests(here) == digests(there)


def test_another_file_of_the_same_size_is_found_out_and_kept_unless_forced(root: Path, there: Path, here: Path) -> None:
    (here / "part 3").write_bytes(b"abc")
    with pytest.raises(UsageError, match="another file is at"):
        bring(ThreadOpener(root), there, here)
    assert (here / "part 3").read_bytes() == b"abc"
    bring(ThreadOpener(root), there, here, overwrite=True)
    assert digests(here) == digests(there)


@pytest.mark.parametrize("kind", ["another size", "link", "folder"])
def test_what_stands_in_the_way_is_refused_before_anything_comes(
    root: Path, there: Path, here: Path, tmp_path: Path, kind: str
) -> None:
    target = here / "part 3"
    if kind == "another size":
        target.write_bytes(b"longer than three")
    elif kind == "link":
        (tmp_path / "mine").write_bytes(b"333")
        target.symlink_to(tmp_path / "mine")
    else:
        target.mkdir()
    with pytest.raises(UsageError):
        bring(ThreadOpener(root), there, here)
    assert len(list(here.iterdir())) == 1


def test_a_cut_fetch_is_gone_on_with(root: Path, there: Path, here: Path) -> None:
    cut = ThreadOpener(root, [lambda inner: CutStream(inner, None, 40_000), lambda inner: CutStream(inner, None, 0)])
    with pytest.raises(UnreachableError):
        bring(cut, there, here, retry=NO_PATIENCE)
    arrived = sum(path.stat().st_size for path in here.iterdir())
    assert arrived > 0
    results = bring(ThreadOpener(root, [lambda inner: CutStream(inner, None, 40_000)]), there, here)
    assert received(results) == sum(path.stat().st_size for path in there.iterdir()) - arrived
    assert digests(here) == digests(there)


def test_a_damaged_answer_is_asked_for_again(root: Path, there: Path, here: Path) -> None:
    bring(ThreadOpener(root, [lambda inner: FlipStream(inner, read_at=60_000)]), there, here)
    assert digests(here) == digests(there)


def test_a_file_that_changed_since_it_was_listed_is_an_error(root: Path, there: Path, here: Path) -> None:
    def act(inner: ByteStream) -> ByteStream:
        (there / "part 250").write_bytes(b"other")
        return inner

    with pytest.raises(IntegrityError, match="changed while it was fetched"):
        bring(ThreadOpener(root, [act]), there, here)
    assert not (here / "part 250").exists()
