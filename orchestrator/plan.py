"""From request to `RunPlan`: what will be done is fixed here, once, before anything is done."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import posixpath
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, UsageError
from orchestrator.profiles import ClusterProfile
from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.plan import (
    BUILTIN_JOBS,
    CodeSource,
    EvaluationSettings,
    JobSpec,
    NodePlan,
)


@dataclasses.dataclass(frozen=True)
class CheckpointReference:
    """A local path (`cluster` None), or a path on a cluster."""

    path: str
    cluster: str | None = None

    def __str__(self) -> str:
        return f"{self.cluster}:{self.path}" if self.cluster else self.path


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """One run, immutable.

    `profile` is the validated cluster profile as JSON, so that a later edit of the file cannot change a run under way;
    `source_profile` is that of the cluster where the checkpoint lies, if that is another one.
    `local_fingerprint` is [size, mtime_ns, inode] of a local checkpoint when it was planned. `plan_key` digests
    request, config, code and payload; equal keys mean equal work but for the checkpoint.
    """

    run_id: str
    created_at: str
    cluster: str
    profile: dict[str, Any]
    checkpoint: CheckpointReference
    jobs: tuple[JobSpec, ...]
    settings: EvaluationSettings
    payload_sha256: str
    plan_key: str
    config_path: str | None = None
    config_sha256: str | None = None
    project_folder: str | None = None
    code_paths: tuple[str, ...] = ()
    code: CodeSource | None = None
    nightly_target: str | None = None
    local_fingerprint: tuple[int, ...] = ()
    source_profile: dict[str, Any] | None = None
    schema: int = 1

    def cluster_profile(self) -> ClusterProfile:
        return ClusterProfile.model_validate(self.profile)

    def source_cluster_profile(self) -> ClusterProfile | None:
        return None if self.source_profile is None else ClusterProfile.model_validate(self.source_profile)

    def to_text(self) -> str:
        return json.dumps(to_json(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_text(cls, text: str) -> RunPlan:
        return from_json(cls, json.loads(text))


@dataclasses.dataclass(frozen=True)
class SyncedCheckpoint:
    """Where the checkpoint stands on the node and what it is: its digest, else [size, mtime_ns, inode].

    `source_path` and `source_fingerprint` say the same of the other node that it was read on, if there was one.
    `is_complete` False: header and weights are there, and `path` is where it will stand in full.
    """

    path: str
    digest: str | None
    size: int
    fingerprint: tuple[int, ...]
    how: str
    bytes_sent: int = 0
    source_path: str | None = None
    source_fingerprint: tuple[int, ...] = ()
    is_complete: bool = True


def parse_reference(text: str, *, exists_here: bool) -> CheckpointReference:
    """`CLUSTER:path`, else a local path. A local file whose name holds a colon wins where it exists."""
    head, colon, tail = text.partition(":")
    if exists_here or not head or not colon or "/" in head:
        return CheckpointReference(text)
    if not tail:
        raise CheckpointError("the checkpoint reference has no path", action=f"Write {head}:PATH.")
    return CheckpointReference(tail, head)


def node_path(reference: CheckpointReference, roots: list[str]) -> str:
    """The path to ask the node for: absolute and `~` as they are, a relative one below the first checkpoint root."""
    if reference.path.startswith(("/", "~")):
        return reference.path
    return posixpath.join(roots[0] if roots else "~", reference.path)


def choose_jobs(asked: list[str] | None, project_jobs: Mapping[str, str]) -> tuple[JobSpec, ...]:
    """The jobs to run: those asked for, else the built-in ones and all of the project's."""
    known = {name: JobSpec(name) for name in BUILTIN_JOBS}
    known.update({name: JobSpec(name, entry) for name, entry in project_jobs.items()})
    chosen = list(known) if asked is None else asked
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        what = f"there is no job named {unknown[0]!r}" if unknown else "no job was asked for"
        raise UsageError(what, action=f"Known jobs: {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(chosen))


def new_run_id(now: datetime.datetime) -> str:
    """Sorts by time; unique without asking anybody."""
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def plan_key(
    *,
    jobs: tuple[JobSpec, ...],
    settings: EvaluationSettings,
    code: CodeSource | None,
    payload_sha256: str,
    gpu_device: str,
) -> str:
    """SHA-256 over what decides the results, but for the checkpoint; times, hosts and names do not count."""
    value = {
        "jobs": to_json(jobs),
        "settings": to_json(settings),
        "code": code.archive_sha256 if code else None,
        "payload": payload_sha256,
        "device": gpu_device,
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_key(plan: RunPlan, checkpoint: SyncedCheckpoint) -> tuple[str, bool]:
    """(key, exact): plan key and checkpoint digest; a fingerprint stands in where no digest is known (exact False)."""
    identity = checkpoint.digest or f"fingerprint:{checkpoint.path}:{checkpoint.fingerprint}"
    text = f"{plan.plan_key}:{identity}"
    return hashlib.sha256(text.encode()).hexdigest(), checkpoint.digest is not None


def node_plan(plan: RunPlan, checkpoint: SyncedCheckpoint) -> NodePlan:
    """What the node is told, once it is known where the checkpoint stands there."""
    profile = plan.cluster_profile()
    return NodePlan(
        run_id=plan.run_id,
        payload_sha256=plan.payload_sha256,
        # Those that can begin while the rest of the checkpoint is still being sent.
        jobs=tuple(sorted(plan.jobs, key=lambda job: (not job.reads_weights_only, not job.reads_as_it_arrives))),
        checkpoint_path=checkpoint.path,
        settings=plan.settings,
        gpu=profile.gpu_policy(),
        overrun=profile.overrun_policy(),
        checkpoint_digest=checkpoint.digest,
        checkpoint_fingerprint=checkpoint.fingerprint,
        code=plan.code,
        plan_key=plan.plan_key,
        niceness=profile.niceness,
    )


def local_checkpoint(reference: CheckpointReference) -> Path:
    """The local file or folder, checked to be one. Raises `CheckpointError`."""
    path = Path(reference.path).expanduser()
    if not path.exists():
        raise CheckpointError(f"there is no file at {path}", action="Check --checkpoint, or write CLUSTER:path.")
    if not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path} is neither a regular file nor a folder")
    return path.absolute()
