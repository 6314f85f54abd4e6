"""preflight: is the node fit, is the checkpoint readable and whole, does it fit the adapter's model. Refuses early."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.errors import (
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    NodeUnfitError,
    RemoteEvalError,
    UnreachableError,
)
from orchestrator.fsutil import write_atomically
from orchestrator.inspection import inspect_local
from orchestrator.node import CLOCK_OFFSET_WARNING_S
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.elsewhere import inspect_on_source
from orchestrator.pipeline.locate import locate_in_place
from orchestrator.pipeline.resolve import fingerprint
from orchestrator.pipeline.sync import sync_code
from orchestrator.plan import RunPlan, SyncedCheckpoint, local_checkpoint, node_plan
from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.names import printable
from remote_payload.wire.results import Finding, Severity
from remote_payload.wire.run_messages import Preflight, PreflightRequest

PROBE_TIMEOUT_S = 180.0
_ANSWER_MARGIN_S = 30.0
_DAMAGED = ("checkpoint.truncated", "checkpoint.malformed")
_NO_CHECKPOINT = (
    "checkpoint.missing",
    "checkpoint.is_directory",
    "checkpoint.not_a_checkpoint",
    "checkpoint.unsupported",
)


def preflight(context: RunContext, meanwhile: Callable[[], None]) -> Preflight:
    """Check everything that can be checked before a job begins. Raises `NodeUnfitError`, `CheckpointError` or
    `IntegrityError` with what to do; lesser findings are shown and kept.

    `meanwhile` is called before the node is asked, which takes as long as its torch does to be imported, and begins
    what goes on beside that.
    """
    report = examine(context, meanwhile)
    report = dataclasses.replace(report, findings=(*report.findings, *_clock_findings(context)))
    write_atomically(context.run.preflight, (json.dumps(to_json(report), indent=1, sort_keys=True) + "\n").encode())
    for finding in report.findings:
        context.reporter.finding(finding)
    refuse_unfit(report.findings, is_health_only=_is_health_only(context.plan))
    return report


def refuse_at_once(context: RunContext, needed_bytes: int) -> None:
    """Raise what `preflight` is going to raise, as far as the node tells it without importing anything. For a thread
    beside `preflight`: over the connection that is there; raises `UnreachableError` where that is lost."""
    plan = node_plan(context.plan, SyncedCheckpoint("", None, needed_bytes, (), "local"))
    request = PreflightRequest(context.node.root, plan=plan, needed_bytes=needed_bytes, is_brief=True)
    report = context.node.call_if_connected("preflight", request, Preflight)
    if report is None:
        raise UnreachableError("the connection was lost before the node had answered")
    refuse_unfit(report.findings, is_health_only=_is_health_only(context.plan))


def examine(context: RunContext, meanwhile: Callable[[], None] = lambda: None) -> Preflight:
    """What the node finds of itself, the checkpoint's header and the adapter; the code is sent for it.

    Raises what `preflight` does for a checkpoint that is not on the node and whose header is bad.
    """
    plan, source = context.plan, context.source
    is_health_only = _is_health_only(plan)
    header, needed_bytes, is_there = None, 0, False
    if source is not None:
        checkpoint = locate_in_place(source, plan.checkpoint, plan.run_id)
        header = _header(lambda: inspect_on_source(source, checkpoint.path), is_health_only)
        needed_bytes = checkpoint.size
    elif plan.checkpoint.cluster is None:
        path = local_checkpoint(plan.checkpoint)
        header = _header(lambda: inspect_local(path), is_health_only)
        checkpoint = SyncedCheckpoint(str(path), None, fingerprint(path)[0], (), "local")
        needed_bytes = 0 if context.profile.embedded else checkpoint.size
    else:
        checkpoint, is_there = locate_in_place(context.node, plan.checkpoint, plan.run_id), True
    meanwhile()
    sync_code(context)
    request = PreflightRequest(
        context.node.root,
        gpu_policy=context.profile.gpu.device,
        plan=node_plan(plan, checkpoint) if header is not None or is_there else None,
        timeout_s=PROBE_TIMEOUT_S,
        header=header,
        needed_bytes=needed_bytes,
    )
    return context.node.call("preflight", request, Preflight, timeout_s=PROBE_TIMEOUT_S + _ANSWER_MARGIN_S)


def _is_health_only(plan: RunPlan) -> bool:
    return all(job.name == "health" for job in plan.jobs)


def _header(inspect: Callable[[], dict[str, Any]], is_health_only: bool) -> dict[str, Any] | None:
    """The header; None for a damaged file that goes to `health` alone. Refuses what the header gives away."""
    try:
        inspected = inspect()
    except IntegrityError:
        if not is_health_only:
            raise
        return None
    refuse_unfit([from_json(Finding, f) for f in inspected["findings"]], is_health_only=is_health_only)
    return dict(inspected["header"])


def refuse_unfit(findings: Sequence[Finding], *, is_health_only: bool) -> None:
    """Raise for the first finding of severity error.

    A damaged or hostile checkpoint does not stop a run of `health` alone: to say what is wrong with it is its work.
    """
    errors = [f for f in findings if f.severity is Severity.ERROR]
    if is_health_only:
        errors = [f for f in errors if f.id.startswith("node.") or f.id in _NO_CHECKPOINT]
    if not errors:
        return
    first = errors[0]
    kind: type[RemoteEvalError] = ConfigurationError
    if first.id.startswith("node."):
        kind = NodeUnfitError
    elif first.id.startswith("integrity.") or first.id in _DAMAGED:
        kind = IntegrityError
    elif first.id.startswith(("checkpoint.", "security.")):
        kind = CheckpointError
    is_damage = kind in (IntegrityError, CheckpointError) and first.id not in _NO_CHECKPOINT
    more = " `--jobs health` gives a report of the damage." if is_damage and not is_health_only else ""
    raise kind(
        f"{_text(first)}" + (f" (and {len(errors) - 1} more findings)" if len(errors) > 1 else ""),
        action=printable(first.action) + more,
        details="\n".join(_text(f) for f in errors[1:10]),
    )


def _text(finding: Finding) -> str:
    where = f" [{', '.join(finding.where[:5])}]" if finding.where else ""
    explanation = f": {finding.explanation}" if finding.explanation else ""
    return printable(f"{finding.id}: {finding.title}{where}{explanation}")


def _clock_findings(context: RunContext) -> list[Finding]:
    """Nothing here compares two machines' clocks; people who read times in logs do."""
    offset_s = context.node.clock_offset_s()
    if abs(offset_s) < CLOCK_OFFSET_WARNING_S:
        return []
    return [
        Finding(
            id="node.clock_offset",
            severity=Severity.WARNING,
            title=f"The node's clock is {offset_s:+.0f} s off this machine's",
            evidence={"offset_s": round(offset_s, 1)},
            action="Check NTP on both; times in logs and reports are the node's.",
        )
    ]


def facts(report: Preflight) -> dict[str, Any]:
    """What of a preflight belongs into provenance."""
    return {
        "python": report.python_version,
        "torch": report.torch_version,
        "cuda": report.cuda_version,
        "driver": report.driver_version,
        "gpus": [gpu.name for gpu in report.gpus],
    }
