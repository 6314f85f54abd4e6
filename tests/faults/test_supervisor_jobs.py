"""What jobs can do to their supervisor: hang, flood, ignore signals, leave things behind, lie. Real processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from remote_payload.agent import machine
from remote_payload.wire.names import check_artifact_path
from tests.support.agent_node import AgentNode, Attempt, agent_node, interpreter_name, interpreters

HANGS_IN_IMPORT = """
import threading
def the_lock_that_never_comes():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
the_lock_that_never_comes()
"""

IGNORES_SIGTERM = """
import os, signal, subprocess, sys, time
from remote_payload.wire.states import Phase
def run(context):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deaf])
    (context.artifacts / "child.pid").write_text(str(child.pid))
    context.progress(Phase.RUN, 1, 10, "deaf")
    time.sleep(600)
"""

WAITS = """
import time
from remote_payload.wire.states import Phase
def run(context):
    context.progress(Phase.RUN, 3, 10, "waiting")
    time.sleep(600)
def quick(context):
    return {}
"""


@pytest.fixture(params=interpreters(), ids=interpreter_name)
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AgentNode]:
    with agent_node(tmp_path, request.param) as made:
        yield made


def overrun(action: str = "stop", **budgets_s: float) -> dict[str, object]:
    return {"budgets_s": budgets_s, "action": action, "cancel_grace_s": 1.0}


def assert_gone(attempt: Attempt, pid: int) -> None:
    attempt.wait_for(f"process {pid} is gone", lambda: machine.start_time(pid) is None)


def test_a_job_that_succeeds_leaves_a_complete_record(node: AgentNode) -> None:
    attempt = node.start(
        "from remote_payload.wire.states import Phase\n"
        "def run(context):\n"
        "    print('to standard output')\n"
        "    context.progress(Phase.RUN, 7, 7, 'done')\n"
        "    context.write_text('pictures/a.txt', 'a picture')\n"
        "    return {'metrics': [], 'findings': [{'id': 'work.odd', 'severity': 'warning', 'title': 'Odd',"
        " 'dimension': 'numerics'}]}\n"
    )
    truth = attempt.wait_for_end()
    assert truth["state"] == "succeeded"
    assert truth["cause"] is None
    job = truth["jobs"]["work"]
    assert (job["state"], job["phase"], job["counter"], job["total"], job["exit_status"]) == (
        "succeeded",
        "run",
        7,
        7,
        0,
    )
    assert attempt.log("stdout.log") == "to standard output\n"
    document = json.loads(attempt.artifact("work/work.json").read_text())
    assert document["schema_version"] == 1
    assert document["verdict"]["dimensions"]["numerics"] == "warn"
    assert document["verdict"]["dimensions"]["integrity"] == "not_measured"
    assert document["verdict"]["overall"] == "warn"
    manifest = node.call("manifest", **attempt.ref)
    assert manifest["complete"]
    assert [entry["path"] for entry in manifest["entries"]] == ["work/pictures/a.txt", "work/work.json"]
    reply = attempt.status()
    assert reply["manifest_present"]
    assert reply["supervisor_alive"] is False
    assert reply["processes_with_nonce"] == []
    assert not Path(attempt.layout.reserve).exists()


def test_a_job_that_hangs_in_its_import_is_stopped_and_its_stacks_are_kept(node: AgentNode) -> None:
    attempt = node.start(HANGS_IN_IMPORT, overrun=overrun(**{"import": 5.0}))
    truth = attempt.wait_for_end()
    assert truth["state"] == "failed"
    assert truth["jobs"]["work"]["overran"] == ["import"]
    assert "no progress in phase import" in truth["jobs"]["work"]["error"]
    assert "no progress in phase import" in truth["cause"]
    stacks = attempt.log("stacks.log")
    assert "the_lock_that_never_comes" in stacks
    event = attempt.event("overran")
    assert event["phase"] == "import"
    assert event["stacks_bytes"] > 0
    assert "load_average" in event["environment"]


def test_a_job_may_go_on_after_an_overrun_where_the_policy_says_so(node: AgentNode) -> None:
    attempt = node.start(
        "import os, time\n"
        "from remote_payload.wire.states import Phase\n"
        "def run(context):\n"
        "    context.progress(Phase.LOAD)\n"
        "    stacks = context.artifacts.parents[1] / 'stacks.log'\n"
        "    while 'Current thread' not in stacks.read_text() and 'Thread 0x' not in stacks.read_text():\n"
        "        time.sleep(0.05)\n",
        overrun=overrun("continue", load=0.5),
    )
    truth = attempt.wait_for_end()
    assert truth["state"] == "succeeded"
    assert truth["jobs"]["work"]["overran"] == ["load"]


def test_a_job_that_makes_progress_never_overruns(node: AgentNode) -> None:
    attempt = node.start(
        "import time\n"
        "from remote_payload.wire.states import Phase\n"
        "def run(context):\n"
        "    for step in range(30):\n"
        "        context.progress(Phase.RUN, step, 30)\n"
        "        time.sleep(0.2)\n",
        overrun=overrun(run=20.0),
    )
    truth = attempt.wait_for_end()
    assert truth["state"] == "succeeded"
    assert truth["jobs"]["work"]["overran"] == []


def test_a_job_that_ignores_sigterm_is_killed_with_all_its_children(node: AgentNode) -> None:
    attempt = node.start(IGNORES_SIGTERM, overrun=overrun())
    attempt.wait_for_phase("run")
    pid = int(attempt.artifact("work/child.pid").read_text())
    assert attempt.cancel()["decision"] == "started"
    truth = attempt.wait_for_end()
    assert truth["state"] == "cancelled"
    assert truth["jobs"]["work"]["state"] == "cancelled"
    assert truth["jobs"]["work"]["signal"] == signal.SIGKILL
    assert_gone(attempt, pid)


def test_cancel_ends_the_running_job_and_the_ones_behind_it_never_run(node: AgentNode) -> None:
    attempt = node.start(WAITS, {"quick": "work:quick", "slow": "work:run", "later": "work:quick"})
    attempt.wait_for_phase("run")
    attempt.cancel()
    truth = attempt.wait_for_end()
    assert {name: job["state"] for name, job in truth["jobs"].items()} == {
        "quick": "succeeded",
        "slow": "cancelled",
        "later": "not_run",
    }
    assert truth["state"] == "cancelled"
    assert node.call("manifest", **attempt.ref)["complete"]
    assert "had ended before" in attempt.cancel()["note"]


def test_a_failing_job_does_not_stop_the_next_and_says_why_it_failed(node: AgentNode) -> None:
    attempt = node.start(
        "def bad(context):\n"
        "    context.write_text('partial.txt', 'so far')\n"
        "    raise ValueError('shapes\\x1b[2J differ')\n"
        "def good(context):\n    return {}\n",
        {"bad": "work:bad", "good": "work:good"},
    )
    truth = attempt.wait_for_end()
    assert truth["state"] == "failed"
    assert truth["jobs"]["good"]["state"] == "succeeded"
    assert truth["jobs"]["bad"]["exit_status"] == 1
    assert truth["jobs"]["bad"]["error"] == "ValueError: shapes\\x1b[2J differ"
    assert truth["cause"] == "job bad failed: ValueError: shapes\\x1b[2J differ"
    assert "Traceback" in attempt.log("stderr.log")
    assert "bad/partial.txt" in [entry["path"] for entry in node.call("manifest", **attempt.ref)["entries"]]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("work:absent", "work has no function absent"),
        ("nowhere:run", "No module named 'nowhere'"),
        ("work", "does not have the form module:function"),
        ("work:leave", "exit status 3"),
        ("work:die", "killed by SIGKILL"),
        ("work:nan", "Out of range float values"),
        ("work:lie", "findings[0]"),
    ],
)
def test_each_way_to_fail_has_its_sentence(node: AgentNode, entry: str, words: str) -> None:
    attempt = node.start(
        "import os, sys\n"
        "def leave(context): sys.exit(3)\n"
        "def die(context): os.kill(os.getpid(), 9)\n"
        "def nan(context): return {'loss': float('nan')}\n"
        "def lie(context): return {'findings': [{'id': 7}]}\n",
        {"work": entry},
    )
    truth = attempt.wait_for_end()
    assert truth["state"] == "failed"
    assert words in truth["jobs"]["work"]["error"]


def test_a_flood_of_output_is_taken_and_the_log_stops_growing(node: AgentNode) -> None:
    attempt = node.start(
        "import os\n"
        "def run(context):\n"
        "    block = b'x' * (1 << 20)\n"
        "    for _ in range(80):\n"
        "        left = memoryview(block)\n"
        "        while left: left = left[os.write(1, left):]\n"
    )
    truth = attempt.wait_for_end()
    assert truth["state"] == "succeeded"
    assert Path(attempt.layout.stdout_log).stat().st_size == 64 * 1024 * 1024
    truncated = attempt.event("log_truncated")
    assert (truncated["log"], truncated["dropped_bytes"]) == ("stdout.log", 16 * 1024 * 1024)


WRITES_GARBAGE = r"""
import os
from remote_payload.wire.states import Phase
GARBAGE = (
    b'\x00\xff', b'[]', b'{"phase": "moon"}', b'{"phase": "run", "counter": -1}',
    b'{"phase": "run", "counter": true}', b'[' * 60000, b'y' * 300000,
)
def run(context):
    for line in GARBAGE:
        left = line + b'\n'
        while left:
            left = left[os.write(context._progress_fd, left):]
    context.progress(Phase.RUN, 5, 6, 'still here')
"""


def test_garbage_on_the_progress_pipe_is_ignored(node: AgentNode) -> None:
    attempt = node.start(WRITES_GARBAGE)
    truth = attempt.wait_for_end()
    assert truth["state"] == "succeeded"
    assert truth["jobs"]["work"]["counter"] == 5
    assert [event["counter"] for event in attempt.events() if event["event"] == "progress"] == [5]


def test_hostile_artifacts_are_left_out_of_the_manifest_and_named(node: AgentNode, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private")
    attempt = node.start(
        "import os\n"
        "def run(context):\n"
        f"    secret = {str(secret)!r}\n"
        "    here = context.artifacts\n"
        "    os.symlink(secret, here / 'link.txt')\n"
        "    os.symlink(os.path.dirname(secret), here / 'folder')\n"
        "    os.mkfifo(here / 'pipe')\n"
        "    os.mkdir(here / 'deep')\n"
        "    for name in ('.hidden', '-rf', 'a b', 'new\\nline', 'esc\\x1b[2J', 'tag<script>', 'x' * 200):\n"
        "        (here / name).write_text('x')\n"
        "    open(os.path.join(os.fsencode(here), b'\\xff\\xfe'), 'w').close()\n"
        "    (here / 'deep' / 'good.txt').write_text('good')\n"
        "    return {}\n"
    )
    truth = attempt.wait_for_end()
    assert truth["state"] == "succeeded"
    entries = node.call("manifest", **attempt.ref)["entries"]
    assert [entry["path"] for entry in entries] == ["work/deep/good.txt", "work/work.json"]
    assert all(check_artifact_path(entry["path"]) for entry in entries)
    left_out = attempt.event("artifacts_left_out")
    assert left_out["count"] == 11
    assert "\x1b" not in json.dumps(left_out, ensure_ascii=False)


def test_artifacts_replaced_by_a_link_are_not_followed_anywhere(node: AgentNode, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "private.txt").write_text("private")
    attempt = node.start(
        "import os\n"
        "def run(context):\n"
        "    artifacts = context.artifacts.parent\n"
        "    os.rename(artifacts, artifacts.with_name('moved'))\n"
        f"    os.symlink({str(elsewhere)!r}, artifacts)\n"
    )
    attempt.wait_for_end()
    assert node.call("manifest", **attempt.ref)["entries"] == []


def test_what_a_finished_job_left_running_is_ended(node: AgentNode) -> None:
    attempt = node.start(
        "import subprocess, sys\n"
        "def run(context):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    (context.artifacts / 'child.pid').write_text(str(child.pid))\n"
        "    return {}\n"
    )
    assert attempt.wait_for_end()["state"] == "succeeded"
    assert_gone(attempt, int(attempt.artifact("work/child.pid").read_text()))


def test_a_child_that_flees_the_group_and_keeps_the_pipes_open_does_not_hold_up_the_end(node: AgentNode) -> None:
    attempt = node.start(
        "import subprocess, sys\n"
        "def run(context):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "    (context.artifacts / 'child.pid').write_text(str(child.pid))\n"
        "    return {}\n"
    )
    try:
        assert attempt.wait_for_end()["state"] == "succeeded"
    finally:
        os.kill(int(attempt.artifact("work/child.pid").read_text()), signal.SIGKILL)


def test_no_secret_of_the_node_stands_in_the_record(node: AgentNode) -> None:
    node.environment.update(
        CUDA_API_KEY="s3cret-1", HF_TOKEN="s3cret-2", PYTHON_PASSWORD="s3cret-3", OMP_NUM_THREADS="2"
    )
    attempt = node.start(
        "import os\ndef run(context):\n"
        "    return {'seen': sorted(n for n in os.environ if n.startswith(('REMOTE_EVAL', 'SSH_')))}\n"
    )
    attempt.wait_for_end()
    recorded = json.loads(Path(attempt.layout.environment).read_text())
    assert recorded["variables"]["OMP_NUM_THREADS"] == "2"
    for path in Path(attempt.layout.folder).rglob("*"):
        assert path.is_dir() or b"s3cret" not in path.read_bytes()
    assert json.loads(attempt.artifact("work/work.json").read_text())["seen"] == []


def test_everything_is_private_to_the_user(node: AgentNode) -> None:
    attempt = node.start("def run(context):\n    (context.artifacts / 'x').write_text('x')\n")
    attempt.wait_for_end()
    for path in [Path(node.root), *Path(node.root).rglob("*")]:
        assert path.lstat().st_mode & 0o077 == 0, path
