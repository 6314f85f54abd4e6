"""A node root and the real payload on this machine: tests speak to the agent as the client does, one process a call."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.layout import LocalLayout
from orchestrator.payload import build_payload
from remote_payload.agent import machine
from remote_payload.wire import PROTOCOL_VERSION, frames
from remote_payload.wire.codec import from_json
from remote_payload.wire.layout import AttemptLayout, NodeLayout
from remote_payload.wire.states import ProcessIdentity

PATIENCE_S = 60.0


@functools.cache
def oldest_python() -> str | None:
    """A Python 3.9 of this machine, the oldest that the payload promises to run on."""
    installed = sorted(map(str, Path.home().glob(".pyenv/versions/3.9.*/bin/python")))
    for path in filter(None, (os.environ.get("REMOTE_EVAL_PYTHON39"), shutil.which("python3.9"), *installed)):
        # A version manager's shim is there and does not work.
        answer = subprocess.run(
            [path, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, timeout=60
        )
        if answer.stdout.strip() == b"(3, 9)":
            return path
    return None


def interpreters() -> list[str]:
    """The tests' own Python and a 3.9. CI must have one; elsewhere the tests run with what is there."""
    oldest = oldest_python()
    if oldest is None and os.environ.get("CI"):
        raise RuntimeError("CI has no Python 3.9, the oldest that a node may have: set REMOTE_EVAL_PYTHON39")
    return [sys.executable, *filter(None, [oldest])]


def interpreter_name(path: str) -> str:
    return "this-python" if path == sys.executable else "python3.9"


class AgentFailure(Exception):
    """The agent's reply was an error."""

    def __init__(self, failure: dict[str, str]) -> None:
        super().__init__(failure["message"])
        self.kind = failure["kind"]
        self.action = failure["action"]


class AgentNode:
    """One node root, spoken to through the zipapp."""

    def __init__(
        self,
        base: Path,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        root: Path | None = None,
    ) -> None:
        self.base = base
        self.python = python
        self.environment = {**os.environ, **(environment or {})}
        self.payload = build_payload(LocalLayout(base / "data", base / "config", base / "cache"))
        self.root = str(root or base / "node root")
        self.layout = NodeLayout(self.root)

    def command(self, *arguments: str) -> list[str]:
        return [self.python, str(self.payload.path), *arguments]

    def start_call(self, verb: str, params: dict[str, Any], protocol: int = PROTOCOL_VERSION) -> Call:
        nonce = secrets.token_hex(16)
        request = {"verb": verb, "nonce": nonce, "protocol": protocol, "params": {"root": self.root, **params}}
        return Call(
            nonce,
            subprocess.Popen(
                self.command("agent", "call", frames.encode_request(request)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self.environment,
            ),
        )

    def call(self, verb: str, **params: Any) -> Any:
        return self.start_call(verb, params).result()

    def ship(self, modules: Mapping[str, str]) -> str:
        """Unpack user code on the node and return its archive's sha256."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, source in modules.items():
                info = tarfile.TarInfo(name)
                info.size = len(source.encode())
                archive.addfile(info, io.BytesIO(source.encode()))
        path = self.base / "code.tar"
        path.write_bytes(buffer.getvalue())
        sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
        self.call("unpack_code", archive_path=str(path), sha256=sha256)
        return sha256

    def plan(self, run_id: str, code: Mapping[str, str], jobs: Mapping[str, str], **changes: Any) -> dict[str, Any]:
        """A plan of user jobs, `{name: module:function}`, on the CPU."""
        return {
            "run_id": run_id,
            "payload_sha256": self.payload.sha256,
            "jobs": [{"name": name, "entry": entry} for name, entry in jobs.items()],
            "checkpoint_path": "/nowhere/checkpoint.pt",
            "settings": {},
            "gpu": {"device": "cpu"},
            "overrun": {"budgets_s": {}, "cancel_grace_s": 5.0},
            "code": {"archive_sha256": self.ship(code)},
            **changes,
        }

    def claim(self, plan: dict[str, Any], attempt: int = 1) -> Attempt:
        nonce = secrets.token_hex(16)
        claimed = self.call("claim", attempt=attempt, nonce=nonce, client="tests", plan=plan)
        assert claimed["ours"]
        return Attempt(self, plan["run_id"], attempt, nonce)

    def start(self, source: str, jobs: Mapping[str, str] | None = None, **changes: Any) -> Attempt:
        """Claim and launch a run of one module `work.py`, by default its function `run` as the job `work`."""
        plan = self.plan("run-" + secrets.token_hex(4), {"work.py": source}, jobs or {"work": "work:run"}, **changes)
        attempt = self.claim(plan)
        attempt.launch()
        return attempt

    def end_everything(self) -> None:
        """End what a failed test left running: only processes that a truth or decision file here names exactly."""
        for path in Path(self.layout.runs).glob("*/attempt-*/*"):
            if path.name not in ("status.json", "decision"):
                continue
            with contextlib.suppress(ValueError, OSError, ProcessLookupError):
                document = json.loads(path.read_text())
                for found in (document.get("supervisor"), *_job_processes(document)):
                    if found and machine.is_alive(from_json(ProcessIdentity, found)):
                        os.kill(found["pid"], signal.SIGKILL)


def _job_processes(document: dict[str, Any]) -> list[Any]:
    return [job.get("process") for job in document.get("jobs", {}).values()]


class Call:
    """One agent process under way."""

    def __init__(self, nonce: str, process: subprocess.Popen[bytes]) -> None:
        self.nonce = nonce
        self.process = process

    def result(self) -> Any:
        stdout, stderr = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, stderr.decode()
        protocol, reply, _ = frames.decode_reply(self.nonce, stdout)
        assert protocol == PROTOCOL_VERSION
        if "error" in reply:
            raise AgentFailure(reply["error"])
        return reply["ok"]


class Attempt:
    """One claimed attempt."""

    def __init__(self, node: AgentNode, run_id: str, number: int, nonce: str) -> None:
        self.node = node
        self.run_id = run_id
        self.number = number
        self.nonce = nonce

    @property
    def ref(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "attempt": self.number, "nonce": self.nonce}

    @property
    def layout(self) -> AttemptLayout:
        return self.node.layout.attempt(self.run_id, self.number)

    def launch(self) -> Any:
        return self.node.call("launch", **self.ref)

    def void(self) -> Any:
        return self.node.call("void", **self.ref)

    def cancel(self) -> Any:
        return self.node.call("cancel", **self.ref)

    def status(self, **offsets: int) -> Any:
        wanted = {name.replace("_", "."): offset for name, offset in offsets.items()}
        return self.node.call("status", run_id=self.run_id, attempt=self.number, offsets=wanted)

    def truth(self) -> dict[str, Any]:
        """The truth file as it stands, read without the agent."""
        document: dict[str, Any] = json.loads(Path(self.layout.status).read_text())
        return document

    def events(self) -> list[dict[str, Any]]:
        lines = Path(self.layout.events).read_text().splitlines()
        return [json.loads(line) for line in lines if line]

    def event(self, name: str) -> dict[str, Any]:
        return next(event for event in self.events() if event["event"] == name)

    def artifact(self, name: str) -> Path:
        return Path(self.layout.artifacts) / name

    def log(self, name: str) -> str:
        reply = self.node.call("status", run_id=self.run_id, attempt=self.number, offsets={name: 0})
        return base64.b64decode(reply["tails"][name]).decode()

    def wait_for(self, condition: str, check: Any) -> Any:
        """Poll until `check()` is true, and return what it gave. A failure shows what the supervisor said."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = check()
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"not within {PATIENCE_S} s: {condition}\n{self._all_words()}")

    def wait_for_phase(self, phase: str) -> Any:
        return self.wait_for(f"a job in phase {phase}", lambda: self._job_in(phase))

    def wait_for_end(self) -> dict[str, Any]:
        """Until the terminal record stands, and the supervisor is gone."""

        def ended() -> dict[str, Any] | None:
            if not Path(self.layout.status).exists():
                return None
            truth = self.truth()
            supervisor = from_json(ProcessIdentity, truth["supervisor"])
            return truth if truth["state"] != "running" and not machine.is_alive(supervisor) else None

        found: dict[str, Any] = self.wait_for("a terminal record", ended)
        return found

    def _job_in(self, phase: str) -> Any:
        if not Path(self.layout.status).exists():
            return None
        running = [job for job in self.truth()["jobs"].values() if job["state"] == "running" and job["phase"] == phase]
        return running[0] if running else None

    def _all_words(self) -> str:
        words = []
        for path in (*self.layout.diagnostics, self.layout.claim, self.layout.decision):
            if Path(path).exists():
                words.append(f"--- {path}\n{Path(path).read_text(errors='replace')[-3000:]}")
        return "\n".join(words)


@contextlib.contextmanager
def agent_node(
    base: Path,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    root: Path | None = None,
) -> Iterator[AgentNode]:
    """A fresh node that ends with everything that was started on it."""
    node = AgentNode(base, python, environment, root)
    node.call("hello")
    try:
        yield node
    finally:
        node.end_everything()
