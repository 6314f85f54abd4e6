"""Is this node fit for the run: asks a child process, which may hang in torch without taking the agent with it."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import tempfile
import time
from typing import Any, BinaryIO, Optional

from remote_payload.agent import environment, own_code, root, sessions
from remote_payload.agent.child import Child, describe_exit
from remote_payload.agent.files import json_bytes, parse_json
from remote_payload.agent.progress import LineReader
from remote_payload.wire.codec import WireError, from_json, to_json
from remote_payload.wire.names import printable
from remote_payload.wire.results import Finding, Severity
from remote_payload.wire.run_messages import Preflight, PreflightRequest

STACKS_FD_VARIABLE = "REMOTE_EVAL_STACKS_FD"
REQUEST_FD_VARIABLE = "REMOTE_EVAL_REQUEST_FD"
_MAX_LINE_BYTES = 64 * 1024 * 1024
_MAX_STDERR_BYTES = 64 * 1024
_STACKS_WAIT_S = 5.0
_TELL_S = 0.1
_BLAMED = {
    "torch": ("node.torch_import_hangs", "node.torch_import_fails", "Importing torch"),
    "adapter": ("adapter.check_hangs", "adapter.check_died", "The check of the adapter"),
}
_NODE = ("node.probe_hangs", "node.probe_died", "The check of the node")
_MAX_TIMEOUT_S = 3600.0


def preflight(request: PreflightRequest) -> Preflight:
    """What the probe found, and a finding where it hung or died, with the phase, its stacks and its last words."""
    layout = root.open_root(request.root)
    probe = _Probe(layout.root, request)
    ending = probe.run(min(max(request.timeout_s, 1.0), _MAX_TIMEOUT_S))
    result = probe.result or Preflight(sys.version.split()[0], None, None, None, (), root.free_bytes(layout.root), ())
    more = [found for found in (ending, sessions.finding(sessions.session_rules())) if found is not None]
    return dataclasses.replace(result, findings=(*result.findings, *more))


class _Probe:
    """One run of the probe. It reports on its progress pipe: `{"phase": name}` and `{"result": Preflight so far}`."""

    def __init__(self, folder: str, request: PreflightRequest) -> None:
        self._folder = folder
        self._request = request
        self._lines = LineReader(_MAX_LINE_BYTES)
        self._stderr = b""
        self.phase = "start"
        self.result: Optional[Preflight] = None

    def run(self, timeout_s: float) -> Optional[Finding]:
        with tempfile.TemporaryFile() as stacks, tempfile.TemporaryFile() as question:
            question.write(json_bytes(to_json(self._request)))
            question.flush()
            question.seek(0)
            child = Child(
                [*own_code.command(), "probe"],
                environment={
                    **environment.for_job(os.environ),
                    STACKS_FD_VARIABLE: str(stacks.fileno()),
                    REQUEST_FD_VARIABLE: str(question.fileno()),
                },
                folder=self._folder,
                stdout=_ignore,
                stderr=self._keep_stderr,
                progress=self._take,
                keep_open=(stacks.fileno(), question.fileno()),
            )
            hung = not self._await(child, timeout_s)
            dumped = _ask_for_stacks(child, stacks) if hung else ""
            if hung:
                child.stop(1.0)
            returncode = child.close()
        if hung:
            return self._hung(timeout_s, dumped)
        return None if returncode == 0 else self._died(returncode)

    def _await(self, child: Child, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not child.has_ended():
            if time.monotonic() > deadline:
                return False
            child.pump(_TELL_S)
        return True

    def _keep_stderr(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[-_MAX_STDERR_BYTES:]

    def _take(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            try:
                value: Any = parse_json(line)
                if isinstance(value, dict) and isinstance(value.get("phase"), str):
                    self.phase = value["phase"][:40]
                if isinstance(value, dict) and "result" in value:
                    self.result = from_json(Preflight, value["result"])
            except (WireError, ValueError):
                continue

    def _hung(self, timeout_s: float, stacks: str) -> Finding:
        hangs, _, what = _BLAMED.get(self.phase, _NODE)
        return Finding(
            id=hangs,
            severity=Severity.ERROR,
            title=f"{what} hangs on this node",
            evidence={"phase": self.phase, "limit_s": timeout_s, "stacks": stacks, "stderr": self._words()},
            explanation=f"No end within {timeout_s:g} s, in the phase {self.phase!r}; the stacks show where it waits.",
            action="Look at the stacks: a slow or full file system, a stale lock file, or a driver that is stuck.",
        )

    def _died(self, returncode: Optional[int]) -> Finding:
        _, died, what = _BLAMED.get(self.phase, _NODE)
        return Finding(
            id=died,
            severity=Severity.ERROR,
            title=f"{what} ended the process: {describe_exit(returncode)}",
            evidence={"phase": self.phase, "stderr": self._words()},
            action="Run the profile's Python on the node and import torch there.",
        )

    def _words(self) -> str:
        return printable(self._stderr.decode("utf-8", "replace"))[-4000:]


def _ask_for_stacks(child: Child, stacks: BinaryIO) -> str:
    child.signal_child(signal.SIGUSR1)
    deadline = time.monotonic() + _STACKS_WAIT_S
    size, settled_at = 0, deadline
    while time.monotonic() < min(deadline, settled_at):
        child.pump(0.05)
        now_size = os.fstat(stacks.fileno()).st_size
        if now_size != size:
            size, settled_at = now_size, time.monotonic() + 0.3
    return printable(os.pread(stacks.fileno(), 64 * 1024, 0).decode("utf-8", "replace"))


def _ignore(_data: bytes) -> None:
    return None
