"""Asking the system's own small commands, for a bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Optional

_PLAIN = {"LC_ALL": "C", "LANG": "C", "TZ": "UTC"}


def ask(command: Sequence[str], timeout_s: float) -> Optional[str]:
    """Standard output of `command`, or None if it is absent, fails or does not answer within `timeout_s`.

    A command that even SIGKILL cannot end (a driver that is stuck) is left behind: nobody waits for it.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_PLAIN},
            start_new_session=True,
        )
    except OSError:
        return None
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill_and_forget(process)
        return None
    return output.decode("utf-8", "replace") if process.returncode == 0 else None


def _kill_and_forget(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=1.0)
    except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        return
