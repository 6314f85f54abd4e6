"""A run that knows its checkpoint's digest fails where what it evaluates is another, before a job or after it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.transfer.upload import upload_file
from tests.support.agent_node import AgentNode, Attempt, agent_node
from tests.support.agent_streams import ThreadOpener, even_cuts, manifest_of

CONTENT = random.Random(5).randbytes(10_000)
MANIFEST = manifest_of(CONTENT, even_cuts(len(CONTENT), 1000))
WORK = """
import os
import time

from remote_payload.wire.states import Phase


def run(context):
    context.progress(Phase.RUN)
    while not os.path.exists(context.artifacts / "go"):
        time.sleep(0.05)


def next(context):
    pass
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentNode]:
    with agent_node(tmp_path) as found:
        yield found


@pytest.fixture
def stored(node: AgentNode, tmp_path: Path) -> Path:
    local = tmp_path / "local"
    local.write_bytes(CONTENT)
    return Path(upload_file(ThreadOpener(Path(node.root)), local, MANIFEST).path_on_node)


def overwrite(path: Path) -> None:
    facts = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(2500)  # in no chunk of the sample
        file.write(b"damage")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def start(node: AgentNode, path: Path, **changes: object) -> Attempt:
    jobs = {"work": "work:run", "next": "work:next"}
    return node.start(WORK, jobs, checkpoint_path=str(path), checkpoint_digest=MANIFEST.digest, **changes)


def go(attempt: Attempt) -> None:
    attempt.artifact("work/go").touch()


def test_a_copy_that_nobody_writes_to_is_evaluated(node: AgentNode, stored: Path) -> None:
    attempt = start(node, stored)
    attempt.wait_for_phase("run")
    go(attempt)
    assert attempt.wait_for_end()["state"] == "succeeded"


def test_a_copy_that_was_changed_before_the_job_begins_is_not_evaluated(node: AgentNode, stored: Path) -> None:
    overwrite(stored)
    ended = start(node, stored).wait_for_end()
    assert ended["state"] == "failed"
    assert "was changed since it was verified" in ended["jobs"]["work"]["error"]
    assert "process" not in ended["jobs"]["work"] or ended["jobs"]["work"]["process"] is None


def test_a_job_under_which_its_copy_was_changed_has_failed_whatever_it_says(node: AgentNode, stored: Path) -> None:
    attempt = start(node, stored)
    attempt.wait_for_phase("run")
    overwrite(stored)
    go(attempt)
    ended = attempt.wait_for_end()
    assert [job["state"] for job in ended["jobs"].values()] == ["failed", "failed"]
    assert "was changed since it was verified" in ended["cause"]


def test_a_job_under_which_its_copy_was_replaced_has_failed_although_what_stands_is_true(
    node: AgentNode, stored: Path
) -> None:
    attempt = start(node, stored)
    attempt.wait_for_phase("run")
    stored.rename(stored.with_name("kept so that the inode is not used again"))
    stored.write_bytes(CONTENT)
    go(attempt)
    ended = attempt.wait_for_end()
    assert "was replaced while a job read it" in ended["jobs"]["work"]["error"]


def test_a_copy_that_was_only_touched_is_read_in_full_and_evaluated(node: AgentNode, stored: Path) -> None:
    attempt = start(node, stored)
    attempt.wait_for_phase("run")
    stored.chmod(0o440)
    go(attempt)
    assert attempt.wait_for_end()["state"] == "succeeded"


def test_a_file_elsewhere_that_was_found_by_its_content_must_stay_as_it_was(node: AgentNode, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere"
    path.write_bytes(CONTENT)
    facts = path.stat()
    attempt = start(node, path, checkpoint_fingerprint=[facts.st_size, facts.st_mtime_ns, facts.st_ino])
    attempt.wait_for_phase("run")
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(0, facts.st_mtime_ns + 1))
    go(attempt)
    ended = attempt.wait_for_end()
    assert "was changed since the run found it" in ended["jobs"]["work"]["error"]
