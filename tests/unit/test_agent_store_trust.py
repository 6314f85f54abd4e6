"""A stored checkpoint is used under its digest only while it is what was verified, and is replaced where it is not."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import NoSpaceError
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import UploadResult, upload_file
from remote_payload.agent import assemble, quota, stored_chunks
from remote_payload.agent.locate import locate
from remote_payload.checkpoint.source import Source
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.members import Member, folder_digest
from remote_payload.wire.messages import Assembled, AssembleRequest, LocateRequest
from tests.support.agent_streams import ThreadOpener, check_stored, even_cuts, make_node_root, manifest_of
from tests.support.node_store import make_run

CHUNK = 1_000_000
CONTENT = random.Random(1).randbytes(10 * CHUNK)
OTHER = random.Random(2).randbytes(9 * CHUNK)
MANIFEST = manifest_of(CONTENT, even_cuts(len(CONTENT), CHUNK))
MEMBERS = (
    Member("a", len(CONTENT), MANIFEST.digest),
    Member("b/c", len(OTHER), manifest_of(OTHER, even_cuts(len(OTHER), CHUNK)).digest),
)
FOLDER = folder_digest(MEMBERS)
NOT_LOOKED_AT = 2 * CHUNK + 5
"""An offset in the file whose chunk is not one of the sample's."""


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just changed counts as changed long ago."""
    monkeypatch.setattr(stored_chunks, "_SETTLED_S", 0.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


@pytest.fixture
def layout(root: Path) -> NodeLayout:
    return NodeLayout(str(root))


@pytest.fixture
def read_chunks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The path of each chunk that is looked at to see whether it stands."""
    paths: list[str] = []
    real = stored_chunks.digest_at
    monkeypatch.setattr(stored_chunks, "digest_at", lambda place, n: (paths.append(place.path), real(place, n))[1])
    stored_chunks._believed.cache_clear()
    return paths


def send(root: Path, content: bytes = CONTENT, **more: object) -> UploadResult:
    local = root.parent / f"local{threading.get_ident()}"
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), CHUNK))
    return upload_file(ThreadOpener(root), local, manifest, **more)  # type: ignore[arg-type]


def send_folder(root: Path, run_id: str = "") -> Assembled:
    request = AssembleRequest(str(root), MEMBERS, "", run_id)
    answer = assemble.assemble_folder(request)
    for digest in answer.missing:
        send(root, CONTENT if digest == MANIFEST.digest else OTHER, run_id=run_id)
    return assemble.assemble_folder(request) if answer.missing else answer


def overwrite(path: Path, *, keeps_time: bool, offset: int = NOT_LOOKED_AT) -> None:
    """In place, as somebody would who has the right to."""
    facts = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"damage")
    if keeps_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def how_located(layout: NodeLayout, digest: str, size: int) -> str:
    return locate(LocateRequest(layout.root, digest=digest, size=size)).how


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_file_that_was_written_to_in_place_is_not_found_and_what_differs_is_sent(
    root: Path, layout: NodeLayout, keeps_time: bool
) -> None:
    path = Path(send(root).path_on_node)
    assert how_located(layout, MANIFEST.digest, MANIFEST.size) == "store"
    overwrite(path, keeps_time=keeps_time)
    assert how_located(layout, MANIFEST.digest, MANIFEST.size) == "nowhere"
    again = send(root)
    assert again.bytes_sent == CHUNK
    assert again.note == "the stored copy was changed since it was verified; it is sent again"
    check_stored(root, MANIFEST, CONTENT)
    assert how_located(layout, MANIFEST.digest, MANIFEST.size) == "store"


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_folder_of_which_a_file_was_written_to_is_not_found_and_what_differs_is_sent(
    root: Path, layout: NodeLayout, keeps_time: bool
) -> None:
    size = len(CONTENT) + len(OTHER)
    tree = Path(send_folder(root).path or "")
    assert how_located(layout, FOLDER, size) == "store"
    overwrite(tree / "b/c", keeps_time=keeps_time)
    assert how_located(layout, FOLDER, size) == "nowhere"
    answer = assemble.assemble_folder(AssembleRequest(str(root), MEMBERS, ""))
    assert (answer.path, answer.was_changed, len(answer.missing)) == (None, True, 2)
    assert [send(root, content).bytes_sent for content in (CONTENT, OTHER)] == [0, CHUNK]
    assert send_folder(root).path == str(tree)
    assert (tree / "b/c").read_bytes() == OTHER
    assert how_located(layout, FOLDER, size) == "store"


def test_a_file_that_was_added_to_a_stored_folder_makes_it_another(root: Path, layout: NodeLayout) -> None:
    tree = Path(send_folder(root).path or "")
    (tree / "model.safetensors.index.json").touch()
    assert how_located(layout, FOLDER, len(CONTENT) + len(OTHER)) == "nowhere"
    assert send_folder(root).path == str(tree)
    assert sorted(path.name for path in tree.iterdir()) == ["a", "b"]


def test_of_what_nobody_touched_no_more_than_a_sample_is_read(
    root: Path, layout: NodeLayout, read_chunks: list[str]
) -> None:
    send(root)
    assert how_located(layout, MANIFEST.digest, MANIFEST.size) == "store"
    assert send(root).bytes_sent == 0
    assert len(read_chunks) <= 4
    send_folder(root)
    read_chunks.clear()
    stored_chunks._believed.cache_clear()
    assert send_folder(root) == Assembled(layout.checkpoint_tree(FOLDER))
    assert len(read_chunks) <= 4


def by_chmod(folder: Path) -> None:
    next(folder.rglob("[fa]*")).chmod(0o440)


def by_copying(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def by_an_older_version(folder: Path) -> None:
    (folder / "verified.json").unlink()
    (folder / "chunks.json").unlink()


@pytest.mark.parametrize("touch", [by_chmod, by_copying, by_an_older_version])
def test_a_file_that_was_touched_is_read_in_full_once_and_believed_again(
    root: Path, layout: NodeLayout, read_chunks: list[str], touch: Callable[[Path], None]
) -> None:
    send(root)
    touch(Path(layout.checkpoint_folder(MANIFEST.digest)))
    assert how_located(layout, MANIFEST.digest, MANIFEST.size) == "nowhere"
    again = send(root)
    assert again.bytes_sent == 0
    assert (
        again.note == "the stored copy was touched since it was verified; it was read anew in full, and is what it was"
    )
    assert len(read_chunks) >= 10
    read_chunks.clear()
    assert how_located(layout, MANIFEST.digest, MANIFEST.size) == "store"
    assert send(root).note == ""
    assert len(read_chunks) <= 4


@pytest.mark.parametrize("touch", [by_chmod, by_copying])
def test_a_folder_that_was_touched_is_read_in_full_once_and_believed_again(
    root: Path, layout: NodeLayout, read_chunks: list[str], touch: Callable[[Path], None]
) -> None:
    tree = send_folder(root).path
    touch(Path(layout.checkpoint_folder(FOLDER)))
    assert send_folder(root) == Assembled(tree, was_read=True)
    read_chunks.clear()
    assert send_folder(root) == Assembled(tree)
    assert len(read_chunks) <= 4


def test_a_folder_under_another_digest_is_not_believed_to_be_that(root: Path, layout: NodeLayout) -> None:
    send(root)
    send(root, OTHER)
    other = MEMBERS[1].digest
    shutil.rmtree(layout.checkpoint_folder(other))
    Path(layout.checkpoint_folder(MANIFEST.digest)).rename(layout.checkpoint_folder(other))
    assert how_located(layout, other, len(CONTENT)) == "nowhere"


def test_who_reads_a_changed_copy_goes_on_reading_that_while_it_is_replaced(root: Path, layout: NodeLayout) -> None:
    path = Path(send(root).path_on_node)
    make_run(layout, "under-way", 0, MANIFEST.digest, state="running")
    overwrite(path, keeps_time=True)
    changed = path.read_bytes()
    with path.open("rb") as file:
        assert send(root).bytes_sent == CHUNK
        assert file.read() == changed
    assert path.read_bytes() == CONTENT


def test_jobs_that_begin_with_a_part_never_read_the_changed_copy_in_its_place(root: Path) -> None:
    path = Path(send(root).path_on_node)
    overwrite(path, keeps_time=True)
    kept = send(root, order=[0, 1])
    assert not kept.is_complete
    with Source(kept.path_on_node) as source:
        assert not source.is_whole
        assert source.read(0, 2 * CHUNK) == CONTENT[: 2 * CHUNK]
    assert send(root).is_complete
    check_stored(root, MANIFEST, CONTENT)


def test_two_clients_replace_a_changed_copy_once(root: Path) -> None:
    overwrite(Path(send(root).path_on_node), keeps_time=True)
    results: list[UploadResult] = []
    clients = [threading.Thread(target=lambda: results.append(send(root))) for _ in range(2)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60.0)
    assert sum(result.bytes_sent for result in results) == CHUNK
    check_stored(root, MANIFEST, CONTENT)


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch, layout: NodeLayout) -> None:
    """A disk that holds one copy of the file."""

    def space_left(_path: str) -> int:
        folder = Path(layout.checkpoint_folder(MANIFEST.digest))
        there = sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.name.startswith("file"))
        return len(CONTENT) + CHUNK // 2 - there

    monkeypatch.setattr(quota, "space_left", space_left)


@pytest.mark.usefixtures("no_room")
def test_where_there_is_no_room_for_both_a_changed_copy_goes_unless_a_run_reads_it(
    root: Path, layout: NodeLayout
) -> None:
    path = Path(send(root).path_on_node)
    overwrite(path, keeps_time=True)
    run = make_run(layout, "under-way", 0, MANIFEST.digest, state="running")
    with pytest.raises(NoSpaceError):
        send(root)
    assert path.exists()
    shutil.rmtree(run)
    assert send(root).bytes_sent == len(CONTENT)
    check_stored(root, MANIFEST, CONTENT)


def test_a_replacement_that_was_cut_is_gone_on_with(root: Path, layout: NodeLayout) -> None:
    overwrite(Path(send(root).path_on_node), keeps_time=True)

    def cut(_progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        send(root, on_progress=cut, streams=StreamPolicy(fixed=1), bandwidth_limit_bytes_per_s=1000.0)
    assert how_located(layout, MANIFEST.digest, MANIFEST.size) == "nowhere"
    assert send(root).bytes_sent <= CHUNK
    check_stored(root, MANIFEST, CONTENT)


def test_a_file_that_a_folder_has_another_name_of_is_believed_as_before(root: Path, layout: NodeLayout) -> None:
    send(root, run_id="needs-it")
    send_folder(root, run_id="folder")
    assert Path(layout.checkpoint(MANIFEST.digest)).stat().st_nlink == 2
    assert how_located(layout, MANIFEST.digest, MANIFEST.size) == "store"
    assert how_located(layout, FOLDER, len(CONTENT) + len(OTHER)) == "store"
