"""Fetching through cuts, flips, changes and hostile nodes: a file at its target is whole and verified, or not there."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import IntegrityError, LockedError, RemoteEvalError, UnreachableError, UsageError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer import download
from orchestrator.transfer.channel import ReconnectPolicy, StreamOpener
from orchestrator.transfer.download import Download, DownloadResult, download_files
from orchestrator.transfer.progress import TransferProgress
from remote_payload.agent import send
from remote_payload.wire.layout import NodeLayout
from tests.support.agent_node import agent_node, interpreter_name, interpreters
from tests.support.agent_streams import (
    CutStream,
    FlipStream,
    ProcessOpener,
    ThreadOpener,
    WatchedStream,
    Wrap,
    make_node_root,
)

MIB = 1024 * 1024
AT_ONCE = ReconnectPolicy(max_fruitless=3, first_wait_s=0.0, longest_wait_s=0.0)
STUBBORN = ReconnectPolicy(max_fruitless=1000, first_wait_s=0.0, longest_wait_s=0.0)
AGENT = [sys.executable, "-m", "remote_payload", "agent", "stream"]


def download_artifact(opener: StreamOpener, path: str, target: Path, size: int, digest: str) -> DownloadResult:
    """One file whose size and SHA-256 the manifest tells."""
    return download_files(opener, [Download(path, target, size, digest)])


def download_file(
    opener: StreamOpener,
    path: str,
    target: Path,
    on_progress: Callable[[TransferProgress], None] | None = None,
    *,
    may_grow: bool = False,
) -> DownloadResult:
    """One file of which nothing is known."""
    return download_files(opener, [Download(path, target, may_grow=may_grow)], on_progress=on_progress)


class OnceOnly(ThreadOpener):
    """A node that cannot be reached again once its link was cut."""

    def reconnect(self) -> None:
        raise UnreachableError("patience has run out")


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def small_spans(span_bytes: int, piece_bytes: int) -> Iterator[None]:
    """Small files in many spans and pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "SPAN_BYTES", span_bytes)
        patch.setattr(send, "PIECE_BYTES", piece_bytes)
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "run $(x)\n folder"
    folder.mkdir()
    return folder


def artifact(root: Path, name: str, content: bytes) -> str:
    path = Path(NodeLayout(str(root)).attempt("run-1", 1).artifacts) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


CUT = st.one_of(st.tuples(st.integers(0, 1500), st.none()), st.tuples(st.none(), st.integers(0, 6000)))


@settings(max_examples=80, deadline=None)
@given(
    contents=st.lists(st.binary(max_size=3000), min_size=1, max_size=4),
    is_known=st.booleans(),
    span_bytes=st.integers(50, 1000),
    sessions=st.lists(st.lists(CUT, max_size=4), min_size=1, max_size=3),
)
def test_any_files_through_any_cuts_in_any_number_of_sessions_arrive_byte_for_byte(
    contents: list[bytes], is_known: bool, span_bytes: int, sessions: list[list[tuple[int | None, int | None]]]
) -> None:
    with tempfile.TemporaryDirectory() as folder, small_spans(span_bytes, 40):
        base = Path(folder)
        root, here = make_node_root(base), base / "here"
        here.mkdir()
        wanted = []
        for number, content in enumerate(contents):
            path = artifact(root, f"job/{number}.bin", content)
            facts = (len(content), sha256(content)) if is_known else (None, None)
            wanted.append(Download(path, here / str(number), *facts))
        for cuts in sessions[:-1]:
            with contextlib.suppress(UnreachableError):
                wraps: list[Wrap] = [lambda inner, cut=cut: CutStream(inner, *cut) for cut in cuts[:1]]  # type: ignore[misc]
                download_files(OnceOnly(root, wraps), wanted, retry=AT_ONCE)
        wraps = [lambda inner, cut=cut: CutStream(inner, *cut) for cut in sessions[-1]]  # type: ignore[misc]
        download_files(ThreadOpener(root, wraps), wanted, retry=STUBBORN)
        assert [(here / str(number)).read_bytes() for number in range(len(contents))] == contents
        assert names(here) == [str(number) for number in range(len(contents))]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 600).map(noise), st.booleans(), st.booleans(), st.integers(0, 2000))
def test_a_bit_flipped_anywhere_on_the_wire_never_reaches_the_target(
    content: bytes, is_known: bool, is_written: bool, at: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, small_spans(100, 30):
        root, target = make_node_root(Path(folder)), Path(folder) / "target"
        path = artifact(root, "a", content)
        flip: Wrap = lambda inner: FlipStream(inner, *((at, None) if is_written else (None, at)))  # noqa: E731
        known = Download(path, target, len(content), sha256(content)) if is_known else Download(path, target)
        download_files(ThreadOpener(root, [flip]), [known], retry=AT_ONCE)
        assert target.read_bytes() == content


@pytest.mark.parametrize("python", interpreters(), ids=interpreter_name)
@pytest.mark.parametrize("size", [0, 1, download.SPAN_BYTES - 1, download.SPAN_BYTES + 1, 5 * download.SPAN_BYTES + 7])
def test_files_around_a_spans_size_arrive_from_the_real_payload(
    tmp_path: Path, here: Path, python: str, size: int
) -> None:
    content = noise(size)
    with agent_node(tmp_path, python) as node:
        opener = ProcessOpener(Path(node.root), lambda request: node.command("agent", "stream", request))
        path = artifact(Path(node.root), "health/health.json", content)
        result = download_artifact(opener, path, here / "a", size, sha256(content))
        assert (here / "a").read_bytes() == content
        assert (result.bytes_total, result.bytes_received) == (size, size)
        download_file(opener, path, here / "b")
        assert (here / "b").read_bytes() == content


@pytest.mark.parametrize("is_known", [True, False])
def test_a_fetch_goes_on_behind_what_was_fetched_before(root: Path, here: Path, is_known: bool) -> None:
    content = noise(50_000)
    path = artifact(root, "a", content)
    wanted = Download(path, here / "a", *((50_000, sha256(content)) if is_known else (None, None)))
    with small_spans(1000, 500):
        with pytest.raises(UnreachableError):
            download_files(OnceOnly(root, [lambda inner: CutStream(inner, None, 40_000)]), [wanted], retry=AT_ONCE)
        assert not (here / "a").exists()
        seen: list[TransferProgress] = []
        result = download_files(ThreadOpener(root), [wanted], on_progress=seen.append)
    assert result.bytes_received <= 20_000
    assert seen[-1].bytes_done == seen[-1].bytes_total == 50_000
    assert seen[-1].bytes_saved == 50_000 - result.bytes_received
    assert names(here) == ["a"]


@pytest.mark.parametrize("is_known", [True, False])
def test_a_damaged_partial_file_is_found_out_and_fetched_anew(root: Path, here: Path, is_known: bool) -> None:
    content = noise(50_000)
    path = artifact(root, "a", content)
    wanted = Download(path, here / "a", *((50_000, sha256(content)) if is_known else (None, None)))
    with small_spans(1000, 500):
        with pytest.raises(UnreachableError):
            download_files(OnceOnly(root, [lambda inner: CutStream(inner, None, 40_000)]), [wanted], retry=AT_ONCE)
        [partial] = here.iterdir()
        with partial.open("r+b") as file:
            file.seek(10_000)
            file.write(b"damaged")
        download_files(ThreadOpener(root), [wanted], retry=AT_ONCE)
    assert (here / "a").read_bytes() == content
    assert names(here) == ["a"]


@pytest.mark.parametrize("is_known", [True, False])
def test_what_was_fetched_of_a_longer_file_leaves_no_tail(root: Path, here: Path, is_known: bool) -> None:
    content = noise(50_000)
    path = artifact(root, "a", content)
    with small_spans(1000, 500):
        with pytest.raises(UnreachableError):
            download_files(
                OnceOnly(root, [lambda inner: CutStream(inner, None, 40_000)]),
                [Download(path, here / "a")],
                retry=AT_ONCE,
            )
        shorter = content[:10_400]
        Path(path).write_bytes(shorter)
        facts = (len(shorter), sha256(shorter)) if is_known else (None, None)
        download_files(ThreadOpener(root), [Download(path, here / "a", *facts)], retry=AT_ONCE)
    assert (here / "a").read_bytes() == shorter


def test_an_artifact_that_is_here_already_is_not_fetched_again(root: Path, here: Path) -> None:
    content = noise(1000)
    path = artifact(root, "a", content)
    (here / "a").write_bytes(content)
    assert download_artifact(ThreadOpener(root), path, here / "a", 1000, sha256(content)).bytes_received == 0
    (here / "a").write_bytes(b"x" + content[1:])
    assert download_artifact(ThreadOpener(root), path, here / "a", 1000, sha256(content)).bytes_received == 1000
    assert (here / "a").read_bytes() == content


@pytest.mark.parametrize("python", interpreters(), ids=interpreter_name)
def test_killing_the_agent_at_any_instant_costs_only_a_new_stream(tmp_path: Path, here: Path, python: str) -> None:
    content = noise(70 * MIB)
    with agent_node(tmp_path, python) as node:
        path = artifact(Path(node.root), "a", content)

        class KilledLater(WatchedStream):
            def read(self, max_bytes: int) -> bytes:
                if self.read_count > 30 * MIB and self._when_written is not None:
                    call, self._when_written = self._when_written, None
                    call()
                return super().read(max_bytes)

        opener = ProcessOpener(
            Path(node.root),
            lambda request: node.command("agent", "stream", request),
            [lambda inner: KilledLater(inner, 1 << 60, lambda: opener.kill())],
        )
        result = download_files(opener, [Download(path, here / "a", len(content), sha256(content))], retry=AT_ONCE)
    assert opener.opened == 2
    assert (here / "a").read_bytes() == content
    assert result.bytes_received < 70 * MIB + download.SPAN_BYTES


@pytest.mark.parametrize(("size", "digest"), [(999, None), (1001, None), (1000, "0" * 64)])
def test_a_file_that_is_not_what_the_manifest_says_never_stands_at_its_target(
    root: Path, here: Path, size: int, digest: str | None
) -> None:
    content = noise(1000)
    path = artifact(root, "a", content)
    with pytest.raises(IntegrityError):
        download_artifact(ThreadOpener(root), path, here / "a", size, digest or sha256(content))
    assert not (here / "a").exists()


def test_the_first_failure_keeps_what_was_in_place_before_it(root: Path, here: Path) -> None:
    good = artifact(root, "good", b"good")
    wanted = [
        Download(good, here / "good", 4, sha256(b"good")),
        Download(good + "-missing", here / "missing", 4, sha256(b"good")),
    ]
    with pytest.raises(UsageError, match="there is no"):
        download_files(ThreadOpener(root), wanted)
    assert (here / "good").read_bytes() == b"good"
    assert not (here / "missing").exists()


def test_a_link_below_the_node_root_is_not_followed(tmp_path: Path, root: Path, here: Path) -> None:
    secret = tmp_path / "id_ed25519"
    secret.write_bytes(b"secret")
    folder = Path(artifact(root, "job/real", b"real")).parent
    (folder / "link").symlink_to(secret)
    (folder / "folder").symlink_to(tmp_path)
    for path in (folder / "link", folder / "folder" / "id_ed25519"):
        with pytest.raises(RemoteEvalError, match="symbolic link"):
            download_file(ThreadOpener(root), str(path), here / "stolen")
    for path in (f"{folder}/../../../../../../id_ed25519", f"{root}/./x", f"{root}//x", f"{root}/"):
        with pytest.raises(UsageError, match="plain path"):
            download_file(ThreadOpener(root), path, here / "stolen")
    assert not (here / "stolen").exists()


def test_a_persons_own_path_elsewhere_is_followed(tmp_path: Path, root: Path, here: Path) -> None:
    (tmp_path / "best").write_bytes(b"weights")
    (tmp_path / "latest").symlink_to("best")
    download_file(ThreadOpener(root), str(tmp_path / "latest"), here / "best")
    assert (here / "best").read_bytes() == b"weights"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "relative", "device"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, root: Path, here: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    wanted = {"relative": "thing", "device": "/dev/zero"}.get(kind, str(path))
    with pytest.raises(UsageError):
        download_file(ThreadOpener(root), wanted, here / "x")


def change_amid(path: Path, change: bytes, mode: str) -> Wrap:
    """Changes the file once some of it has been asked for."""

    def write() -> None:
        with path.open(mode) as file:
            file.write(change)
        facts = path.stat()
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000_000))

    def wrap(inner: ByteStream) -> ByteStream:
        return WatchedStream(inner, 400, write)

    return wrap


def test_a_file_that_is_rewritten_while_it_is_fetched_is_refused(root: Path, here: Path) -> None:
    path = artifact(root, "a", noise(20_000))
    with small_spans(100, 100), pytest.raises(IntegrityError, match="changed"):
        download_file(ThreadOpener(root, [change_amid(Path(path), b"new", "r+b")]), path, here / "a")
    assert not (here / "a").exists()


def test_a_log_that_grows_while_it_is_fetched_comes_as_it_was(root: Path, here: Path) -> None:
    content = noise(20_000)
    path = artifact(root, "a", content)
    with small_spans(100, 100):
        grow = change_amid(Path(path), b"more", "ab")
        download_file(ThreadOpener(root, [grow]), path, here / "a", may_grow=True)
    assert (here / "a").read_bytes() == content
    download_file(ThreadOpener(root), path, here / "a", may_grow=True)
    assert (here / "a").read_bytes() == content + b"more"


def test_a_truth_file_that_is_replaced_all_the_time_comes_as_it_was_at_one_instant(root: Path, here: Path) -> None:
    versions = [noise(size) for size in (3000, 10, 7000)]
    path = Path(artifact(root, "status.json", versions[0]))
    is_over = threading.Event()

    def replace_for_ever() -> None:
        while not is_over.is_set():
            for version in versions:
                path.with_name("new").write_bytes(version)
                path.with_name("new").replace(path)

    with small_spans(10_000, 100), concurrent.futures.ThreadPoolExecutor(1) as pool:
        writer = pool.submit(replace_for_ever)
        try:
            for number in range(30):
                cut = [lambda inner, number=number: CutStream(inner, None, number * 100)]
                opener = ThreadOpener(root, cut)  # type: ignore[arg-type]
                download_files(opener, [Download(str(path), here / "x", may_grow=True)], retry=AT_ONCE)
                assert (here / "x").read_bytes() in versions
        finally:
            is_over.set()
        writer.result(30)


def test_a_log_that_shrinks_while_it_is_fetched_is_refused(root: Path, here: Path) -> None:
    path = artifact(root, "a", noise(20_000))
    shrink = change_amid(Path(path), b"new", "wb")
    with small_spans(100, 100), pytest.raises(IntegrityError):
        download_file(ThreadOpener(root, [shrink]), path, here / "a", may_grow=True)


def test_two_fetches_to_one_target_do_not_mix(root: Path, here: Path) -> None:
    path = artifact(root, "a", noise(5000))
    is_first_under_way, may_go_on = threading.Event(), threading.Event()

    def hold(_: TransferProgress) -> None:
        is_first_under_way.set()
        assert may_go_on.wait(30)

    with small_spans(100, 100), concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(download_file, ThreadOpener(root), path, here / "a", hold)
        assert is_first_under_way.wait(30)
        with pytest.raises(LockedError, match="another remote-eval is fetching"):
            download_file(ThreadOpener(root), path, here / "a")
        may_go_on.set()
        first.result(30)
    assert (here / "a").read_bytes() == noise(5000)


def test_a_folder_that_is_not_there_is_a_usage_error(root: Path, here: Path) -> None:
    path = artifact(root, "a", b"a")
    with pytest.raises(UsageError, match="cannot write"):
        download_file(ThreadOpener(root), path, here / "missing" / "a")


def test_a_full_disk_here_is_told_and_the_fetch_goes_on_after_room_was_made(root: Path, tmp_path: Path) -> None:
    content = noise(3 * MIB)
    path, target = artifact(root, "a", content), tmp_path / "a"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))"
    fetch = (
        "from pathlib import Path\n"
        "from orchestrator.transfer.download import Download, download_files\n"
        "from tests.support.agent_streams import ProcessOpener\n"
        f"opener = ProcessOpener(Path({str(root)!r}), lambda request: [*{AGENT!r}, request])\n"
        f"target, size, digest = Path({str(target)!r}), {len(content)}, {sha256(content)!r}\n"
        f"done = download_files(opener, [Download({path!r}, target, size, digest)])\n"
        "print(done.bytes_received)\n"
    )
    full = subprocess.run([sys.executable, "-c", f"{limit}\n{fetch}"], capture_output=True, timeout=60)
    assert b"UsageError: cannot write" in full.stderr
    assert not target.exists()
    freed = subprocess.run([sys.executable, "-c", fetch], capture_output=True, timeout=60)
    assert freed.returncode == 0, freed.stderr.decode()
    assert int(freed.stdout) == len(content) - 2 * MIB
    assert target.read_bytes() == content
