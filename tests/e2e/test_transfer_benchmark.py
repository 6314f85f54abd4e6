"""The benchmark of transfers as a user runs it: figures in RESULTS.md can be made again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PATIENCE_S = 240.0
PROJECT = Path(__file__).resolve().parents[2]


def test_the_transfer_benchmark_prints_a_row_for_us_and_for_what_a_user_would_do_instead(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.transfer", "--size", "8M", "--scenarios", "loopback", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")}
    assert {"remote-eval", "ssh cat", "scp", "paramiko put"} <= rows
