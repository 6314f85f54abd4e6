"""The driver: takes a run from wherever its journal says it stands to its report."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from orchestrator.errors import (
    AttemptLostError,
    JobCancelledError,
    JobFailedError,
    RemoteEvalError,
    UsageError,
)
from orchestrator.fsutil import exclusive_lock
from orchestrator.journal import AttemptRecord, RunRecord
from orchestrator.layout import LocalLayout
from orchestrator.payload import payload_for
from orchestrator.pipeline import collect as collecting
from orchestrator.pipeline import follow as following
from orchestrator.pipeline import launch as launching
from orchestrator.pipeline import sync as syncing
from orchestrator.pipeline.assess import Standing
from orchestrator.pipeline.context import RunContext, Services
from orchestrator.pipeline.locate import was_freed
from orchestrator.pipeline.preflight import preflight, refuse_at_once
from orchestrator.pipeline.provenance import write_provenance
from orchestrator.plan import RunPlan, SyncedCheckpoint
from orchestrator.transfer.direct import DirectWay
from remote_payload.wire.codec import WireError, from_json, to_json
from remote_payload.wire.names import check_run_id, printable
from remote_payload.wire.run_messages import Decided, StatusReply
from remote_payload.wire.states import AttemptState, AttemptStatus

_LOG_TAIL_BYTES = 3000


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """A run that reached its report. `results` is the content of results.json."""

    plan: RunPlan
    results: dict[str, Any]


def load_plan(run_id: str, layout: LocalLayout) -> RunPlan:
    """The plan of a known run. Raises `UsageError` for an unknown or unreadable one."""
    try:
        text = layout.run(check_run_id(run_id)).plan.read_text()
    except (WireError, FileNotFoundError):
        raise UsageError(f"there is no run {run_id!r} here", action="`remote-eval history` lists runs.") from None
    try:
        return RunPlan.from_text(text)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"the plan of {run_id} cannot be read: {error}", action="Was it made by a newer version?"
        ) from error


def open_run(plan: RunPlan, services: Services) -> RunContext:
    """A context for stages; nothing is connected yet."""
    profile, elsewhere = plan.cluster_profile(), plan.source_cluster_profile()
    if services.bandwidth_limit_mbps is not None:
        # Where this command runs now may be another network than the one the run was begun in.
        limit = {"bandwidth_limit_mbps": services.bandwidth_limit_mbps}
        profile = profile.model_copy(update=limit)
        elsewhere = elsewhere.model_copy(update=limit) if elsewhere is not None else None
    payload = payload_for(plan.payload_sha256, services.layout)
    node = services.open_node(profile, payload)
    source, way = None, None
    if elsewhere is not None:
        source = services.open_node(elsewhere, payload)
        names = (plan.checkpoint.cluster or "the other node", plan.cluster)
        way = DirectWay(source, node, names, services.reporter.note)
    return RunContext(plan, services.layout.run(plan.run_id), profile, node, services, source, way)


def advance(
    plan: RunPlan,
    services: Services,
    *,
    detach: bool = False,
    retry: bool = False,
) -> RunOutcome | None:
    """Do every stage that is still to be done. None when `detach` was asked for and the job is under way.

    `retry` starts a new attempt where the last one ended without success. Raises `JobFailedError` and its kin after the
    report is written, `UnreachableError` where the run is paused, `LockedError` where another client is at this run.
    """
    run = services.layout.run(plan.run_id)
    with exclusive_lock(run.lock, plan.run_id):
        context = open_run(plan, services)
        try:
            with context:
                return _advance(context, detach, retry)
        except RemoteEvalError as error:
            context.note_entry(
                "stopped",
                error=type(error).__name__,
                cause=str(error),
                action=error.action,
                exit_code=int(error.exit_code),
            )
            raise


def cancel(plan: RunPlan, services: Services) -> AttemptStatus | None:
    """Ask the supervisor to end the attempt and wait for its terminal record; None where nothing had started."""
    context = open_run(plan, services)
    attempt = context.record().current_attempt
    if attempt is None:
        return None
    with context:
        ref = launching.reference(context, attempt)
        if attempt.fate == "intended":
            decided = context.node.call("void", ref, Decided)
            if decided.decision is not None and decided.decision.value == "void":
                context.note_entry("void", attempt=attempt.number, nonce=attempt.nonce)
                return None
        context.node.call("cancel", ref, Decided)
        return following.follow(context, attempt)


def read_node_status(plan: RunPlan, services: Services, offsets: dict[str, int] | None = None) -> StatusReply | None:
    """One reading of the current attempt; None where none was launched."""
    context = open_run(plan, services)
    attempt = context.record().current_attempt
    if attempt is None:
        return None
    with context:
        return launching.read_status(context, attempt, offsets)


def _advance(context: RunContext, detach: bool, retry: bool) -> RunOutcome | None:
    record = context.record()
    if retry:
        _refuse_retry_of_success(record)
    checkpoint = _ensure_synced(context, record, retry, may_start_early=not detach)
    attempt = _ensure_launched(context, checkpoint, record, retry)
    if attempt.fate == "lost":
        lost: AttemptLostError | None = following.lost_error(context.plan.run_id, Standing.ABSENT)
    else:
        checkpoint = _ensure_complete(context, checkpoint, attempt)
        context.node.drop_prepared_streams()  # what is left of them would wait as long as the job runs
        if detach and attempt.fate == "launched":
            context.note_entry("detached", attempt=attempt.number)
            return None
        lost = _follow(context, attempt)
    if context.record().collected != attempt.number:
        with context.stage("collect"):
            collecting.collect(context, attempt, is_final=True)
    write_provenance(context, checkpoint)
    with context.stage("report"):
        results = _report(context, attempt, lost)
    context.note_entry("reported", verdict=results["verdict"]["overall"])
    if lost is not None:
        raise lost
    _raise_for(context, attempt)
    return RunOutcome(context.plan, results)


def _report(context: RunContext, attempt: AttemptRecord, lost: AttemptLostError | None) -> dict[str, Any]:
    # Imported when used: templates and all take as long as logging in, before which nobody needs them.
    from orchestrator.pipeline.reporting import report
    from orchestrator.report import AttemptOutcome

    return report(context, AttemptOutcome(attempt.number, "lost", str(lost)) if lost is not None else None)


def _refuse_retry_of_success(record: RunRecord) -> None:
    current = record.current_attempt
    if current is not None and current.state == AttemptState.SUCCEEDED.value:
        raise UsageError("the last attempt succeeded; there is nothing to retry", action="Start a new run instead.")


def _ensure_synced(context: RunContext, record: RunRecord, retry: bool, *, may_start_early: bool) -> SyncedCheckpoint:
    known = record.synced or record.synced_partly
    if known is not None:
        checkpoint = from_json(SyncedCheckpoint, known)
        # Whether a part is still there in full is seen by sending it again: that costs nothing where it is.
        if not _launch_is_due(record, retry) or (checkpoint.is_complete and not was_freed(context, checkpoint)):
            return checkpoint
    with syncing.file_ahead(context) as ahead:
        with context.stage("preflight"):
            preflight(context, lambda: ahead.begin(functools.partial(refuse_at_once, context)))
        with context.stage("sync"):
            checkpoint = syncing.sync_checkpoint(context, ahead, may_start_early=may_start_early)
    context.note_entry("synced" if checkpoint.is_complete else "synced_partly", **to_json(checkpoint))
    return checkpoint


def _ensure_complete(context: RunContext, checkpoint: SyncedCheckpoint, attempt: AttemptRecord) -> SyncedCheckpoint:
    """Send what an attempt under way does not have yet of its checkpoint, and needs; not once it has failed."""
    needs_all = not all(job.reads_weights_only for job in context.plan.jobs)
    if checkpoint.is_complete or not needs_all or attempt.fate != "launched":
        return checkpoint
    with context.stage("sync"), following.Watch(context, attempt) as watch:
        try:
            whole = syncing.send_rest(context, checkpoint, watch.show)
        except following.AttemptEndedError:
            context.reporter.note("the attempt has ended: what was not sent of the checkpoint is not needed now")
            return checkpoint
    context.note_entry("synced", **to_json(whole))
    return whole


def _ensure_launched(
    context: RunContext, checkpoint: SyncedCheckpoint, record: RunRecord, retry: bool
) -> AttemptRecord:
    current = record.current_attempt
    if current is not None and not _launch_is_due(record, retry):
        return current
    with context.stage("launch"):
        launching.launch(context, checkpoint)
    launched = context.record().current_attempt
    if launched is None:
        raise UsageError(f"{context.plan.run_id} has no attempt")
    return launched


def _launch_is_due(record: RunRecord, retry: bool) -> bool:
    current = record.current_attempt
    if current is None or current.fate in ("intended", "void"):
        return True
    return retry and current.fate in ("terminal", "lost")


def _follow(context: RunContext, attempt: AttemptRecord) -> AttemptLostError | None:
    if attempt.fate == "terminal":
        return None
    try:
        with context.stage("follow"):
            following.follow(context, attempt)
    except AttemptLostError as error:
        return error
    return None


def _raise_for(context: RunContext, attempt: AttemptRecord) -> None:
    status = from_json(AttemptStatus, json.loads((context.run.diagnostics / "status.json").read_text()))
    if status.state is AttemptState.SUCCEEDED:
        return
    if status.state is AttemptState.CANCELLED:
        raise JobCancelledError(
            f"{context.plan.run_id} was cancelled",
            action=f"`remote-eval resume {context.plan.run_id} --retry` starts anew.",
        )
    causes = [
        f"{name}: {job.error or job.state.value}" for name, job in status.jobs.items() if job.state.value == "failed"
    ]
    stderr = context.run.diagnostics / "stderr.log"
    tail = stderr.read_bytes()[-_LOG_TAIL_BYTES:] if stderr.exists() else b""
    raise JobFailedError(
        printable("; ".join(causes) or status.cause or f"attempt {attempt.number} failed"),
        action=f"Logs, stacks and partial results are in {context.run.folder}.",
        details=printable(tail.decode(errors="replace")),
    )
