"""Folders on their way into the store: few round trips, through cuts, and never one that changed meanwhile."""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from orchestrator.errors import CheckpointError, IntegrityError, NoSpaceError, UnreachableError
from orchestrator.layout import LocalLayout
from orchestrator.node import Node
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.carrier import Carrier
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.folder import FolderFile, FolderProgress, SentFolder, send_folder
from orchestrator.transfer.local_folder import LocalFolder
from orchestrator.transfer.node_copy import CopiedCheckpoint, copy_checkpoint, describe
from orchestrator.transfer.progress import ProgressListener, TransferProgress
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import LocalFileChangedError, UploadResult, upload_file
from remote_payload.agent.verbs import perform
from remote_payload.wire.chunks import Chunk, ChunkManifest
from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.messages import FolderManifest, ReadFile
from tests.support.agent_streams import (
    CutStream,
    LocalOpener,
    ProcessOpener,
    ThreadOpener,
    TurnStream,
    Wrap,
    make_node_root,
)
from tests.support.durable import durable_bytes
from tests.support.small_disk import SmallDisk, limited_files
from tests.support.world import digests

MIB = 1024 * 1024
NO_PATIENCE = ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0)
T = TypeVar("T")


class AgentHere(ThreadOpener):
    """A node whose agent answers in this process."""

    def __init__(self, root: Path, wraps: Sequence[Wrap] = ()) -> None:
        super().__init__(root, wraps)
        self.calls: list[str] = []
        self.profile = ClusterProfile(host="here")

    @property
    def root(self) -> str:
        return self.layout.root

    def call(self, verb: str, request: object, result: type[T], *, timeout_s: float | None = None) -> T:
        self.calls.append(verb)
        return from_json(result, perform(verb, to_json(request)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_node_root(tmp_path)


@pytest.fixture
def layout(tmp_path: Path) -> LocalLayout:
    return LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "step 5"
    (path / "below").mkdir(parents=True)
    for number, (name, size) in enumerate({"a": 20 * MIB, "below/b": 9 * MIB, "c": 5000, "below/d": 0}.items()):
        (path / name).write_bytes(random.Random(number).randbytes(size))
    return path


def read(path: Path, layout: LocalLayout) -> LocalFolder:
    """A folder that has been read in full."""
    with LocalFolder(path, layout) as local:
        _ = local.folder
        return local


def send(
    node: LocalOpener, local: LocalFolder, on_progress: ProgressListener | None = None, **options: Any
) -> SentFolder:
    def upload(files: Sequence[FolderFile], manifest: ChunkManifest, listener: ProgressListener) -> UploadResult:
        return upload_file(carrier, local.open(files), manifest, on_progress=listener)

    with Carrier(node, retry=NO_PATIENCE, **options) as carrier:
        return send_folder(cast(Node, node), local.folder, carrier, upload, FolderProgress(local.size, on_progress))


def test_a_thousand_small_files_take_one_stream_and_two_calls(root: Path, layout: LocalLayout, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1000):
        (many / f"part {number}").write_bytes(f"{number}".encode() * number)
    node = AgentHere(root)
    sent = send(node, read(many, layout), streams=StreamPolicy(fixed=1))
    assert digests(Path(sent.path)) == digests(many)
    assert node.calls == ["assemble_folder"] * 2
    assert node.opened == 1


def test_a_folder_that_is_there_takes_one_call(root: Path, layout: LocalLayout, folder: Path) -> None:
    first = send(AgentHere(root), read(folder, layout))
    node = AgentHere(root)
    assert send(node, read(folder, layout)) == SentFolder(first.path, 0)
    assert (node.calls, node.opened) == (["assemble_folder"], 0)


def test_only_what_changed_of_a_folder_is_sent(root: Path, layout: LocalLayout, folder: Path) -> None:
    send(AgentHere(root), read(folder, layout))
    with (folder / "a").open("r+b") as file:
        file.seek(17 * MIB)
        file.write(b"changed")
    sent = send(AgentHere(root), read(folder, layout))
    assert sent.bytes_sent == 4 * MIB
    assert digests(Path(sent.path)) == digests(folder)


def test_a_cut_folder_is_gone_on_with_where_it_was(root: Path, layout: LocalLayout, folder: Path) -> None:
    local = read(folder, layout)
    node = AgentHere(root, [lambda inner: CutStream(inner, 18 * MIB, None)])
    with pytest.raises(UnreachableError):
        send(node, local, streams=StreamPolicy(fixed=1))
    assert not list(root.rglob("tree"))
    before = durable_bytes(root, [folder / "a", folder / "below" / "b"])
    assert before >= 10 * MIB  # all but the chunk of 8 MiB that was cut
    sent = send(AgentHere(root), read(folder, layout))
    assert sent.bytes_sent == local.folder.size - before
    assert digests(Path(sent.path)) == digests(folder)


def test_progress_goes_once_from_what_is_there_to_the_whole(root: Path, layout: LocalLayout, folder: Path) -> None:
    seen: list[TransferProgress] = []
    send(AgentHere(root), read(folder, layout), seen.append)
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)
    assert {progress.bytes_total for progress in seen} == {done[-1]}


@pytest.mark.parametrize("change", ["written", "added", "removed", "renamed"])
def test_a_folder_that_changes_while_it_is_sent_is_an_error(
    root: Path, layout: LocalLayout, folder: Path, change: str
) -> None:
    local = read(folder, layout)

    def act(_progress: TransferProgress) -> None:
        if change == "written":
            (folder / "c").write_bytes(b"other")
        elif change == "added":
            (folder / "late").write_bytes(b"late")
        elif change == "removed":
            (folder / "below" / "d").unlink(missing_ok=True)
        elif (folder / "c").exists():
            (folder / "c").rename(folder / "e")

    def send_and_check() -> None:
        send(AgentHere(root), local, act)
        local.check_unchanged()

    with pytest.raises(IntegrityError, match="changed while it was being sent"):
        send_and_check()


def test_a_file_that_is_another_than_was_remembered_is_seen(root: Path, layout: LocalLayout, folder: Path) -> None:
    local = read(folder, layout)
    facts = (folder / "a").stat()
    with (folder / "a").open("r+b") as file:
        file.write(b"in place")
    os.utime(folder / "a", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(LocalFileChangedError):
        send(AgentHere(root), local)
    assert not list(root.rglob("tree"))


def test_a_link_within_the_folder_is_sent_as_the_file_that_it_leads_to(
    root: Path, layout: LocalLayout, folder: Path
) -> None:
    (folder / "best").symlink_to("below/b")
    sent = send(AgentHere(root), read(folder, layout))
    assert (Path(sent.path) / "best").read_bytes() == (folder / "below" / "b").read_bytes()
    assert not (Path(sent.path) / "best").is_symlink()


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A model in a HuggingFace cache: links to blobs beside it."""
    cache = tmp_path / "models--lab--autoencoder"
    folder = cache / "snapshots" / "0123abcd"
    (folder / "below").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for blob, link in (("11", "config.json"), ("22", "model.safetensors"), ("33", "below/part")):
        (cache / "blobs" / blob).write_bytes(blob.encode() * 1000)
        (folder / link).symlink_to(os.path.relpath(cache / "blobs" / blob, (folder / link).parent))
    return folder


def test_a_snapshot_of_the_model_hub_s_cache_is_sent_with_the_blobs_that_it_names(
    root: Path, layout: LocalLayout, snapshot: Path
) -> None:
    sent = send(AgentHere(root), read(snapshot, layout))
    assert digests(Path(sent.path)) == digests(snapshot)
    assert not any(path.is_symlink() for path in Path(sent.path).rglob("*"))


def test_a_folder_below_a_snapshot_is_sent_as_well(root: Path, layout: LocalLayout, snapshot: Path) -> None:
    sent = send(AgentHere(root), read(snapshot / "below", layout))
    assert digests(Path(sent.path)) == digests(snapshot / "below")


@pytest.mark.parametrize(
    "target",
    ["../../refs/main", "../../../other/blobs/11", "../../blobs/out", "../../blobs/deep/11", "../../blobs/pipe"],
)
def test_a_link_in_a_snapshot_to_anything_but_a_blob_of_its_own_is_refused(
    layout: LocalLayout, snapshot: Path, tmp_path: Path, target: str
) -> None:
    cache = snapshot.parent.parent
    for path in (cache / "refs" / "main", tmp_path / "other" / "blobs" / "11", cache / "blobs" / "deep" / "11"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no part of the model")
    (cache / "blobs" / "out").symlink_to(tmp_path / "other" / "blobs" / "11")
    os.mkfifo(cache / "blobs" / "pipe")
    (snapshot / "odd").symlink_to(target)
    with pytest.raises(CheckpointError, match="odd"):
        LocalFolder(snapshot, layout)


@pytest.mark.parametrize("name", ["snapshots/0123abcd", "models--lab--x/0123abcd", "models--lab--x/snapshots"])
def test_a_folder_that_only_looks_like_a_snapshot_reaches_no_blobs(
    layout: LocalLayout, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for blobs in (tmp_path / "blobs", folder.parent / "blobs", folder.parent.parent / "blobs"):
        blobs.mkdir(exist_ok=True)
        (blobs / "11").write_bytes(b"11")
        (folder / "odd").unlink(missing_ok=True)
        (folder / "odd").symlink_to(blobs / "11")
        with pytest.raises(CheckpointError, match="odd"):
            LocalFolder(folder, layout)


def test_blobs_that_are_themselves_elsewhere_are_refused(layout: LocalLayout, snapshot: Path, tmp_path: Path) -> None:
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out"):
        LocalFolder(snapshot, layout)


@pytest.mark.parametrize("kind", ["link out", "dangling", "pipe", "socket", "name", "empty"])
def test_what_must_not_travel_is_refused_with_its_name(
    layout: LocalLayout, folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = folder / "odd"
    if kind == "link out":
        (tmp_path / "secret").write_bytes(b"secret")
        odd.symlink_to(tmp_path / "secret")
    elif kind == "dangling":
        odd.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(odd)
    elif kind == "socket":
        monkeypatch.chdir(folder)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("odd")
    elif kind == "name":
        (folder / "odd\x1b[31m").touch()
    else:
        folder = tmp_path / "odd"
        folder.mkdir()
    with pytest.raises(CheckpointError, match="odd") as caught:
        LocalFolder(folder, layout)
    assert caught.value.action
    assert "\x1b" not in str(caught.value)


class NodeOfProcesses(ProcessOpener):
    """A node whose streams are processes, and whose agent else answers in this one."""

    def __init__(self, disk: SmallDisk) -> None:
        agent = [sys.executable, "-m", "remote_payload", "agent", "stream"]
        super().__init__(disk.root, lambda request: [*agent, request], before_exec=disk.before_exec)

    def call(self, verb: str, request: object, result: type[T], *, timeout_s: float | None = None) -> T:
        return from_json(result, perform(verb, to_json(request)))


def test_a_disk_that_refuses_one_of_the_files_leaves_no_stream_behind(
    layout: LocalLayout, folder: Path, tmp_path: Path
) -> None:
    (folder / "a").rename(folder / "large")  # behind the other, which goes first and fits
    node = NodeOfProcesses(limited_files(tmp_path, 10 * MIB))
    with pytest.raises(NoSpaceError):
        send(node, read(folder, layout), streams=StreamPolicy(fixed=2))
    assert durable_bytes(Path(node.layout.root), [folder / "below" / "b"]) == 9 * MIB
    assert node.processes
    assert all(process.wait(20) is not None for process in node.processes)


def copy(source: AgentHere, target: AgentHere, folder: Path) -> CopiedCheckpoint:
    described = describe(cast(Node, source), str(folder))
    return copy_checkpoint(cast(Node, source), described, cast(Node, target), streams=StreamPolicy(fixed=1))


def test_a_thousand_small_files_go_from_node_to_node_in_few_round_trips(
    root: Path, layout: LocalLayout, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1000):
        (many / f"part {number}").write_bytes(f"{number}".encode() * number)
    (tmp_path / "other").mkdir()
    turns: list[TurnStream] = []

    def watched(inner: ByteStream) -> ByteStream:
        turns.append(TurnStream(inner))
        return turns[-1]

    source, target = AgentHere(root, [watched]), AgentHere(make_node_root(tmp_path / "other"))
    done = copy(source, target, many)
    assert digests(Path(done.path)) == digests(many)
    assert source.opened == 1
    assert sum(stream.turns for stream in turns) < 30
    assert (source.calls.count("list_files"), target.calls) == (2, ["assemble_folder"] * 2)


def test_a_folder_goes_from_node_to_node_over_the_same_streams(root: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    source, target = AgentHere(root), AgentHere(make_node_root(tmp_path / "other"))
    done = copy(source, target, folder)
    assert digests(Path(done.path)) == digests(folder)
    assert (source.opened, target.opened) == (1, 1)


def test_a_folder_from_node_to_node_survives_cuts_at_either_end(root: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    near: list[Wrap] = [lambda inner: CutStream(inner, None, 9 * MIB)]
    far: list[Wrap] = [lambda inner: CutStream(inner, 10 * MIB, None)]
    source, target = AgentHere(root, near), AgentHere(make_node_root(tmp_path / "other"), far)
    done = copy(source, target, folder)
    assert digests(Path(done.path)) == digests(folder)


@pytest.mark.parametrize("change", ["written", "added", "removed"])
def test_a_folder_on_a_node_that_changes_while_it_is_copied_is_an_error(
    root: Path, folder: Path, tmp_path: Path, change: str
) -> None:
    (tmp_path / "other").mkdir()

    def act(inner: ByteStream) -> ByteStream:
        if change == "written":
            (folder / "c").write_bytes(b"other")
        elif change == "added":
            (folder / "late").write_bytes(b"late")
        else:
            (folder / "c").unlink()
        return inner

    with pytest.raises(IntegrityError, match="changed while it was copied"):
        copy(AgentHere(root, [act]), AgentHere(make_node_root(tmp_path / "other")), folder)


LIES: dict[str, Callable[[ReadFile], ReadFile]] = {
    "name": lambda file: ReadFile(dataclasses.replace(file.listed, name="../../.ssh/authorized_keys"), file.manifest),
    "size": lambda file: ReadFile(dataclasses.replace(file.listed, size=5), file.manifest),
    "digest": lambda file: ReadFile(file.listed, dataclasses.replace(file.manifest, digest="v1:" + "0" * 64)),
    "chunks": lambda file: ReadFile(file.listed, dataclasses.replace(file.manifest, chunks=())),
    "no digest": lambda file: ReadFile(file.listed, dataclasses.replace(file.manifest, chunks=(Chunk(0, 9, "x"),))),
    "length": lambda file: ReadFile(file.listed, dataclasses.replace(file.manifest, chunks=(Chunk(0, -1, "00"),))),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_node_that_describes_what_cannot_be_is_not_believed(root: Path, folder: Path, lie: str) -> None:
    class Liar(AgentHere):
        def call(self, verb: str, request: object, result: type[T], *, timeout_s: float | None = None) -> T:
            found = super().call(verb, request, result, timeout_s=timeout_s)
            if isinstance(found, FolderManifest):
                return cast(T, dataclasses.replace(found, files=(LIES[lie](found.files[0]), *found.files[1:])))
            return found

    with pytest.raises(IntegrityError, match="cannot be"):
        describe(cast(Node, Liar(root)), str(folder))
