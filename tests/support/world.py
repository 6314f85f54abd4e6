"""A person at a terminal: the command line as a process, a home of its own, and a cluster behind a real sshd."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.sshd import Sshd

CLI = [sys.executable, "-m", "orchestrator.cli"]
COMMAND_LIMIT_S = 120.0

JOB_CODE = '''\
"""Jobs that need no torch: what they do is seen in files beside the checkpoint."""

import os
import time

from remote_payload.wire.states import Phase


def _beside(context, name):
    return os.path.join(os.path.dirname(context.plan.checkpoint_path), name)


def count(context):
    with open(_beside(context, "launches.txt"), "a") as file:
        file.write(context.plan.run_id + "\\n")
    context.write_text("numbers.txt", "".join(f"{n}\\n" for n in range(20000)))
    print("counted \\x1b[31mred\\x1b]0;owned\\x07 and went on")
    return {"answer": 42}


def big(context):
    with open(_beside(context, "big.bin"), "rb") as file:
        context.write_bytes("big.bin", file.read())
    context.write_text("small.txt", "small\\n")


def wait(context):
    with open(_beside(context, "launches.txt"), "a") as file:
        file.write(context.plan.run_id + "\\n")
    for step in range(1200):
        context.progress(Phase.RUN, step, 1200, "waiting")
        if os.path.exists(_beside(context, "go")):
            context.write_text("done.txt", "waited\\n")
            return
        time.sleep(0.1)
    raise TimeoutError("nobody said go")


def fail(context):
    context.write_text("partial.txt", "as far as it got\\n")
    raise ValueError("this job fails")


def hang(context):
    context.progress(Phase.FIRST_BATCH)
    time.sleep(600)
'''


@dataclasses.dataclass
class World:
    """One user's home, one project, one cluster named `lab`."""

    home: Path
    project: Path
    node: Path
    sshd: Sshd
    profile: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "REMOTE_EVAL_HOME": str(self.home), "PYTHONPATH": str(Path(__file__).parents[2])}

    def cli(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CLI, *arguments],
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
            env=self.environment,
            cwd=cwd or self.project,
            stdin=subprocess.DEVNULL,
        )

    def json(self, *arguments: str, expect: int = 0) -> Any:
        done = self.cli(*arguments, "--json")
        assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def start(self, *arguments: str, cli: Sequence[str] = CLI) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*cli, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            cwd=self.project,
            stdin=subprocess.DEVNULL,
            # A shell starts its background jobs with SIGINT ignored, and that would be inherited all the way to here.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def killed_at(self, when: str, number: int, *arguments: str) -> str:
        """A client that dies `before` or `after` that entry of its journal is written; the id of its run."""
        killed = subprocess.run(
            [sys.executable, "-m", "tests.support.killing", when, str(number), "--", *arguments],
            capture_output=True,
            timeout=COMMAND_LIMIT_S,
            env=self.environment,
            cwd=self.project,
            stdin=subprocess.DEVNULL,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        return self.run_ids()[-1]

    def run_folder(self, run_id: str) -> Path:
        return self.home / "data" / "runs" / run_id

    def run_ids(self) -> list[str]:
        runs = self.home / "data" / "runs"
        return sorted(p.name for p in runs.iterdir()) if runs.exists() else []

    def launches(self) -> list[str]:
        path = self.node / "data" / "launches.txt"
        return path.read_text().splitlines() if path.exists() else []

    def with_torch(self) -> World:
        """The node's Python has torch from now on."""
        self.edit_profile(python={"path": sys.executable})
        return self

    def profile_field(self, name: str) -> Any:
        return yaml.safe_load(self.profile.read_text())[name]

    def edit_profile(self, **changes: Any) -> None:
        values = yaml.safe_load(self.profile.read_text())
        self.profile.write_text(yaml.safe_dump({**values, **changes}))

    def add_cluster(self, name: str, sshd: Sshd, node: Path, **changes: Any) -> None:
        """A second cluster, as the first but for its server, its root and its checkpoint root, all below `node`."""
        (node / "data").mkdir(parents=True)
        values = yaml.safe_load(self.profile.read_text())
        values.update(
            port=sshd.port,
            identity_files=[str(sshd.client_key)],
            known_hosts_file=str(sshd.known_hosts),
            node_root=str(node / "root of ours"),
            checkpoint_roots=[str(node / "data")],
            **changes,
        )
        self.profile.with_name(f"{name}.yaml").write_text(yaml.safe_dump(values))


def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    """Wait for a condition of another process; a bounded poll, since there is nothing to be woken by."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def agents_of(world: World) -> list[str]:
    """Command lines of the agents that carry streams, which outlive a killed client for a moment."""
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True, timeout=30).stdout
    return [line for line in listed.splitlines() if "agent stream" in line and str(world.node.parent) in line]


def digests(folder: Path) -> dict[str, str]:
    """Relative path → sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_world(tmp_path: Path, sshd: Sshd, small_checkpoint: Path, python: str) -> World:
    """The checkpoint stands at `data/best.pt` on the node and at `best.pt` in the project."""
    home, project, node = tmp_path / "home", tmp_path / "my project", tmp_path / "node"
    (node / "data").mkdir(parents=True)
    (node / "data" / "best.pt").write_bytes(small_checkpoint.read_bytes())
    jobs = project / "my_jobs"
    jobs.mkdir(parents=True)
    (jobs / "jobs.py").write_text(JOB_CODE)
    (project / "best.pt").write_bytes(small_checkpoint.read_bytes())
    names = ("big", "count", "wait", "fail", "hang")
    (project / "remote-eval.yaml").write_text(
        yaml.safe_dump({"cluster": "lab", "code": ["my_jobs"], "jobs": {n: f"my_jobs.jobs:{n}" for n in names}})
    )
    for folder in (project, tmp_path):
        folder.chmod(0o755)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "my_jobs", "remote-eval.yaml"], ["commit", "-q", "-m", "jobs"]):
        subprocess.run([*git, *command], cwd=project, check=True, timeout=30)
    profiles = home / "config" / "cluster_profiles"
    profiles.mkdir(parents=True)
    profile = profiles / "lab.yaml"
    profile.write_text(
        yaml.safe_dump(
            {
                "host": "127.0.0.1",
                "user": getpass.getuser(),
                "port": sshd.port,
                "identity_files": [str(sshd.client_key)],
                "known_hosts_file": str(sshd.known_hosts),
                "ssh_config_file": os.devnull,
                "node_root": str(node / "root of ours"),
                "python": {"path": python},
                "checkpoint_roots": [str(node / "data")],
                "retry": {"patience_s": 10},
                # A node's account would be the developer's own here, with that one's keys.
                "direct_copies": False,
            }
        )
    )
    return World(home, project, node, sshd, profile)
