"""What `gc` deletes under a node root, and what it must never touch."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from remote_payload.agent.failure import AgentError
from remote_payload.agent.gc import gc
from remote_payload.agent.hello import hello
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import GcRequest, HelloRequest

DAY_S = 86_400


@pytest.fixture
def node(tmp_path: Path) -> NodeLayout:
    return NodeLayout(hello(HelloRequest(str(tmp_path / "root"))).root)


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY_S
    for found in [*path.rglob("*"), path]:
        os.utime(found, (then, then), follow_symlinks=False)


def make_run(node: NodeLayout, run_id: str, days: float, checkpoint: str, state: str | None = "succeeded") -> Path:
    attempt = node.attempt(run_id, 1)
    Path(attempt.folder).mkdir(parents=True)
    plan = {
        "run_id": run_id,
        "payload_sha256": "1" * 64,
        "jobs": [],
        "checkpoint_path": node.checkpoint(checkpoint),
        "checkpoint_digest": checkpoint,
        "settings": {},
        "gpu": {},
        "overrun": {},
    }
    Path(node.plan(run_id)).write_text(json.dumps(plan))
    Path(attempt.claim).write_text(json.dumps({"nonce": "0" * 32, "client": "c", "machine_id": "m"}))
    if state is not None:
        me = {"pid": 1, "start_time": "0", "boot_id": "b", "machine_id": "elsewhere"}
        Path(attempt.decision).write_text(json.dumps({"decision": "started", "supervisor": me}))
        status = {"run_id": run_id, "attempt": 1, "nonce": "0" * 32, "state": state, "supervisor": me, "jobs": {}}
        Path(attempt.status).write_text(json.dumps(status))
    age(Path(node.run_folder(run_id)), days)
    return Path(node.run_folder(run_id))


def store(node: NodeLayout, letter: str, days: float, size: int = 100_000) -> str:
    digest = "v1:" + letter * 64
    folder = Path(node.checkpoint_folder(digest))
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"x" * size)
    age(folder, days)
    return digest


def test_gc_takes_finished_runs_past_their_days_and_what_only_they_used(node: NodeLayout) -> None:
    old_file, shared, loose = store(node, "a", 50), store(node, "b", 50), store(node, "c", 50)
    old = make_run(node, "old", 40, old_file)
    young = make_run(node, "young", 2, shared)
    running = make_run(node, "running", 40, shared, state="running")
    pinned = make_run(node, "pinned", 40, shared)
    dry = gc(GcRequest(node.root, keep_days=30, pinned_runs=("pinned",)))
    wanted = {str(old), node.checkpoint_folder(old_file), node.checkpoint_folder(loose)}
    assert set(dry.deleted) == wanted
    assert old.exists()
    done = gc(GcRequest(node.root, keep_days=30, dry_run=False, pinned_runs=("pinned",)))
    assert set(done.deleted) == wanted
    assert not any(Path(path).exists() for path in wanted)
    assert all(path.exists() for path in (young, running, pinned, Path(node.checkpoint(shared))))
    assert not [path for path in Path(node.runs).iterdir() if path.name.startswith(".")]
    assert done.freed_bytes == dry.freed_bytes > 200_000


def test_gc_frees_the_least_recently_used_until_the_rest_fits(node: NodeLayout) -> None:
    digests = [store(node, letter, days) for letter, days in (("a", 1), ("b", 3), ("c", 2))]
    report = gc(GcRequest(node.root, keep_days=100, keep_bytes=150_000, dry_run=False))
    assert list(report.deleted) == [node.checkpoint_folder(digests[1]), node.checkpoint_folder(digests[2])]
    assert report.kept_bytes <= 150_000


def test_gc_leaves_an_upload_that_is_under_way(node: NodeLayout) -> None:
    digest = store(node, "a", 50)
    (Path(node.checkpoint_folder(digest)) / "file.part").write_bytes(b"x")
    assert gc(GcRequest(node.root, keep_days=0, keep_bytes=0, dry_run=False)).deleted == ()


def test_gc_makes_a_claim_that_never_started_void_before_it_deletes_it(node: NodeLayout) -> None:
    forgotten = make_run(node, "forgotten", 40, "v1:" + "d" * 64, state=None)
    assert gc(GcRequest(node.root, keep_days=30)).deleted == (str(forgotten),)
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
