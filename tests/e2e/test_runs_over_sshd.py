"""Whole runs as a person starts them, over a real sshd."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.sshd import Sshd
from tests.support.world import World, digests, make_world, until


def entries(world: World, run_id: str) -> list[str]:
    with sqlite3.connect(f"file:{world.home / 'data' / 'remote-eval.sqlite3'}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT kind FROM journal_entries WHERE run_id = ? ORDER BY id", (run_id,)).fetchall()
    return [str(r[0]) for r in rows]


def attempts_on_node(world: World, run_id: str) -> list[str]:
    return sorted(p.name for p in (world.node / "root of ours" / "runs" / run_id).glob("attempt-*"))


def test_a_checkpoint_that_is_on_the_node_is_used_in_place(world: World) -> None:
    world.with_torch()
    result = world.json("--checkpoint", "lab:best.pt", "--jobs", "health")
    assert result["verdict"]["dimensions"]["integrity"] == "pass"
    assert '"how": "in_place"' in (world.run_folder(result["run_id"]) / "provenance.json").read_text()
    assert Path(result["report"]).read_text().startswith("<!doctype html>")


def test_a_local_checkpoint_is_sent_once_and_found_by_content_from_then_on(world: World) -> None:
    world.with_torch()
    other = world.project / "copied elsewhere.pt"
    (world.node / "data" / "best.pt").unlink()
    first = world.json("--checkpoint", "best.pt", "--jobs", "health")
    provenance = (world.run_folder(first["run_id"]) / "provenance.json").read_text()
    assert '"bytes_sent": 0' not in provenance
    other.write_bytes((world.project / "best.pt").read_bytes())
    second = world.json("--checkpoint", other.name, "--jobs", "health")
    assert '"bytes_sent": 0' in (world.run_folder(second["run_id"]) / "provenance.json").read_text()


def test_with_json_the_upload_is_told_in_json_lines_on_stderr(world: World) -> None:
    (world.node / "data" / "best.pt").unlink()
    done = world.cli("--checkpoint", "best.pt", "--jobs", "count", "--json")
    assert "verdict" in json.loads(done.stdout), done.stderr
    events = [event for event in map(json.loads, done.stderr.splitlines()) if event["event"] == "transfer"]
    assert {"checkpoint", "artifacts"} <= {e["what"] for e in events if e["bytes_done"] == e["bytes_total"]}


def test_a_bandwidth_limit_of_the_command_stands_above_the_profiles(world: World) -> None:
    values = torch.randint(0, 256, (3_000_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    torch.save({"w": values}, world.project / "best.pt")
    world.edit_profile(bandwidth_limit_mbps=8000)
    result = world.json("--checkpoint", "best.pt", "--jobs", "count", "--bandwidth-limit", "8")
    # A megabyte a second, with bursts of a quarter of a second: whatever else goes on, it cannot take less.
    assert world.json("status", result["run_id"])["stage_seconds"]["sync"] >= 2.7


def test_a_file_of_the_same_content_under_a_root_is_never_sent(world: World) -> None:
    world.with_torch()
    result = world.json("--checkpoint", "best.pt", "--jobs", "health")
    assert '"how": "by_content"' in (world.run_folder(result["run_id"]) / "provenance.json").read_text()


def test_a_detached_run_is_taken_up_by_another_process(world: World) -> None:
    detached = world.json("--checkpoint", "lab:best.pt", "--jobs", "wait", "--detach")
    until(lambda: world.launches())
    status = world.json("status", detached["run_id"])
    assert status["node"]["status"]["state"] == "running"
    (world.node / "data" / "go").touch()
    finished = world.json("resume", detached["run_id"])
    assert finished["run_id"] == detached["run_id"]
    assert (world.run_folder(finished["run_id"]) / "artifacts" / "wait" / "done.txt").read_text() == "waited\n"
    assert len(world.launches()) == 1


def test_ctrl_c_detaches_and_the_job_goes_on(world: World) -> None:
    client = world.start("--checkpoint", "lab:best.pt", "--jobs", "wait")
    until(lambda: world.launches())
    client.send_signal(signal.SIGINT)
    output, _ = client.communicate(timeout=60)
    assert client.returncode == 130, output
    assert "goes on" in output
    (world.node / "data" / "go").touch()
    assert world.json("resume")["run_id"] == world.launches()[0]
    assert len(world.launches()) == 1


def test_a_large_artifact_is_gone_on_with_after_the_client_was_killed_in_its_middle(world: World) -> None:
    content = random.Random(8).randbytes(144 * 1024 * 1024)
    (world.node / "data" / "big.bin").write_bytes(content)
    world.edit_profile(bandwidth_limit_mbps=320)
    client = world.start("--checkpoint", "lab:best.pt", "--jobs", "big", "--json")
    assert client.stdout is not None
    for line in client.stdout:
        event = json.loads(line)
        if event.get("what") == "big/big.bin" and event["bytes_done"] > 72 * 1024 * 1024:
            client.kill()
            break
    client.wait(60)
    (run_id,) = world.run_ids()
    assert not (world.run_folder(run_id) / "artifacts").exists()
    resumed = world.cli("resume", run_id, "--json")
    assert resumed.returncode == 0, resumed.stderr
    events = [json.loads(line) for line in resumed.stderr.splitlines()]
    told = [event["saved"]["already_there"] for event in events if event.get("what") == "big/big.bin"]
    assert told[-1] >= 64 * 1024 * 1024
    folder = world.run_folder(run_id) / "artifacts" / "big"
    assert sorted(path.name for path in folder.iterdir()) == ["big.bin", "small.txt"]
    assert (folder / "big.bin").read_bytes() == content


def test_a_cancelled_run_ends_as_cancelled_and_its_process_is_gone(world: World) -> None:
    run_id = world.json("--checkpoint", "lab:best.pt", "--jobs", "wait", "--detach")["run_id"]
    until(lambda: world.launches())
    assert world.json("cancel", run_id)["state"] == "cancelled"
    status = world.json("status", run_id)
    assert status["attempt"]["state"] == "cancelled"
    assert world.json("resume", run_id, expect=6)["error"] == "JobCancelledError"
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True, timeout=30).stdout
    assert run_id not in listed


def test_a_failing_job_still_brings_its_logs_and_partial_results(world: World) -> None:
    error = world.json("--checkpoint", "lab:best.pt", "--jobs", "fail,count", expect=6)
    assert "this job fails" in error["cause"]
    (run_id,) = world.run_ids()
    folder = world.run_folder(run_id)
    assert (folder / "artifacts" / "fail" / "partial.txt").read_text() == "as far as it got\n"
    assert "ValueError: this job fails" in (folder / "diagnostics" / "stderr.log").read_text()
    assert (folder / "artifacts" / "count" / "numbers.txt").exists()
    assert (folder / "report.html").exists()
    assert world.json("history")[0]["overall"] != "pass"


def test_a_failed_run_is_tried_again_only_when_asked(world: World) -> None:
    world.json("--checkpoint", "lab:best.pt", "--jobs", "fail", expect=6)
    (run_id,) = world.run_ids()
    world.json("resume", run_id, expect=6)
    assert attempts_on_node(world, run_id) == ["attempt-1"]
    world.json("resume", run_id, "--retry", expect=6)
    assert attempts_on_node(world, run_id) == ["attempt-1", "attempt-2"]


def test_a_job_that_hangs_is_stopped_and_its_stacks_are_brought(world: World) -> None:
    world.edit_profile(budgets_s={"first_batch": 1.0})
    error = world.json("--checkpoint", "lab:best.pt", "--jobs", "hang", expect=6)
    (run_id,) = world.run_ids()
    assert "first_batch" in error["cause"]
    assert "in hang" in (world.run_folder(run_id) / "diagnostics" / "stacks.log").read_text()


def test_a_killed_supervisor_is_lost_and_never_called_finished(world: World) -> None:
    run_id = world.json("--checkpoint", "lab:best.pt", "--jobs", "wait", "--detach")["run_id"]
    until(lambda: world.launches())
    supervisor = world.json("status", run_id)["node"]["status"]["supervisor"]["pid"]
    os.kill(supervisor, signal.SIGKILL)
    error = world.json("resume", run_id, expect=6)
    assert error["error"] == "AttemptLostError"
    assert (world.run_folder(run_id) / "report.html").exists()
    (world.node / "data" / "go").touch()
    assert world.json("resume", run_id, "--retry")["run_id"] == run_id
    assert attempts_on_node(world, run_id) == ["attempt-1", "attempt-2"]


def test_two_clients_at_one_run_are_told_apart(world: World) -> None:
    client = world.start("--checkpoint", "lab:best.pt", "--jobs", "wait")
    until(lambda: world.launches())
    (run_id,) = world.run_ids()
    assert world.json("resume", run_id, expect=75)["error"] == "LockedError"
    (world.node / "data" / "go").touch()
    assert client.wait(timeout=60) == 0
    client.communicate(timeout=10)


def test_followed_logs_show_terminal_escapes_harmlessly(world: World) -> None:
    run_id = world.json("--checkpoint", "lab:best.pt", "--jobs", "count", "--detach")["run_id"]
    shown = world.cli("logs", "-f", run_id)
    assert "\x1b" not in shown.stdout
    assert "\\x1b[31mred\\x1b]0;owned\\x07" in shown.stdout


# Every instant at which a crash could lose or double work is beside a journal entry.
LAST_ENTRY = 19
COUNT = ("--checkpoint", "lab:best.pt", "--jobs", "count")


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, e2e_sshd: Sshd, small_checkpoint: Path, torchless_python: str
) -> dict[str, str]:
    """The artifacts of a run that nobody killed."""
    world = make_world(tmp_path_factory.mktemp("undisturbed"), e2e_sshd, small_checkpoint, torchless_python)
    run_id = world.json(*COUNT)["run_id"]
    kinds = entries(world, run_id)
    assert (len(kinds), kinds[-1]) == (LAST_ENTRY, "reported"), kinds
    return digests(world.run_folder(run_id) / "artifacts")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(1, LAST_ENTRY + 1))
def test_a_client_killed_anywhere_resumes_to_the_same_artifacts_with_one_launch(
    world: World, undisturbed: dict[str, str], when: str, number: int
) -> None:
    run_id = world.killed_at(when, number, *COUNT)
    assert world.run_ids() == [run_id]
    finished = world.json("resume", run_id)
    assert finished["run_id"] == run_id
    assert world.launches() == [run_id]
    assert attempts_on_node(world, run_id) == ["attempt-1"]
    assert digests(world.run_folder(run_id) / "artifacts") == undisturbed
