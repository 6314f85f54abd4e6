"""provenance.json: where every number of a run comes from. Times and hosts stand here and nowhere else."""

from __future__ import annotations

import json
from typing import Any

import orchestrator
from orchestrator.fsutil import write_atomically
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.preflight import facts
from orchestrator.plan import SyncedCheckpoint, content_key
from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.run_messages import Preflight


def write_provenance(context: RunContext, checkpoint: SyncedCheckpoint) -> dict[str, Any]:
    """Write the document and return it."""
    plan, record = context.plan, context.record()
    key, exact = content_key(plan, checkpoint)
    attempt = record.current_attempt
    document: dict[str, Any] = {
        "client_version": orchestrator.__version__,
        "created_at": plan.created_at,
        "cluster": plan.cluster,
        "host": context.profile.host or "loopback",
        "checkpoint": to_json(checkpoint) | {"reference": str(plan.checkpoint)},
        "plan_key": plan.plan_key,
        "content_key": key,
        "content_key_is_exact": exact,
        "config": {"path": plan.config_path, "sha256": plan.config_sha256},
        "code": to_json(plan.code),
        "payload_sha256": plan.payload_sha256,
        "seed": plan.settings.seed,
        "dtype": plan.settings.dtype,
        "attempt": attempt.number if attempt else None,
        "stage_seconds": record.stage_seconds,
        "bytes_sent": checkpoint.bytes_sent,
        "logins": context.node.counts.logins,
    }
    if context.run.preflight.exists():
        report = from_json(Preflight, json.loads(context.run.preflight.read_text()))
        document["node"] = facts(report)
    write_atomically(context.run.provenance, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    return document
