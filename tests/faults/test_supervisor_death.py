"""The supervisor itself is killed, told to end, or finds the disk full: what is left must tell the truth."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from remote_payload.agent import machine
from remote_payload.wire.codec import from_json
from remote_payload.wire.states import AttemptStatus, ProcessIdentity
from tests.support.agent_node import AgentNode, Attempt, agent_node, interpreter_name, interpreters

WAITS = """
import time
from remote_payload.wire.states import Phase
def run(context):
    context.write_text("early.txt", "a partial result")
    context.progress(Phase.RUN, 3, 10, "waiting")
    time.sleep(600)
"""


@pytest.fixture(params=interpreters(), ids=interpreter_name)
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AgentNode]:
    with agent_node(tmp_path, request.param) as made:
        yield made


def supervisor_of(attempt: Attempt) -> ProcessIdentity:
    decision = json.loads(Path(attempt.layout.decision).read_text())
    return from_json(ProcessIdentity, decision["supervisor"])


def kill(attempt: Attempt) -> None:
    supervisor = supervisor_of(attempt)
    assert machine.is_alive(supervisor)
    os.kill(supervisor.pid, signal.SIGKILL)
    attempt.wait_for("the supervisor is gone", lambda: not machine.is_alive(supervisor))


def thread_states(pid: int) -> list[str]:
    """The state letter of each thread of `pid`, as the kernel has it in /proc."""
    return [task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")]


def test_a_supervisor_killed_at_any_moment_leaves_a_readable_state(node: AgentNode) -> None:
    source = (
        "import time\n"
        "from remote_payload.wire.states import Phase\n"
        "def run(context):\n"
        "    for step in range(10**6):\n"
        "        context.progress(Phase.RUN, step, 10**6)\n"
        "        time.sleep(0.001)\n"
    )
    for moment in range(6):
        plan = node.plan(f"killed-{moment}", {"work.py": source}, {"work": "work:run"})
        attempt = node.claim(plan)
        launching = node.start_call("launch", attempt.ref)
        attempt.wait_for("a decision", lambda at=attempt: Path(at.layout.decision).exists())
        seen = len(attempt.events()) if Path(attempt.layout.events).exists() else 0
        wanted = seen + moment
        if moment:
            attempt.wait_for(
                f"{wanted} events",
                lambda at=attempt, n=wanted: (
                    Path(at.layout.events).exists() and Path(at.layout.events).read_bytes().count(b"\n") >= n
                ),
            )
        kill(attempt)
        launching.result()
        reply = attempt.status(events_jsonl=0)
        assert reply["decision"] == "started"
        assert reply["supervisor_alive"] is False
        assert not reply["manifest_present"]
        if reply["status"] is not None:
            assert from_json(AttemptStatus, reply["status"]).state.value == "running"


def test_a_job_does_not_outlive_its_supervisor_for_long(node: AgentNode) -> None:
    attempt = node.start(WAITS)
    job = from_json(ProcessIdentity, attempt.wait_for_phase("run")["process"])
    kill(attempt)
    attempt.wait_for("the job is gone too", lambda: not machine.is_alive(job))
    manifest = node.call("manifest", **attempt.ref)
    assert not manifest["complete"]
    assert [entry["path"] for entry in manifest["entries"]] == ["work/early.txt"]


def test_cancel_kills_what_a_dead_supervisor_left_and_says_so(node: AgentNode) -> None:
    attempt = node.start(WAITS)
    job = from_json(ProcessIdentity, attempt.wait_for_phase("run")["process"])
    os.kill(job.pid, signal.SIGSTOP)
    # A stop reaches the threads one by one; the one that watches the lifeline must have stopped before it ends.
    attempt.wait_for("every thread of the job has stopped", lambda: set(thread_states(job.pid)) == {"T"})
    kill(attempt)
    assert machine.is_alive(job)
    assert "killed what was left of work" in attempt.cancel()["note"]
    attempt.wait_for("the job is gone", lambda: not machine.is_alive(job))
    assert "left no job that is provably its own" in attempt.cancel()["note"]
    assert attempt.truth()["state"] == "running"


def test_cancel_never_kills_a_process_that_merely_has_the_jobs_number(node: AgentNode) -> None:
    attempt = node.start(WAITS)
    attempt.wait_for_phase("run")
    kill(attempt)
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as bystander:
        try:
            truth = attempt.truth()
            truth["jobs"]["work"]["process"]["pid"] = bystander.pid
            Path(attempt.layout.status).write_text(json.dumps(truth))
            assert "left no job that is provably its own" in attempt.cancel()["note"]
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_a_supervisor_of_another_machine_is_neither_alive_nor_dead(node: AgentNode) -> None:
    attempt = node.start(WAITS)
    attempt.wait_for_phase("run")
    kill(attempt)
    truth = attempt.truth()
    truth["supervisor"]["machine_id"] = "0" * 32
    Path(attempt.layout.status).write_text(json.dumps(truth))
    assert attempt.status()["supervisor_alive"] is None
    truth["supervisor"].update(machine_id=machine.machine_id(), boot_id="an-earlier-boot")
    Path(attempt.layout.status).write_text(json.dumps(truth))
    assert attempt.status()["supervisor_alive"] is False


def test_a_supervisor_told_to_end_stops_its_job_and_leaves_a_terminal_record(node: AgentNode) -> None:
    attempt = node.start(WAITS, {"work": "work:run", "later": "work:run"})
    attempt.wait_for_phase("run")
    os.kill(supervisor_of(attempt).pid, signal.SIGTERM)
    truth = attempt.wait_for_end()
    assert truth["state"] == "failed"
    assert "SIGTERM" in truth["cause"]
    assert truth["jobs"]["work"]["state"] == "cancelled"
    assert truth["jobs"]["later"]["state"] == "not_run"


def test_a_hang_up_does_not_end_the_run(node: AgentNode) -> None:
    attempt = node.start(
        "import time\n"
        "from remote_payload.wire.states import Phase\n"
        "def run(context):\n"
        "    context.progress(Phase.RUN)\n"
        "    while not (context.artifacts / 'go').exists(): time.sleep(0.05)\n"
    )
    job = attempt.wait_for_phase("run")["process"]
    os.kill(supervisor_of(attempt).pid, signal.SIGHUP)
    os.kill(job["pid"], signal.SIGHUP)
    attempt.artifact("work/go").touch()
    assert attempt.wait_for_end()["state"] == "succeeded"


def test_the_supervisor_has_left_the_callers_session_and_holds_none_of_its_pipes(node: AgentNode) -> None:
    attempt = node.start(WAITS)
    attempt.wait_for_phase("run")
    supervisor = supervisor_of(attempt)
    assert os.getsid(supervisor.pid) not in (os.getsid(0), supervisor.pid)
    open_files = {str(path.readlink()) for path in Path(f"/proc/{supervisor.pid}/fd").iterdir() if path.is_symlink()}
    assert "/dev/null" in open_files
    assert attempt.layout.supervisor_log in open_files
    attempt.cancel()
    attempt.wait_for_end()


MAY_MOUNT = os.geteuid() == 0
LITTLE_ROOM_BYTES = 4 * 1024 * 1024


@pytest.fixture(params=["file limit", "small disk"] if MAY_MOUNT else ["file limit"])
def little_room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """(folder, the system's words when it is full): a file system of 4 MiB where one may be mounted, and a limit on the
    size of each file anywhere.
    """
    folder = tmp_path / "little room"
    folder.mkdir(mode=0o700)
    if request.param == "small disk":
        options = f"size={LITTLE_ROOM_BYTES},mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        try:
            yield folder, "No space left on device"
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE_ROOM_BYTES, before[1]))
        try:
            yield folder, "File too large"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("filler", ["artifact", "log"])
@pytest.mark.parametrize("python", interpreters(), ids=interpreter_name)
def test_a_full_disk_fails_the_job_and_the_terminal_record_still_lands(
    little_room: tuple[Path, str], tmp_path: Path, python: str, filler: str
) -> None:
    folder, words = little_room
    fills_an_artifact = (
        "    with open(context.artifacts / 'big', 'wb', 0) as file:\n        while True: file.write(b'x' * 4096)\n"
    )
    fills_the_log = (
        "    for _ in range(3000): os.write(1, b'x' * 4096)\n    context.write_bytes('late.bin', b'x' * 5_000_000)\n"
    )
    with agent_node(tmp_path, python, root=folder / "root") as node:
        attempt = node.start(
            "import os\ndef run(context):\n" + (fills_an_artifact if filler == "artifact" else fills_the_log)
        )
        truth = attempt.wait_for_end()
        assert truth["state"] == "failed"
        assert truth["jobs"]["work"]["state"] == "failed"
        assert words in truth["cause"]
        assert attempt.status()["supervisor_alive"] is False
        manifest = node.call("manifest", **attempt.ref)
        assert manifest["complete"]
