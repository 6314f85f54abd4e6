"""What a node remembers of files that it read, and when it must not believe itself."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from remote_payload.agent import listing, manifest_memory
from remote_payload.agent.hello import hello
from remote_payload.agent.listing import chunk_manifest, folder_manifest
from remote_payload.wire.chunks import CHUNK_BYTES, ChunkManifest
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import FileManifest, HelloRequest, ListRequest

SIZE = 20 * CHUNK_BYTES + 7


@pytest.fixture
def node(tmp_path: Path) -> NodeLayout:
    return NodeLayout(hello(HelloRequest(str(tmp_path / "root"))).root)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were read in full, by time stamps that count as settled."""
    seen: list[str] = []
    real = listing.digest_file

    def watched(file: object, size: int) -> ChunkManifest:
        seen.append(Path(str(file.name)).name)  # type: ignore[attr-defined]
        return real(file, size)  # type: ignore[arg-type]

    monkeypatch.setattr(listing, "digest_file", watched)
    monkeypatch.setattr(manifest_memory, "_SETTLED_S", -1.0)
    return seen


def ask(node: NodeLayout, path: Path, *, anew: bool = False) -> FileManifest:
    return chunk_manifest(ListRequest(node.root, str(path), anew))


def test_a_file_is_read_once(node: NodeLayout, large: Path, reads: list[str]) -> None:
    first, again = ask(node, large), ask(node, large)
    assert again.chunks == first.chunks
    assert (first.was_remembered, again.was_remembered) == (False, True)
    assert reads == ["large"]
    assert not ask(node, large, anew=True).was_remembered
    assert reads == ["large"] * 2


def test_a_folder_s_large_files_are_read_once(node: NodeLayout, large: Path, tmp_path: Path, reads: list[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    large.rename(folder / "large")
    (folder / "small").write_bytes(b"small")
    request = ListRequest(node.root, str(folder))
    assert folder_manifest(request) == folder_manifest(request)
    assert sorted(reads) == ["large", "small", "small"]


@pytest.mark.parametrize("change", ["appended", "in place", "in place with its time", "replaced", "sample"])
def test_another_content_is_read_again(node: NodeLayout, large: Path, reads: list[str], change: str) -> None:
    before, facts = ask(node, large), large.stat()
    if change == "replaced":
        other = large.with_name("other")
        other.write_bytes(large.read_bytes()[::-1])
        other.rename(large)
        os.utime(large, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with large.open("r+b") as file:
        if change == "appended":
            file.seek(0, os.SEEK_END)
        if change != "replaced":
            file.write(b"other bytes")
    if change in ("in place with its time", "sample"):
        os.utime(large, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    if change == "sample":
        forge_facts(node, large)
    assert ask(node, large).digest != before.digest
    assert reads == ["large"] * 2


def forge_facts(node: NodeLayout, path: Path) -> None:
    """As if the file system had kept every time stamp."""
    memory, facts = Path(node.known_manifest(str(path))), path.stat()
    value = manifest_memory.files.read_json(str(memory))
    value["facts"] = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
    memory.write_bytes(manifest_memory.files.json_bytes(value))


@pytest.mark.parametrize("garbage", [b"", b"[]", b"{}", b'{"facts": 5, "manifest": 5}', b"\xff" * 99, b"[" * 99_999])
def test_a_damaged_memory_counts_for_nothing(node: NodeLayout, large: Path, reads: list[str], garbage: bytes) -> None:
    before = ask(node, large)
    Path(node.known_manifest(str(large))).write_bytes(garbage)
    assert ask(node, large) == before
    assert reads == ["large"] * 2


def test_a_file_that_was_just_written_is_not_remembered(
    node: NodeLayout, large: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_memory, "_SETTLED_S", 3600.0)
    ask(node, large)
    ask(node, large)
    assert reads == ["large"] * 2


def test_no_more_is_remembered_than_a_bound_says(
    node: NodeLayout, large: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_memory, "MAX_REMEMBERED", 2)
    for number in range(4):
        name = large.with_name(f"file {number}")
        os.link(large, name)
        ask(node, name)
    assert len(list(Path(node.known_manifests).iterdir())) == 2
