"""A checkpoint folder put together in the store by the agent's verb, from files that arrived there."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.transfer.upload import upload_file
from remote_payload.agent import assemble
from remote_payload.agent.gc import gc
from remote_payload.agent.hello import hello
from remote_payload.agent.locate import locate
from remote_payload.wire.chunks import ChunkManifest, digest_file
from remote_payload.wire.codec import WireError, from_json, to_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.members import Member, check_members, folder_digest, joined
from remote_payload.wire.messages import Assembled, AssembleRequest, GcRequest, HelloRequest, LocateRequest
from tests.support.agent_streams import ThreadOpener

MIB = 1024 * 1024


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


FILES = {
    ".metadata": noise(3000, 1),
    "__0_0.distcp": noise(17 * MIB, 2),
    "__1_0.distcp": noise(9 * MIB, 3),
    "a folder/below/config.json": b"{}",
    "empty": b"",
    "last ünï": noise(700, 4),
}


@pytest.fixture
def node(tmp_path: Path) -> NodeLayout:
    return NodeLayout(hello(HelloRequest(str(tmp_path / "root"))).root)


def manifest_of(content: bytes) -> ChunkManifest:
    return digest_file(io.BytesIO(content), len(content))


def request_for(node: NodeLayout, contents: dict[str, bytes]) -> AssembleRequest:
    members = tuple(Member(p, len(c), manifest_of(c).digest) for p, c in sorted(contents.items()))
    return AssembleRequest(node.root, members, pack_of(contents)[1].digest)


def pack_of(contents: dict[str, bytes]) -> tuple[bytes, ChunkManifest]:
    small = [content for _, content in sorted(contents.items()) if len(content) < 8 * MIB]
    return b"".join(small), joined(manifest_of(content) for content in small)


def store(node: NodeLayout, content: bytes, manifest: ChunkManifest | None = None, run_id: str = "") -> int:
    """Send a file into the store as the client does; how many bytes went."""
    local = Path(node.root).parent / "local"
    local.write_bytes(content)
    opener = ThreadOpener(Path(node.root))
    return upload_file(opener, local, manifest or manifest_of(content), run_id=run_id).bytes_sent


def store_all(node: NodeLayout, contents: dict[str, bytes]) -> None:
    for content in contents.values():
        if len(content) >= 8 * MIB:
            store(node, content)
    store(node, *pack_of(contents))


def assembled(node: NodeLayout, contents: dict[str, bytes]) -> Path:
    done = assemble.assemble_folder(request_for(node, contents))
    assert done.path is not None
    assert done.missing == ()
    assert {
        str(p.relative_to(done.path)): p.read_bytes() for p in Path(done.path).rglob("*") if p.is_file()
    } == contents
    return Path(done.path)


def entries(node: NodeLayout) -> list[str]:
    return sorted(path.name for path in Path(node.checkpoints).iterdir())


def test_what_the_store_lacks_is_told_and_nothing_is_made(node: NodeLayout) -> None:
    request = request_for(node, FILES)
    large = {member.digest for member in request.members if member.size >= 8 * MIB}
    assert set(assemble.assemble_folder(request).missing) == {*large, request.pack_digest}
    store(node, FILES["__0_0.distcp"])
    assert len(assemble.assemble_folder(request).missing) == 2
    assert len(entries(node)) == 1


def test_the_whole_folder_stands_there_at_once_as_one_entry_of_the_store(node: NodeLayout) -> None:
    store_all(node, FILES)
    tree = assembled(node, FILES)
    request = request_for(node, FILES)
    assert entries(node) == [folder_digest(request.members).replace(":", "-")]
    assert all(path.stat().st_mode & 0o777 == 0o400 for path in tree.rglob("*") if path.is_file())
    value = json.loads((tree.parent / "chunks.json").read_text())
    assert from_json(ChunkManifest, value).size == sum(map(len, FILES.values()))
    assert assemble.assemble_folder(request) == Assembled(str(tree))


@pytest.mark.parametrize("contents", [{"only.bin": b"small"}, {"a": b"", "b": b""}, {"large": noise(8 * MIB, 9)}])
def test_a_folder_of_any_sizes_can_be_put_together(node: NodeLayout, contents: dict[str, bytes]) -> None:
    store_all(node, contents)
    assembled(node, contents)


def test_files_of_one_content_are_taken_from_one(node: NodeLayout) -> None:
    twice = {"a": FILES["__0_0.distcp"], "b": FILES["__0_0.distcp"], "c": b"x", "d": b"x"}
    store_all(node, twice)
    assembled(node, twice)


def test_where_there_are_no_hard_links_files_are_copied(node: NodeLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    store_all(node, FILES)
    monkeypatch.setattr(assemble.os, "link", refuse)
    assembled(node, FILES)


def test_a_stored_file_that_is_not_what_its_name_says_makes_no_folder_and_is_lacking(node: NodeLayout) -> None:
    store_all(node, FILES)
    pack = Path(node.checkpoint(pack_of(FILES)[1].digest))
    pack.chmod(0o600)
    pack.write_bytes(bytes(len(pack_of(FILES)[0])))
    assert assemble.assemble_folder(request_for(node, FILES)).missing == (pack_of(FILES)[1].digest,)
    assert not Path(node.checkpoint_tree(folder_digest(request_for(node, FILES).members))).exists()
    assert not [name for name in entries(node) if name.startswith(".")]


@pytest.mark.parametrize("damage", ["a file is gone", "a file is cut", "a link"])
def test_a_folder_that_was_tampered_with_is_made_anew(node: NodeLayout, damage: str) -> None:
    store_all(node, FILES)
    victim = assembled(node, FILES) / "__0_0.distcp"
    if damage == "a file is cut":
        victim.chmod(0o600)
        os.truncate(victim, 5)
    else:
        victim.unlink()
    if damage == "a link":
        victim.symlink_to("/etc/passwd")
    assert assemble.assemble_folder(request_for(node, FILES)).path is None
    store_all(node, FILES)
    assembled(node, FILES)


def test_files_that_another_run_needs_stay_by_themselves(node: NodeLayout) -> None:
    mine, shared = FILES["__0_0.distcp"], FILES["__1_0.distcp"]
    store(node, mine, run_id="r1")
    store(node, shared, run_id="r2")
    store(node, *pack_of(FILES), run_id="r1")
    request = dataclasses.replace(request_for(node, FILES), run_id="r1")
    assert assemble.assemble_folder(request).path is not None
    assert Path(node.checkpoint(manifest_of(shared).digest)).read_bytes() == shared
    assert not Path(node.checkpoint(manifest_of(mine).digest)).exists()


def test_a_folder_is_pinned_by_the_run_that_it_was_put_together_for(node: NodeLayout) -> None:
    store_all(node, FILES)
    assemble.assemble_folder(dataclasses.replace(request_for(node, FILES), run_id="r1"))
    report = gc(GcRequest(node.root, keep_days=0, keep_bytes=0, dry_run=False))
    assert [pinned.by for pinned in report.pinned] == [("r1",)]
    assembled(node, FILES)


def test_a_stored_folder_is_located_by_its_digest_and_by_its_path(node: NodeLayout) -> None:
    store_all(node, FILES)
    tree = assembled(node, FILES)
    size = sum(map(len, FILES.values()))
    digest = folder_digest(request_for(node, FILES).members)
    found = locate(LocateRequest(node.root, digest=digest, size=size))
    assert (found.how, found.path, found.digest) == ("store", str(tree), digest)
    assert locate(LocateRequest(node.root, path=str(tree))).how == "in_place"
    assert not locate(LocateRequest(node.root, digest=digest, size=size + 1)).found


def test_chunks_are_reused_from_a_stored_folder(node: NodeLayout) -> None:
    store_all(node, FILES)
    assembled(node, FILES)
    new = FILES["__1_0.distcp"] + noise(100, 7)
    assert store(node, noise(8 * MIB, 8) + FILES["__0_0.distcp"][8 * MIB :]) == 8 * MIB
    assert store(node, new) == len(new) - 8 * MIB


def test_gc_takes_the_folder_as_a_whole(node: NodeLayout) -> None:
    store_all(node, FILES)
    assembled(node, FILES)
    report = gc(GcRequest(node.root, keep_days=0, dry_run=False))
    assert len(report.deleted) == 1
    assert report.freed_bytes >= sum(map(len, FILES.values()))
    assert entries(node) == []


def members(*paths: str) -> Sequence[Member]:
    return [Member(path, 1, "v1:" + "0" * 64) for path in paths]


BAD_PATHS = ["../x", "/etc/passwd", "a/../b", "a//b", "a/", "", ".", "a\nb", "a\x1b[31m", "a\\b", ".remote-eval-x"]


@pytest.mark.parametrize("path", [*BAD_PATHS, "x" * 256, "/".join("abcdefghi")])
def test_a_path_that_could_lead_elsewhere_is_refused(node: NodeLayout, path: str) -> None:
    with pytest.raises(WireError):
        assemble.assemble_folder(AssembleRequest(node.root, tuple(members(path)), "v1:" + "0" * 64))


@pytest.mark.parametrize("paths", [("b", "a"), ("a", "a"), ("a", "a/b"), ()])
def test_a_list_that_no_folder_could_have_is_refused(paths: tuple[str, ...]) -> None:
    with pytest.raises(WireError):
        check_members(members(*paths))


def test_the_identity_depends_on_every_path_and_content() -> None:
    base = [Member("a", 1, "v1:" + "1" * 64), Member("b", 1, "v1:" + "2" * 64)]
    others = [
        [base[0]],
        [Member("a", 1, base[1].digest), Member("b", 1, base[0].digest)],
        [Member("a", 1, base[0].digest), Member("c", 1, base[1].digest)],
    ]
    found = [folder_digest(base), *map(folder_digest, others)]
    assert len(set(found)) == len(found)
    assert all(len(digest) == 67 for digest in found)


KILLED = """
import json, os, signal, sys
from remote_payload.agent import assemble, files, partial_file, store
from remote_payload.wire.codec import from_json
from remote_payload.wire.messages import AssembleRequest

where, name = sys.argv[1].split(".")
target = {"os": assemble.os, "files": files, "partial_file": partial_file, "store": store}[where]
setattr(target, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
assemble.assemble_folder(from_json(AssembleRequest, json.loads(sys.stdin.read())))
"""


@pytest.mark.parametrize(
    "step", ["os.makedirs", "files.write_new", "os.link", "partial_file.write_manifest", "os.rename", "store.free"]
)
def test_an_agent_killed_at_any_step_leaves_no_half_a_folder_and_the_next_makes_it_whole(
    node: NodeLayout, step: str
) -> None:
    store_all(node, FILES)
    request = request_for(node, FILES)
    question = json.dumps(to_json(request)).encode()
    killed = subprocess.run([sys.executable, "-c", KILLED, step], input=question, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    tree = Path(node.checkpoint_tree(folder_digest(request.members)))
    assert tree.exists() == (step == "store.free")
    if step == "os.rename":
        # Between giving a file another name and noting that: it is one to be read anew.
        store_all(node, FILES)
    assembled(node, FILES)
