"""Two clients, each a process with a home of its own, that send one file to one node at the same time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.sshd import Sshd
from tests.support.upload_over_sshd import Client, profile_for

MIB = 1024 * 1024
SIZE = 72 * MIB + 5
LIMIT_S = 120.0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "best.bin"
    path.write_bytes(os.urandom(SIZE))
    return path


def start(server: Sshd, checkpoint: Path, root: Path, limit: float) -> subprocess.Popen[str]:
    client = Client(profile_for(server, root), str(checkpoint), streams=2, limit=limit)
    return subprocess.Popen(client.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def next_line(client: subprocess.Popen[str]) -> dict[str, Any]:
    assert client.stdout is not None
    line = client.stdout.readline()
    assert line, client.communicate()[1]
    document: dict[str, Any] = json.loads(line)
    return document


def await_done(client: subprocess.Popen[str], byte_count: int) -> int:
    """Read on until so many bytes have arrived; how many had."""
    while (done := next_line(client)["bytes_done"]) < byte_count:
        pass
    return int(done)


def result(client: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = client.communicate(timeout=LIMIT_S)
    assert client.returncode == 0, errors
    document: dict[str, Any] = json.loads(output.splitlines()[-1])
    return document


def test_a_file_that_two_send_at_once_is_sent_once_in_sum(e2e_sshd: Sshd, checkpoint: Path, tmp_path: Path) -> None:
    clients = [start(e2e_sshd, checkpoint, tmp_path / "root", 60e6) for _ in range(2)]
    ends = [result(client) for client in clients]
    assert sum(end["bytes_sent"] for end in ends) == SIZE
    assert ends[0]["path"] == ends[1]["path"]
    assert Path(ends[0]["path"]).read_bytes() == checkpoint.read_bytes()


def test_the_second_takes_over_where_the_first_was_killed(e2e_sshd: Sshd, checkpoint: Path, tmp_path: Path) -> None:
    first = start(e2e_sshd, checkpoint, tmp_path / "root", 5e6)
    await_done(first, 4 * MIB)
    second = start(e2e_sshd, checkpoint, tmp_path / "root", 200e6)
    assert next_line(second)["bytes_done"] < SIZE
    arrived = await_done(first, 40 * MIB)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL  # and not the end of its work
    end = result(second)
    # What the client counts as arrived holds a chunk on each stream that the agent had not wholly taken.
    assert end["bytes_sent"] <= SIZE - arrived + 2 * 8 * MIB
    assert end["bytes_sent"] + end["bytes_saved"] == SIZE
    assert Path(end["path"]).read_bytes() == checkpoint.read_bytes()
