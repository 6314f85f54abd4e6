"""Stacks of a job and of the processes that it starts, in one file."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

_LINE = re.compile(r'(Thread|Current thread) 0x[0-9a-f]+.* \(most recent call first\):|  File ".*", line \d+ in \S+|')

_CHILD = """
import faulthandler, signal, sys, threading, time
faulthandler.register(signal.SIGUSR1, int(sys.argv[1]), all_threads=True)
def deep(n):
    return deep(n - 1) if n else time.sleep(300)
for _ in range(20):
    threading.Thread(target=deep, args=(60,), daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""

_JOB = f"""
import subprocess, sys
from remote_payload.jobs import stacks
stacks.dump_when_asked(sys.argv[1])
to = stacks.descriptor()
children = [
    subprocess.Popen(
        [sys.executable, "-c", {_CHILD!r}, str(to)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(to,)
    )
    for _ in range(4)
]
for child in children:
    child.stdout.readline()
    stacks.pass_on_to(child.pid)
print("ready", flush=True)
sys.stdin.read()
"""


def test_processes_that_are_asked_together_do_not_write_into_each_others_lines(tmp_path: Path) -> None:
    log = tmp_path / "stacks.log"
    with subprocess.Popen(
        [sys.executable, "-c", _JOB, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as job:
        try:
            assert job.stdout is not None
            assert job.stdout.readline() == "ready\n"
            job.send_signal(signal.SIGUSR1)
            deadline = time.monotonic() + 60
            while log.read_text().count("Current thread") < 5 and time.monotonic() < deadline:
                time.sleep(0.05)
            size = -1
            while size != log.stat().st_size and time.monotonic() < deadline:
                size = log.stat().st_size
                time.sleep(0.5)
        finally:
            job.kill()
    text = log.read_text()
    assert text.count("Current thread") == 5
    assert [line for line in text.splitlines() if _LINE.fullmatch(line) is None] == []
    assert text.count(" in deep") == 4 * 20 * 61
