"""Whether the manifest beside a stored checkpoint is believed, and when what it speaks of was verified."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.transfer.upload import upload_file
from remote_payload.agent import assemble
from remote_payload.agent.stored_chunks import StoredChunks
from remote_payload.agent.verified import state_at
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.members import Member, folder_digest
from remote_payload.wire.messages import AssembleRequest
from tests.support.agent_streams import ThreadOpener, even_cuts, make_node_root, manifest_of

CONTENTS = {"a": bytes(range(250)) * 40_000, "b/c": bytes(range(1, 240)) * 50_000}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


def send(root: Path, content: bytes) -> str:
    local = root.parent / "local"
    local.write_bytes(content)
    manifest = manifest_of(content, even_cuts(len(content), 1_000_000))
    upload_file(ThreadOpener(root), local, manifest)
    return manifest.digest


def send_folder(root: Path) -> str:
    members = tuple(Member(path, len(content), send(root, content)) for path, content in CONTENTS.items())
    assert assemble.assemble_folder(AssembleRequest(str(root), members, "")).path is not None
    return folder_digest(members)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_stored_checkpoint_stands_as_it_was_verified(root: Path, kind: str) -> None:
    layout = NodeLayout(str(root))
    digest = send(root, CONTENTS["a"]) if kind == "file" else send_folder(root)
    place = StoredChunks(layout, digest).place(1_000_000)
    path = Path(layout.checkpoint(digest)) if kind == "file" else Path(layout.checkpoint_tree(digest)) / "a"
    assert (place.path, place.offset) == (str(path), 1_000_000)
    assert place.verified == state_at(str(path))


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace(b'"offset": 1000000', b'"offset": 1000001'),
        lambda text: text.replace(b'"length": 1000000', b'"length": 1000001', 1),
        lambda text: text.replace(b'"sha256": "', b'"sha256": "0', 1),
        lambda text: text[: len(text) // 2],
        lambda text: b"",
    ],
    ids=["offset", "length", "line", "half", "empty"],
)
def test_a_damaged_manifest_says_where_to_look_and_is_not_believed(
    root: Path, kind: str, damage: Callable[[bytes], bytes]
) -> None:
    layout = NodeLayout(str(root))
    digest = send(root, CONTENTS["a"]) if kind == "file" else send_folder(root)
    manifest = Path(layout.checkpoint_manifest(digest))
    manifest.write_bytes(damage(manifest.read_bytes()))
    stored = StoredChunks(layout, digest)
    # Half of a folder's manifest still tells of its first file.
    assert None in (stored.place(0).verified, stored.place(len(CONTENTS["a"])).verified)


def test_a_folders_list_of_files_that_does_not_make_its_digest_is_not_believed(root: Path) -> None:
    layout = NodeLayout(str(root))
    digest = send_folder(root)
    members = Path(layout.checkpoint_members(digest))
    members.write_bytes(members.read_bytes().replace(b'"b/c"', b'"b/d"'))
    assert StoredChunks(layout, digest).place(0).verified is None


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("how", ["another", "gone", "short"])
def test_another_file_in_a_stored_ones_place_is_not_believed_whatever_its_time_stamp(
    root: Path, kind: str, how: str
) -> None:
    layout = NodeLayout(str(root))
    digest = send(root, CONTENTS["a"]) if kind == "file" else send_folder(root)
    path = Path(layout.checkpoint(digest)) if kind == "file" else Path(layout.checkpoint_tree(digest)) / "b/c"
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(bytes(len(content)) if how == "another" else content[:-1])
        os.utime(path, ns=(0, 0))
    assert not StoredChunks(layout, digest).is_believed
    assert not StoredChunks(layout, digest).verify()
