"""Requests and replies of the verbs of a run and its attempts; `messages` has the table of all verbs.

Apart from the others because each call is a process of its own, which would make all these classes to say hello.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

from remote_payload.wire.plan import NodePlan
from remote_payload.wire.results import Finding
from remote_payload.wire.states import AttemptStatus, Decision, ProcessIdentity


@dataclasses.dataclass(frozen=True)
class PreflightRequest:
    """`plan` None checks the node alone (the doctor); else the checkpoint's header and the adapter too.

    `header` stands in for a checkpoint that is not on the node yet: header facts as `inspect` gives them, and then
    `plan.checkpoint_path` is not opened. `needed_bytes` is the space that the run is going to take under the root.
    `is_brief`: only what is told without importing anything: root, space, GPUs, and whether torch is there.
    """

    root: str
    gpu_policy: str = "auto"
    plan: Optional[NodePlan] = None
    timeout_s: float = 180.0
    header: Optional[dict[str, Any]] = None
    needed_bytes: int = 0
    is_brief: bool = False


@dataclasses.dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    total_bytes: int
    free_bytes: int
    foreign_processes: int = 0


@dataclasses.dataclass(frozen=True)
class Preflight:
    """Facts of the node and what is unfit. A finding of severity error refuses the run.

    `adapter_steps`: what of the adapter was looked at and is well, in words.
    """

    python_version: str
    torch_version: Optional[str]
    cuda_version: Optional[str]
    driver_version: Optional[str]
    gpus: tuple[Gpu, ...]
    free_bytes: int
    findings: tuple[Finding, ...]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    header: Optional[dict[str, Any]] = None
    adapter_steps: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ClaimRequest:
    root: str
    attempt: int
    nonce: str
    client: str
    plan: NodePlan


@dataclasses.dataclass(frozen=True)
class Claimed:
    """`nonce` is the claim's holder now: ours when `ours`."""

    ours: bool
    nonce: str
    machine_id: str


@dataclasses.dataclass(frozen=True)
class AttemptRef:
    root: str
    run_id: str
    attempt: int
    nonce: str


@dataclasses.dataclass(frozen=True)
class Launched:
    """`decision` None: the supervisor was started and has not decided yet; only reading tells what became of it."""

    decision: Optional[Decision]
    method: str


@dataclasses.dataclass(frozen=True)
class Decided:
    """`note` says in a sentence what was done beyond the decision, if anything."""

    decision: Optional[Decision]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class StatusRequest:
    """`offsets` maps a diagnostics file name (events.jsonl, stdout.log, …) to the first byte wanted."""

    root: str
    run_id: str
    attempt: int
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)
    max_bytes: int = 256 * 1024


@dataclasses.dataclass(frozen=True)
class StatusReply:
    """Everything that tells what became of an attempt, read at one time.

    `claim_nonce` None: no such attempt. `supervisor_alive` is None where it cannot be told from this machine (another
    machine id). `processes_with_nonce` are those whose command line names the attempt's nonce.
    `tails` maps file name to base64 of the bytes from the wanted offset on.
    """

    machine_id: str
    boot_id: str
    claim_nonce: Optional[str]
    claim_machine_id: Optional[str]
    decision: Optional[Decision]
    status: Optional[AttemptStatus]
    supervisor_alive: Optional[bool]
    processes_with_nonce: tuple[ProcessIdentity, ...]
    manifest_present: bool
    tails: dict[str, str] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ManifestEntry:
    """`path` is relative to the attempt's `artifacts/`."""

    path: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    entries: tuple[ManifestEntry, ...]
    complete: bool
    schema: int = 1
