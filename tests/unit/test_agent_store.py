"""The content store: what counts as use, who pins a file, what goes first, and what is said where nothing may go."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from remote_payload.agent import locks, store
from remote_payload.agent.failure import AgentError
from remote_payload.agent.hello import hello
from remote_payload.agent.locate import locate
from remote_payload.agent.room import make_room
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import HelloRequest, LocateRequest
from tests.support.node_store import age, make_run, store_file

SIZE = 100_000
NEW = "v1:" + "f" * 64


@pytest.fixture
def node(tmp_path: Path) -> NodeLayout:
    return NodeLayout(hello(HelloRequest(str(tmp_path / "root"))).root)


def keep_below(node: NodeLayout, limit: int, size: int = SIZE) -> None:
    make_room(node, NEW, size, size, limit, lambda: None)


def there(node: NodeLayout) -> str:
    return "".join(sorted(file.digest[3] for file in store.stored_files(node)))


def note_use_at(node: NodeLayout, digest: str, run_id: str, seconds_ago: float) -> None:
    Path(node.checkpoint_uses(digest)).write_text(f"{time.time() - seconds_ago:.6f} {run_id}\n")


def test_what_a_run_located_is_used_whatever_the_files_times_say(node: NodeLayout) -> None:
    first, _, third = (store_file(node, letter, days) for letter, days in (("a", 9), ("b", 5), ("c", 1)))
    locate(LocateRequest(node.root, digest=first, size=SIZE))
    assert locate(LocateRequest(node.root, path=node.checkpoint(third))).how == "in_place"
    age(Path(node.checkpoints), 30)
    keep_below(node, 350_000)
    assert there(node) == "ac"
    keep_below(node, 230_000)
    assert there(node) == "c"


def test_nothing_goes_while_the_new_file_fits(node: NodeLayout) -> None:
    for letter, days in (("a", 9), ("b", 5)):
        store_file(node, letter, days)
    keep_below(node, 400_000)
    make_room(node, NEW, SIZE, SIZE, None, lambda: None)
    assert there(node) == "ab"


def test_a_run_under_way_pins_its_checkpoint_until_it_has_ended(node: NodeLayout) -> None:
    needed, _ = store_file(node, "a", 9), store_file(node, "b", 1)
    make_run(node, "nightly-1", 9, needed, state="running")
    keep_below(node, 250_000)
    assert there(node) == "a"
    with pytest.raises(
        AgentError,
        match=r"a file of 100 kB does not fit .* \d+ kB of at most 150 kB, of which \d+ kB "
        r"are pinned: \d+ kB by nightly-1$",
    ) as refused:
        keep_below(node, 150_000)
    assert refused.value.failure.kind == "no_space"
    assert "remote-eval cancel" in refused.value.failure.action
    assert "store_limit_gb" in refused.value.failure.action
    status = Path(node.attempt("nightly-1", 1).status)
    status.write_text(status.read_text().replace("running", "succeeded"))
    keep_below(node, 150_000)
    assert there(node) == ""


def test_nothing_goes_where_all_of_it_would_not_suffice(node: NodeLayout) -> None:
    for letter, days in (("a", 9), ("b", 5)):
        store_file(node, letter, days)
    with pytest.raises(AgentError, match="freeing all of it would not suffice"):
        keep_below(node, 250_000, size=300_000)
    assert there(node) == "ab"


def test_a_run_that_located_a_file_and_is_yet_to_start_pins_it_for_minutes(node: NodeLayout) -> None:
    digest = store_file(node, "a", 9)
    locate(LocateRequest(node.root, digest=digest, size=SIZE, run_id="soon"))
    with pytest.raises(AgentError, match=r"\d kB by soon$"):
        keep_below(node, 150_000)
    note_use_at(node, digest, "soon", store.UNCLAIMED_S + 1)
    keep_below(node, 150_000)
    assert there(node) == ""


def test_a_use_that_a_wrong_clock_noted_in_the_future_pins_nothing(node: NodeLayout) -> None:
    digest = store_file(node, "a", 9)
    note_use_at(node, digest, "soon", -86_400)
    keep_below(node, 150_000)
    assert there(node) == ""


def test_a_run_that_is_still_sending_pins_what_it_sent_long_ago(node: NodeLayout) -> None:
    sent, arriving = store_file(node, "a", 9), store_file(node, "b", 9)
    note_use_at(node, sent, "large-folder", 3600)
    note_use_at(node, arriving, "large-folder", 2000)
    session = locks.SessionLock(node.checkpoint_lock(arriving), "0" * 32)
    assert session.try_exclusive()
    with pytest.raises(AgentError, match=r"are pinned: \d+ kB by large-folder; \d+ kB by large-folder$"):
        keep_below(node, 250_000)
    session.close()
    keep_below(node, 250_000)
    assert there(node) == "b"


def test_a_run_that_ended_since_it_used_a_file_pins_it_no_more(node: NodeLayout) -> None:
    digest = store_file(node, "a", 9)
    note_use_at(node, digest, "done", 60)
    make_run(node, "done", 0, digest)
    keep_below(node, 150_000)
    assert there(node) == ""


def test_an_upload_pins_its_part_and_what_is_to_come_of_it_counts(node: NodeLayout) -> None:
    digest = store_file(node, "a", 9)
    part = Path(node.checkpoint_part(digest))
    Path(node.checkpoint(digest)).unlink()
    part.touch()
    os.truncate(part, 10 * SIZE)
    age(part.parent, 1)
    session = locks.SessionLock(node.checkpoint_lock(digest), "0" * 32)
    assert session.try_exclusive()
    with pytest.raises(AgentError, match=r"holds 1\.0 MB of at most 500 kB, of which 1\.0 MB are pinned: .* an upload"):
        keep_below(node, 500_000)
    session.close()
    age(part.parent, 1)
    keep_below(node, 105_000)
    assert there(node) == ""


def test_a_use_that_comes_between_the_look_and_the_deletion_saves_the_file(node: NodeLayout) -> None:
    digest = store_file(node, "a", 9)
    seen = store.stored_files(node)[0]
    locate(LocateRequest(node.root, digest=digest, size=SIZE))
    assert not store.free(node, seen)
    assert there(node) == "a"


def test_a_file_that_is_held_is_not_freed(node: NodeLayout) -> None:
    digest = store_file(node, "a", 9)
    seen = store.stored_files(node)[0]
    with Path(node.checkpoint_lock(digest)).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert not store.free(node, seen)
    assert store.free(node, seen)
    assert list(Path(node.checkpoints).iterdir()) == []


def test_a_session_whose_folder_was_deleted_makes_it_anew(node: NodeLayout) -> None:
    session = locks.SessionLock(node.checkpoint_lock(NEW), "0" * 32)
    assert store.free(node, store.stored_files(node)[0])
    assert session.try_exclusive()
    assert there(node) == "f"
    assert not locks.SessionLock(node.checkpoint_lock(NEW), "1" * 32).try_exclusive()


def test_what_an_interrupted_deletion_left_goes_first(node: NodeLayout) -> None:
    folder = node.checkpoint_folder(store_file(node, "a", 9))
    Path(folder).rename(node.doomed(folder))
    store_file(node, "a", 9)
    keep_below(node, 150_000)
    assert list(Path(node.checkpoints).iterdir()) == []


def test_the_record_of_uses_stays_small_and_a_torn_line_loses_only_itself(node: NodeLayout) -> None:
    digest = store_file(node, "a", 9)
    for number in range(3000):
        store.note_use(node, digest, f"run-{number}")
    uses = Path(node.checkpoint_uses(digest))
    assert uses.stat().st_size < 80_000
    uses.write_bytes(uses.read_bytes()[:-5])
    store.note_use(node, digest, "last")
    age(Path(node.checkpoints), 30)
    assert abs(store.stored_files(node)[0].last_used - time.time()) < 60
    assert store.pins(node, store.stored_files(node))[node.checkpoint_folder(digest)][0] == "last"


def test_garbage_in_the_store_is_passed_over(node: NodeLayout, tmp_path: Path) -> None:
    store_file(node, "a", 9)
    (tmp_path / "outside").mkdir()
    (Path(node.checkpoints) / "notes.txt").write_text("x")
    (Path(node.checkpoints) / ("v1-" + "b" * 64)).symlink_to(tmp_path / "outside")
    (Path(node.checkpoints) / ("v1-" + "c" * 64)).write_text("no folder")
    Path(node.checkpoint_uses("v1:" + "a" * 64)).write_bytes(b"\xff\n9999999999999 x\n12.000000 ../../etc\n" * 9)
    keep_below(node, 150_000)
    assert there(node) == ""
    assert (tmp_path / "outside").is_dir()
