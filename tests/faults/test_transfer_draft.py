"""What goes of a file before its digest is known is adopted, or goes; and the file is the same either way."""

from __future__ import annotations

import errno
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import standby
from orchestrator.errors import IntegrityError, NoSpaceError, RemoteEvalError
from orchestrator.transfer import draft as drafts
from orchestrator.transfer.carrier import Carrier
from orchestrator.transfer.channel import FrameChannel, ReconnectPolicy
from orchestrator.transfer.draft import Draft
from orchestrator.transfer.progress import TransferProgress
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import upload_file
from remote_payload.agent import copying, receive
from remote_payload.agent.copying import Copying
from remote_payload.agent.known import known_chunks
from remote_payload.agent.partial_file import PartialFile
from remote_payload.wire.chunk_table import ChunkTable, manifest_pages, pack_unknown
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import KnownChunks, KnownRequest
from remote_payload.wire.parts import parse_readable
from remote_payload.wire.stream import FrameKind, ReceiveRequest
from tests.support.agent_streams import (
    ChunkLedger,
    CutStream,
    LocalOpener,
    ProcessOpener,
    ThreadOpener,
    check_stored,
    even_cuts,
    journalled,
    make_node_root,
    manifest_of,
)

AT_ONCE = ReconnectPolicy(max_fruitless=3, first_wait_s=0.0, longest_wait_s=0.0)
CHUNK = 1000
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "WORTH_S", -1.0)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents soon give up waiting for their client, which therefore often says that it is there."""
    monkeypatch.setattr(standby, "AGENT_IDLE_S", 1.0)
    monkeypatch.setattr(standby, "ALIVE_INTERVAL_S", 0.05)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def local_file(root: Path, content: bytes, name: str = "local") -> tuple[Path, ChunkManifest]:
    path = root.parent / name
    path.write_bytes(content)
    return path, manifest_of(content, even_cuts(len(content), CHUNK))


def make_draft(
    opener: LocalOpener,
    path: Path,
    order: Callable[[Sequence[tuple[int, int]]], Sequence[int]] = lambda spans: range(len(spans)),
    on_progress: Callable[[TransferProgress], None] = lambda _: None,
    streams: int = 1,
    packing: bool = False,
    search_roots: tuple[str, ...] = (),
    limit: int | None = None,
) -> Draft:
    def ask(size: int) -> KnownChunks:
        return known_chunks(KnownRequest(opener.layout.root, size, search_roots))

    carrier = Carrier(opener, streams=StreamPolicy(fixed=streams), packing=packing, retry=AT_ONCE)
    return Draft(carrier, path, order=order, ask_known=ask, on_progress=on_progress, store_limit_bytes=limit)


def hash_first(draft: Draft, manifest: ChunkManifest, count: int) -> None:
    """As `digest_local_file` does with the first `count` chunks in the draft's order."""
    for index in list(draft.begun(manifest.spans))[:count]:
        draft.hashed(index, bytes.fromhex(manifest.chunks[index].sha256))


def await_arrival(draft: Draft, bytes_arrived: int) -> None:
    await_that(lambda: draft.bytes_arrived >= bytes_arrived or draft.error is not None)
    assert draft.error is None


def await_that(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def folders(root: Path) -> list[str]:
    """The store's folders, by the digests that their names hold."""
    store = Path(NodeLayout(str(root)).checkpoints)
    return sorted(folder.name.replace("-", ":", 1) for folder in store.iterdir()) if store.is_dir() else []


def test_what_went_before_the_digest_was_known_is_not_sent_again(root: Path) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    ledger = ChunkLedger()
    opener = ThreadOpener(root, [ledger.around] * 5)
    with make_draft(opener, path) as draft:
        hash_first(draft, manifest, 12)
        await_arrival(draft, 12 * CHUNK)
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, path.read_bytes())
    assert sorted(ledger.sent) == list(range(20))
    assert ledger.sent[:12] == list(range(12))
    assert (result.bytes_sent, result.bytes_saved) == (20 * CHUNK, 0)
    assert folders(root) == [manifest.digest]


def test_the_streams_of_a_draft_carry_the_rest_of_the_file(root: Path) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    opener = ThreadOpener(root)
    with make_draft(opener, path, streams=2) as draft:
        hash_first(draft, manifest, 12)
        await_arrival(draft, 12 * CHUNK)
        draft.end()
        upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, path.read_bytes())
    assert opener.opened <= 2


def test_a_draft_sends_in_its_own_order_and_only_what_is_wanted(root: Path) -> None:
    path, manifest = local_file(root, noise(9 * CHUNK))
    ledger = ChunkLedger()
    opener = ThreadOpener(root, [ledger.around])
    wanted = [7, 1, 4]
    with make_draft(opener, path, order=lambda _: wanted) as draft:
        order = list(draft.begun(manifest.spans))
        assert (order[:3], sorted(order)) == (wanted, list(range(9)))
        for index in order:
            draft.hashed(index, bytes.fromhex(manifest.chunks[index].sha256))
        await_arrival(draft, 3 * CHUNK)
    assert ledger.sent == wanted


def await_copies(root: Path, draft: Draft, content: bytes, indices: Sequence[int]) -> None:
    """Until the draft's part holds these chunks."""
    part = Path(NodeLayout(str(root)).checkpoint_part(draft.digest))

    def holds() -> bool:
        data = part.read_bytes() if part.exists() else bytes(len(content))
        return all(data[at * CHUNK : (at + 1) * CHUNK] == content[at * CHUNK : (at + 1) * CHUNK] for at in indices)

    await_that(lambda: holds() or draft.error is not None)
    assert draft.error is None


def stored_before(root: Path, content: bytes) -> Path:
    """Where a file of this content stands in the store now."""
    earlier, manifest = local_file(root, content, "earlier")
    return Path(upload_file(ThreadOpener(root), earlier, manifest).path_on_node)


@pytest.mark.parametrize("packing", [False, True])
def test_what_the_node_has_elsewhere_is_copied_while_the_file_is_still_hashed(root: Path, packing: bool) -> None:
    content = noise(20 * CHUNK)
    stored_before(root, content[: 5 * CHUNK] + noise(CHUNK, 99) + content[6 * CHUNK :])
    path, manifest = local_file(root, content)
    ledger = ChunkLedger()
    opener = ThreadOpener(root, [ledger.around] * 4)
    with make_draft(opener, path, packing=packing) as draft:
        hash_first(draft, manifest, 19)
        await_copies(root, draft, content, range(19))
        draft.end()
        assert draft.bytes_reused == 18 * CHUNK
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, content)
    assert ledger.sent == [5]
    assert (result.bytes_sent, result.bytes_saved, result.bytes_reused) == (CHUNK, 19 * CHUNK, 19 * CHUNK)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_with_nothing_to_carry_is_kept_while_the_file_is_still_hashed(
    root: Path, packing: bool, short_waits: None
) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    opener = ThreadOpener(root)
    with make_draft(opener, path, packing=packing) as draft:
        hash_first(draft, manifest, 12)
        await_arrival(draft, 12 * CHUNK)
        time.sleep(2.5 * standby.AGENT_IDLE_S)  # the agent has the time to end
        for index in range(12, 20):
            draft.hashed(index, bytes.fromhex(manifest.chunks[index].sha256))
        await_arrival(draft, 20 * CHUNK)
    assert opener.opened == 1


def test_the_node_copies_on_after_all_is_hashed_and_lets_go_of_the_part_when_it_has(
    root: Path, monkeypatch: pytest.MonkeyPatch, short_waits: None
) -> None:
    content = noise(20 * CHUNK)
    stored_before(root, content[: 19 * CHUNK] + noise(CHUNK, 99))
    path, manifest = local_file(root, content)
    may_copy = threading.Event()
    real = copying._read

    def read(fd: int, offset: int, view: memoryview) -> bytes:
        assert may_copy.wait(PATIENCE_S)
        return real(fd, offset, view)

    monkeypatch.setattr(copying, "_read", read)
    opener = ThreadOpener(root)
    with make_draft(opener, path) as draft:
        hash_first(draft, manifest, 20)
        draft.hashed_all()
        await_arrival(draft, CHUNK)
        time.sleep(2.5 * standby.AGENT_IDLE_S)  # whoever would end it has the time to
        assert draft.carrier.pool.open_count == 1
        may_copy.set()
        await_that(lambda: draft.carrier.pool.open_count == 0)
        await_copies(root, draft, content, range(20))
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, content)
    assert (result.bytes_sent, result.bytes_reused) == (CHUNK, 19 * CHUNK)


def test_of_a_file_that_the_node_may_have_whole_nothing_is_copied(root: Path) -> None:
    content = noise(20 * CHUNK)
    stored_before(root, content)
    path, manifest = local_file(root, content)
    opener = ThreadOpener(root)
    with make_draft(opener, path) as draft:
        hash_first(draft, manifest, 20)
        time.sleep(0.1)
        draft.end(is_given_up=True)
        assert opener.opened == 0
    assert folders(root) == [manifest.digest]


def test_a_damaged_source_is_not_believed_by_a_draft_either(root: Path) -> None:
    content = noise(20 * CHUNK)
    stored = stored_before(root, content[: 19 * CHUNK] + noise(CHUNK, 99))
    stored.chmod(0o600)
    with stored.open("r+b") as file:
        file.seek(3 * CHUNK + 5)
        file.write(b"damage")
    path, manifest = local_file(root, content)
    opener = ThreadOpener(root)
    with make_draft(opener, path) as draft:
        hash_first(draft, manifest, 20)
        await_copies(root, draft, content, [*range(3), *range(4, 20)])
        part = Path(NodeLayout(str(root)).checkpoint_part(draft.digest))
        assert part.read_bytes()[3 * CHUNK : 4 * CHUNK] == bytes(CHUNK)
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, content)
    assert (result.bytes_sent, result.bytes_reused) == (2 * CHUNK, 18 * CHUNK)


def test_a_source_that_is_freed_while_it_is_copied_from_costs_only_the_sending(root: Path) -> None:
    content = noise(20 * CHUNK)
    stored = stored_before(root, content[: 19 * CHUNK] + noise(CHUNK, 99))
    path, manifest = local_file(root, content)
    opener = ThreadOpener(root)
    with make_draft(opener, path, order=lambda _: [19, *range(19)]) as draft:
        hash_first(draft, manifest, 8)
        await_copies(root, draft, content, [19, *range(7)])
        shutil.rmtree(stored.parent)
        for index in range(7, 19):
            draft.hashed(index, bytes.fromhex(manifest.chunks[index].sha256))
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, content)
    assert (result.bytes_sent, result.bytes_reused) == (13 * CHUNK, 7 * CHUNK)


def test_a_disk_that_is_full_for_a_while_ends_the_copying_and_nothing_else(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = noise(20 * CHUNK)
    stored_before(root, content[: 19 * CHUNK] + noise(CHUNK, 99))
    path, manifest = local_file(root, content)
    refused = threading.Event()

    def refuse(copying: Copying, view: memoryview, offset: int) -> None:
        refused.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    opener = ThreadOpener(root)
    with monkeypatch.context() as patch, make_draft(opener, path) as draft:
        patch.setattr(Copying, "_write", refuse)
        hash_first(draft, manifest, 20)
        draft.hashed_all()
        await_arrival(draft, CHUNK)
        assert refused.wait(PATIENCE_S)
        await_that(lambda: draft.carrier.pool.open_count == 0)  # what cannot be copied keeps nobody from the part
        draft.end()
        assert (draft.error, draft.bytes_reused) == (None, 0)
        patch.undo()
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, content)
    assert (result.bytes_sent, result.bytes_reused) == (CHUNK, 19 * CHUNK)


def test_what_was_copied_for_a_client_that_was_killed_is_not_copied_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = noise(20 * CHUNK)
    stored_before(root, content[: 18 * CHUNK] + noise(2 * CHUNK, 99))
    path, manifest = local_file(root, content)
    order = [19, *range(19)]
    opener = ThreadOpener(root)
    abandoned = make_draft(opener, path, order=lambda _: order)
    hash_first(abandoned, manifest, 19)
    await_copies(root, abandoned, content, order[:19])
    abandoned.close()  # breaks off: no LEAVE goes
    opener = ThreadOpener(root)
    looked_for = set[int]()
    real = receive.copied_chunks

    def noted(
        layout: NodeLayout,
        digest: str,
        table: ChunkTable,
        part: PartialFile,
        indices: Sequence[int],
        threads: int,
        go_on: Callable[[], bool],
    ) -> Generator[int | None, None, None]:
        yield from real(layout, digest, table, part, indices, threads, go_on)
        looked_for.update(indices)

    with monkeypatch.context() as patch, make_draft(opener, path, order=lambda _: order) as draft:
        patch.setattr(receive, "copied_chunks", noted)
        hash_first(draft, manifest, 20)  # chunk 18 is one that the node lacks
        await_that(lambda: looked_for >= set(range(18)))
        await_arrival(draft, CHUNK)
        draft.end()
        assert (abandoned.digest, draft.bytes_reused) == (draft.digest, 0)
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, content)
    assert (result.bytes_sent, result.bytes_reused) == (CHUNK, 0)


def test_an_agent_that_is_killed_while_it_copies_costs_nothing_but_time(root: Path) -> None:
    content = noise(20 * CHUNK)
    stored_before(root, content[: 19 * CHUNK] + noise(CHUNK, 99))
    path, manifest = local_file(root, content)
    opener = ProcessOpener(root, lambda request: [sys.executable, "-m", "remote_payload", "agent", "stream", request])
    with make_draft(opener, path, order=lambda _: [19, *range(19)]) as draft:
        hash_first(draft, manifest, 10)
        await_copies(root, draft, content, [19, 0])
        opener.kill()
        for index in range(9, 19):
            draft.hashed(index, bytes.fromhex(manifest.chunks[index].sha256))
        result = upload_file(opener, path, manifest, draft=draft, retry=AT_ONCE)
    check_stored(root, manifest, content)
    assert result.bytes_sent <= 2 * CHUNK


@given(
    chunks=st.integers(2, 12),
    known=st.integers(0, 12),
    hashed=st.integers(0, 12),
    streams=st.integers(1, 3),
    cut_at=st.none() | st.integers(200, 12_000),
    is_waited_for=st.booleans(),
    seed=st.integers(0, 3),
    damaged=st.none() | st.integers(0, 12_000),
    is_given_up=st.booleans(),
    is_remembered=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_there_and_wherever_it_breaks_off_the_file_is_the_same(
    chunks: int,
    known: int,
    hashed: int,
    streams: int,
    cut_at: int | None,
    is_waited_for: bool,
    seed: int,
    damaged: int | None,
    is_given_up: bool,
    is_remembered: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = make_node_root(Path(folder))
        content = noise(chunks * CHUNK - 7, seed) + noise(CHUNK, seed) * 2
        earlier, manifest_before = local_file(root, content[: known * CHUNK] + noise(CHUNK, 99), "earlier")
        stored = Path(upload_file(ThreadOpener(root), earlier, manifest_before).path_on_node)
        if damaged is not None:
            stored.chmod(0o600)
            with stored.open("r+b") as file:
                file.seek(damaged)
                file.write(b"damage")
        path, manifest = local_file(root, content)
        wraps = [] if cut_at is None else [lambda inner: CutStream(inner, cut_at, None)]
        opener = ThreadOpener(root, wraps)
        with make_draft(opener, path, streams=streams) as draft:
            if is_remembered:
                draft.remembered(manifest)
            else:
                hash_first(draft, manifest, hashed)
            if is_waited_for:
                time.sleep(0.05)
            if is_given_up:
                draft.end(is_given_up=True)
            upload_file(opener, path, manifest, draft=draft)
        check_stored(root, manifest, content)
        assert folders(root) == sorted([manifest.digest, manifest_before.digest])


def test_of_what_the_node_has_elsewhere_nothing_is_sent(root: Path) -> None:
    content = noise(20 * CHUNK)
    earlier, manifest_before = local_file(root, content[: 10 * CHUNK], "earlier")
    upload_file(ThreadOpener(root), earlier, manifest_before)
    path, manifest = local_file(root, content)
    ledger = ChunkLedger()
    opener = ThreadOpener(root, [ledger.around] * 4)
    with make_draft(opener, path) as draft:
        hash_first(draft, manifest, 15)
        await_arrival(draft, 5 * CHUNK)
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, content)
    assert sorted(ledger.sent) == list(range(10, 20))
    assert (result.bytes_saved, result.bytes_reused) == (10 * CHUNK, 10 * CHUNK)


def test_where_the_node_may_have_the_whole_file_nothing_is_sent_before_that_is_known(
    root: Path, tmp_path: Path
) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    shelf = tmp_path / "shelf" / "below"
    shelf.mkdir(parents=True)
    (shelf / "same.pt").write_bytes(noise(20 * CHUNK, 5))
    opener = ThreadOpener(root)
    with make_draft(opener, path, search_roots=(str(tmp_path / "shelf"),)) as draft:
        hash_first(draft, manifest, 20)
        draft.end()
        assert (opener.opened, folders(root)) == (0, [])


def test_a_draft_that_nobody_needs_leaves_nothing_on_the_node(root: Path) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    opener = ThreadOpener(root)
    with make_draft(opener, path, streams=3) as draft:
        hash_first(draft, manifest, 20)
        await_arrival(draft, 20 * CHUNK)
        assert folders(root) == [draft.digest]
        draft.end(is_given_up=True)
    assert folders(root) == []


@pytest.fixture
def with_part(root: Path) -> tuple[Path, ChunkManifest]:
    """A file of which eight chunks of twenty arrived before the link was cut, read anew under another name."""
    path, manifest = local_file(root, noise(20 * CHUNK))
    with pytest.raises(RemoteEvalError):
        upload_file(
            ThreadOpener(root, [lambda inner: CutStream(inner, 8 * CHUNK, None)]),
            path,
            manifest,
            retry=ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0),
        )
    await_that(lambda: journalled(root, manifest) != set())
    return path.rename(root.parent / "copy"), manifest


def test_where_the_file_has_a_part_already_that_is_gone_on_with_and_takes_what_the_draft_brought(
    root: Path, with_part: tuple[Path, ChunkManifest]
) -> None:
    path, manifest = with_part
    there = journalled(root, manifest)
    ledger = ChunkLedger()
    opener = ThreadOpener(root, [ledger.around] * 4)
    with make_draft(opener, path) as draft:
        hash_first(draft, manifest, 12)
        await_arrival(draft, sum(CHUNK for index in range(12) if index not in there))
        upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, path.read_bytes())
    assert sorted(ledger.sent) == sorted(set(range(20)) - there)
    assert folders(root) == [manifest.digest]


def test_a_file_whose_digest_is_known_goes_on_with_its_own_part(
    root: Path, with_part: tuple[Path, ChunkManifest]
) -> None:
    path, manifest = with_part
    there = journalled(root, manifest)
    ledger = ChunkLedger()
    opener = ThreadOpener(root, [ledger.around] * 4)
    with make_draft(opener, path) as draft:
        draft.remembered(manifest)
        draft.hashed_all()
        await_arrival(draft, CHUNK * (20 - len(there)))
        assert folders(root) == [manifest.digest]
        await_that(lambda: draft.carrier.pool.open_count == 0)  # nobody else is kept from the part meanwhile
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, path.read_bytes())
    assert sorted(ledger.sent) == sorted(set(range(20)) - there)
    assert (result.bytes_sent, result.bytes_reused) == (CHUNK * (20 - len(there)), 0)


def test_a_file_whose_digest_is_known_takes_up_the_draft_of_a_client_that_did_not_know_it(root: Path) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    first, second = ChunkLedger(), ChunkLedger()
    abandoned = make_draft(ThreadOpener(root, [first.around]), path)
    hash_first(abandoned, manifest, 9)
    await_arrival(abandoned, 9 * CHUNK)
    abandoned.close()  # breaks off: no LEAVE goes
    opener = ThreadOpener(root, [second.around] * 4)
    with make_draft(opener, path) as draft:
        draft.remembered(manifest)
        await_arrival(draft, 11 * CHUNK)
        assert folders(root) == [manifest.digest]
        result = upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, path.read_bytes())
    assert sorted(first.sent + second.sent) == list(range(20))
    assert result.bytes_reused == 0


def test_where_a_file_whose_digest_is_known_has_a_part_its_draft_stays_until_the_upload_takes_it(
    root: Path, with_part: tuple[Path, ChunkManifest]
) -> None:
    path, manifest = with_part
    there = journalled(root, manifest)
    abandoned = make_draft(ThreadOpener(root), path)
    hash_first(abandoned, manifest, 18)
    drafted = set(range(18)) - there
    await_arrival(abandoned, CHUNK * len(drafted))
    abandoned.close()  # breaks off: no LEAVE goes
    ledger = ChunkLedger()
    opener = ThreadOpener(root, [ledger.around] * 4)
    with make_draft(opener, path) as draft:
        draft.remembered(manifest)
        await_arrival(draft, CHUNK)
        upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, path.read_bytes())
    assert sorted(ledger.sent) == sorted(set(range(20)) - there - drafted)
    assert folders(root) == [manifest.digest]


def test_a_part_of_the_files_own_digest_stays_where_it_turns_out_that_nobody_needs_more_of_it(
    root: Path, with_part: tuple[Path, ChunkManifest]
) -> None:
    path, manifest = with_part
    there = journalled(root, manifest)
    with make_draft(ThreadOpener(root), path) as draft:
        draft.remembered(manifest)
        await_arrival(draft, CHUNK)
        draft.end(is_given_up=True)
        assert folders(root) == [manifest.digest]
        assert journalled(root, manifest) > there


def test_what_jobs_read_of_a_part_stays_readable_while_the_rest_comes_before_it_may(root: Path) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    opener = ThreadOpener(root)
    upload_file(opener, path, manifest, order=range(12))
    readable = Path(NodeLayout(str(root)).checkpoint_readable(manifest.digest))
    assert parse_readable(readable.read_bytes()).hold(0, 12 * CHUNK)
    with make_draft(opener, path) as draft:
        draft.remembered(manifest)
        await_arrival(draft, 8 * CHUNK)
        assert parse_readable(readable.read_bytes()).hold(0, 12 * CHUNK)
        upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, path.read_bytes())


def test_a_file_that_somebody_finished_meanwhile_is_neither_sent_nor_given_up(root: Path) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    opener = ThreadOpener(root)
    may_go = threading.Event()

    def ask_before_it_was_there(size: int) -> KnownChunks:
        known = known_chunks(KnownRequest(opener.layout.root, size, ()))
        assert may_go.wait(PATIENCE_S)
        return known

    carrier = Carrier(opener, streams=StreamPolicy(fixed=1), packing=False, retry=AT_ONCE)
    with Draft(
        carrier,
        path,
        order=lambda spans: range(len(spans)),
        ask_known=ask_before_it_was_there,
        on_progress=lambda _: None,
    ) as draft:
        draft.remembered(manifest)
        upload_file(ThreadOpener(root), path, manifest)
        may_go.set()
        await_that(lambda: opener.opened > 0)
        time.sleep(0.5)  # whoever would ask again has the time to
        draft.end(is_given_up=True)
        assert (draft.error, draft.sent.bytes_sent, opener.opened) == (None, 0, 1)
    check_stored(root, manifest, path.read_bytes())


def test_where_there_is_no_room_for_a_part_and_a_draft_the_draft_goes(
    root: Path, with_part: tuple[Path, ChunkManifest]
) -> None:
    path, manifest = with_part
    opener = ThreadOpener(root)
    with make_draft(opener, path) as draft:
        hash_first(draft, manifest, 12)
        await_arrival(draft, CHUNK)
        upload_file(opener, path, manifest, draft=draft, store_limit_bytes=21 * CHUNK)
    check_stored(root, manifest, path.read_bytes())
    assert folders(root) == [manifest.digest]


def test_a_client_that_was_killed_comes_back_to_its_draft(root: Path) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    first, second = ChunkLedger(), ChunkLedger()
    opener = ThreadOpener(root, [first.around])
    abandoned = make_draft(opener, path)
    hash_first(abandoned, manifest, 9)
    await_arrival(abandoned, 9 * CHUNK)
    abandoned.close()  # breaks off: no LEAVE goes
    opener = ThreadOpener(root, [second.around] * 4)
    with make_draft(opener, path) as draft:
        hash_first(draft, manifest, 15)
        await_arrival(draft, 6 * CHUNK)
        assert draft.digest == abandoned.digest
        upload_file(opener, path, manifest, draft=draft)
    check_stored(root, manifest, path.read_bytes())
    assert sorted(first.sent + second.sent) == list(range(20))


@pytest.mark.parametrize("is_remembered", [False, True])
def test_a_draft_frees_nothing_in_the_store(root: Path, is_remembered: bool) -> None:
    earlier, manifest_before = local_file(root, noise(30 * CHUNK, 9), "earlier")
    upload_file(ThreadOpener(root), earlier, manifest_before)
    path, manifest = local_file(root, noise(20 * CHUNK))
    opener = ThreadOpener(root)
    with make_draft(opener, path, limit=40 * CHUNK) as draft:
        if is_remembered:
            draft.remembered(manifest)
        else:
            hash_first(draft, manifest, 20)
        await_that(lambda: isinstance(draft.error, NoSpaceError))
        check_stored(root, manifest_before, earlier.read_bytes())


def test_a_chunk_that_changed_after_it_was_hashed_ends_the_draft_and_no_file_stands(root: Path) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    path.write_bytes(noise(20 * CHUNK, 8))
    opener = ThreadOpener(root)
    with make_draft(opener, path) as draft:
        hash_first(draft, manifest, 20)
        await_that(lambda: isinstance(draft.error, IntegrityError))
    assert not Path(NodeLayout(str(root)).checkpoint(manifest.digest)).exists()


def test_progress_goes_on_from_the_draft_to_the_file(root: Path) -> None:
    path, manifest = local_file(root, noise(20 * CHUNK))
    seen: list[int] = []
    opener = ThreadOpener(root)
    note = lambda progress: seen.append(progress.bytes_done)  # noqa: E731
    with make_draft(opener, path, on_progress=note) as draft:
        hash_first(draft, manifest, 12)
        await_arrival(draft, 12 * CHUNK)
        upload_file(opener, path, manifest, draft=draft, on_progress=note)
    assert seen == sorted(seen)
    assert seen[-1] == 20 * CHUNK
    assert 12 * CHUNK in seen


@pytest.mark.parametrize(
    ("kind", "argument", "body"),
    [
        (FrameKind.FINISH, 0, b""),
        (FrameKind.KEEP, 1, b"\1"),
        (FrameKind.DIGEST, 5, bytes(32)),
        (FrameKind.DIGEST, 0, bytes(31)),
        (FrameKind.COPY, 5, bytes(32)),
        (FrameKind.COPY, 0, bytes(31)),
    ],
)
def test_a_draft_is_never_finished_and_takes_digests_for_its_own_chunks_only(
    root: Path, kind: FrameKind, argument: int, body: bytes
) -> None:
    opener = ThreadOpener(root)
    request = ReceiveRequest(str(root), "v1:" + "ab" * 32, CHUNK, 1, "0" * 32, is_draft=True)
    channel = FrameChannel(stream := opener.open_agent_stream("receive", request))
    for first, page in manifest_pages(pack_unknown([CHUNK])):
        channel.send(FrameKind.MANIFEST, first, page)
    channel.receive(FrameKind.HAVE)
    channel.send(kind, argument, body)
    with pytest.raises(IntegrityError):
        channel.receive(FrameKind.FINISHED, FrameKind.KEPT)
    stream.close()
