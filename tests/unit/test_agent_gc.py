"""What `gc` deletes under a node root, and what it must never touch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from remote_payload.agent.failure import AgentError
from remote_payload.agent.gc import gc
from remote_payload.agent.hello import hello
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import GcRequest, HelloRequest
from tests.support.node_store import age, make_run, store_file


@pytest.fixture
def node(tmp_path: Path) -> NodeLayout:
    return NodeLayout(hello(HelloRequest(str(tmp_path / "root"))).root)


def test_gc_takes_finished_runs_past_their_days_and_what_only_they_used(node: NodeLayout) -> None:
    old_file, shared, loose = store_file(node, "a", 50), store_file(node, "b", 50), store_file(node, "c", 50)
    old = make_run(node, "old", 40, old_file)
    young = make_run(node, "young", 2, shared)
    running = make_run(node, "running", 40, shared, state="running")
    pinned = make_run(node, "pinned", 40, shared)
    dry = gc(GcRequest(node.root, keep_days=30, pinned_runs=("pinned",)))
    wanted = {str(old), node.checkpoint_folder(old_file), node.checkpoint_folder(loose)}
    assert {item.path for item in dry.deleted} == wanted
    assert old.exists()
    done = gc(GcRequest(node.root, keep_days=30, dry_run=False, pinned_runs=("pinned",)))
    assert {item.path for item in done.deleted} == wanted
    assert not any(Path(path).exists() for path in wanted)
    assert all(path.exists() for path in (young, running, pinned, Path(node.checkpoint(shared))))
    assert not [path for path in Path(node.runs).iterdir() if path.name.startswith(".")]
    assert done.freed_bytes == dry.freed_bytes > 200_000


def test_gc_frees_the_least_recently_used_until_the_rest_fits(node: NodeLayout) -> None:
    digests = [store_file(node, letter, days) for letter, days in (("a", 1), ("b", 3), ("c", 2))]
    report = gc(GcRequest(node.root, keep_days=100, keep_bytes=150_000, dry_run=False))
    assert [item.path for item in report.deleted] == [
        node.checkpoint_folder(digests[1]),
        node.checkpoint_folder(digests[2]),
    ]
    assert report.store_bytes <= 150_000


def test_gc_leaves_an_upload_that_is_under_way(node: NodeLayout) -> None:
    digest = store_file(node, "a", 50)
    (Path(node.checkpoint_folder(digest)) / "file.part").write_bytes(b"x")
    assert gc(GcRequest(node.root, keep_days=0, keep_bytes=0, dry_run=False)).deleted == ()


def test_gc_keeps_the_part_that_a_runs_plan_reads_and_takes_it_with_the_run(node: NodeLayout) -> None:
    digest = store_file(node, "a", 50)
    folder = Path(node.checkpoint_folder(digest))
    (folder / "file").rename(node.checkpoint_part(digest))
    Path(node.checkpoint_readable(digest)).write_text("{}")
    run = make_run(node, "running", 40, digest, state="running")
    age(folder, 50)
    assert gc(GcRequest(node.root, keep_days=0, keep_bytes=0, dry_run=False)).deleted == ()
    shutil.rmtree(run)
    make_run(node, "over", 40, digest)
    gc(GcRequest(node.root, keep_days=30, dry_run=False))
    assert not folder.exists()


def test_gc_makes_a_claim_that_never_started_void_before_it_deletes_it(node: NodeLayout) -> None:
    forgotten = make_run(node, "forgotten", 40, "v1:" + "d" * 64, state=None)
    assert [item.path for item in gc(GcRequest(node.root, keep_days=30)).deleted] == [str(forgotten)]
    assert not Path(node.attempt("forgotten", 1).decision).exists()
    gc(GcRequest(node.root, keep_days=30, dry_run=False))
    assert not forgotten.exists()
    fresh = make_run(node, "fresh", 0, "v1:" + "d" * 64, state=None)
    assert gc(GcRequest(node.root, keep_days=0, dry_run=False)).deleted == ()
    assert fresh.exists()


def test_gc_clears_away_what_was_in_the_making_long_ago(node: NodeLayout) -> None:
    code = Path(node.code)
    for name, days in ((".unpacking-old", 2.0), (".unpacking-new", 0.0), (".deleting-x", 0.0)):
        (code / name).mkdir(parents=True)
        age(code / name, days)
    gc(GcRequest(node.root, keep_days=30, dry_run=False))
    assert [path.name for path in code.iterdir()] == [".unpacking-new"]


def test_gc_touches_nothing_in_a_folder_without_our_marker(node: NodeLayout) -> None:
    old = make_run(node, "old", 400, "v1:" + "a" * 64)
    Path(node.marker).unlink()
    with pytest.raises(AgentError, match="lacks"):
        gc(GcRequest(node.root, keep_days=0, dry_run=False))
    assert old.exists()


def test_gc_follows_no_link_out_of_the_root(node: NodeLayout, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("mine")
    old = make_run(node, "old", 400, "v1:" + "a" * 64)
    (old / "attempt-1" / "artifacts").symlink_to(outside)
    Path(node.checkpoints).mkdir()
    (Path(node.checkpoints) / "link").symlink_to(outside)
    age(old, 400)
    gc(GcRequest(node.root, keep_days=0, keep_bytes=0, dry_run=False))
    assert not old.exists()
    assert (outside / "thesis.tex").read_text() == "mine"


def test_gc_tells_what_each_thing_takes_and_what_stays_for_whom(node: NodeLayout) -> None:
    needed, loose = store_file(node, "a", 50), store_file(node, "b", 50, size=300_000)
    make_run(node, "running", 40, needed, state="running")
    report = gc(GcRequest(node.root, keep_days=30))
    assert [item.path for item in report.deleted] == [node.checkpoint_folder(loose)]
    assert report.freed_bytes == report.deleted[0].size >= 300_000
    assert [(kept.path, kept.by) for kept in report.pinned] == [(node.checkpoint_folder(needed), ("running",))]
    assert report.store_bytes > 400_000
    assert gc(GcRequest(node.root, keep_days=30, dry_run=False)).store_bytes < 300_000


def test_gc_brings_the_store_below_its_bound_at_the_cost_of_finished_runs_alone(node: NodeLayout) -> None:
    files = [store_file(node, letter, days) for letter, days in (("a", 9), ("b", 8))]
    make_run(node, "running", 9, files[0], state="running")
    make_run(node, "finished", 8, files[1])
    report = gc(GcRequest(node.root, keep_days=30, keep_bytes=0, dry_run=False))
    assert [item.path for item in report.deleted] == [node.checkpoint_folder(files[1])]
