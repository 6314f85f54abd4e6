"""Our side as a process of its own: what `remote-eval` does to get a checkpoint to a node, and what it cost.

    python -m benchmarks.transfer_ours SITE.json FILE [--jobs health,reconstruct]

Prints `moved BYTES` lines while it goes on, and at the end one line of JSON, an `Outcome`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import getpass
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.transfer_site import Site
from orchestrator.cli import leave_at_once
from orchestrator.layout import LocalLayout
from orchestrator.payload import build_payload
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.sync import file_ahead, sync_checkpoint
from orchestrator.pipeline.world import make_services
from orchestrator.plan import CheckpointReference, RunPlan, new_run_id
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.settings import RetryNotice
from orchestrator.transfer.progress import TransferProgress
from remote_payload.wire.plan import EvaluationSettings, JobSpec
from remote_payload.wire.results import Finding
from remote_payload.wire.states import AttemptStatus


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`read_bytes`: what this process read of anything, by /proc/self/io. `peak_bytes`: its largest resident set."""

    seconds: float
    how: str
    bytes_sent: int
    read_bytes: int
    peak_bytes: int
    most_streams: int


class _Teller:
    """A `Reporter` that tells the parent how far it is."""

    def __init__(self) -> None:
        self.most_streams = 0

    def transfer(self, what: str, progress: TransferProgress) -> None:  # noqa: ARG002 - there is only the checkpoint
        self.most_streams = max(self.most_streams, progress.streams)
        print(f"moved {progress.bytes_done}", flush=True)

    def retry(self, notice: RetryNotice) -> None:
        print(f"retry {notice.reason}", file=sys.stderr, flush=True)

    def stage(self, name: str) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def finding(self, finding: Finding) -> None: ...

    def attempt(self, status: AttemptStatus) -> None: ...


def describe(site: Site) -> dict[str, Any]:
    """What this process needs to know of a site."""
    return {
        "home": str(site.home),
        "profile": {
            "host": site.link.address,
            "user": getpass.getuser(),
            "port": site.port,
            "identity_files": [str(site.key)],
            "ssh_config_file": os.devnull,
            "known_hosts_file": str(site.known_hosts),
            "node_root": str(site.node_root),
            "python": {"path": sys.executable},
            "retry": {"patience_s": 60, "longest_wait_s": 2},
        },
    }


def send(site: dict[str, Any], file: Path, jobs: tuple[str, ...]) -> Outcome:
    """Sync `file` as a run of `jobs` would."""
    began = time.monotonic()
    home, profile = Path(site["home"]), ClusterProfile.model_validate(site["profile"])
    layout = LocalLayout(home / "data", home / "config", home / "cache")
    teller = _Teller()
    services = make_services(layout, teller, lambda *_: None)
    payload = build_payload(layout)
    now = datetime.datetime.now(datetime.timezone.utc)
    plan = RunPlan(
        run_id=new_run_id(now),
        created_at=now.isoformat(timespec="seconds"),
        cluster="site",
        profile=profile.model_dump(mode="json", by_alias=True),
        checkpoint=CheckpointReference(str(file)),
        jobs=tuple(JobSpec(name) for name in jobs),
        settings=EvaluationSettings(),
        payload_sha256=payload.sha256,
        plan_key="0" * 64,
    )
    with services.open_node(profile, payload) as node:
        context = RunContext(plan, layout.run(plan.run_id), profile, node, services)
        with file_ahead(context) as ahead:
            synced = sync_checkpoint(context, ahead)
    return Outcome(
        time.monotonic() - began,
        synced.how,
        synced.bytes_sent,
        _own("io", "rchar:"),
        # Not getrusage's, which counts what the parent held when it was forked.
        _own("status", "VmHWM:") * 1024,
        teller.most_streams,
    )


def _own(file: str, name: str) -> int:
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def main() -> None:
    leave_at_once()  # as the command does
    parser = argparse.ArgumentParser()
    parser.add_argument("site", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--jobs", default="health,reconstruct")
    asked = parser.parse_args()
    outcome = send(json.loads(asked.site.read_text()), asked.file, tuple(asked.jobs.split(",")))
    print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
