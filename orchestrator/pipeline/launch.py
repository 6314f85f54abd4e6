"""launch: claim an attempt and start its supervisor, exactly once, whatever gets lost on the way.

The intent with its nonce is journalled first. Claim and launch are repeatable with the same nonce: the attempt folder
is claimed by one rename, and one supervisor creates `decision`. So after any crash or lost reply, reading and repeating
cannot start a second one. An attempt that nobody started is made void before the next is claimed.
"""

from __future__ import annotations

import getpass
import platform
import secrets
import time

from orchestrator.errors import InternalError, LockedError, NodeUnfitError
from orchestrator.journal import AttemptRecord
from orchestrator.pipeline.assess import Standing, assess
from orchestrator.pipeline.context import RunContext
from orchestrator.plan import SyncedCheckpoint, node_plan
from orchestrator.schedulers.base import scheduler_for
from remote_payload.wire.run_messages import (
    AttemptRef,
    Claimed,
    ClaimRequest,
    Decided,
    Launched,
    StatusReply,
    StatusRequest,
)
from remote_payload.wire.states import Decision

DECISION_WAIT_S = 30.0
_POLL_S = 0.3
MAX_ATTEMPTS = 20


def launch(context: RunContext, checkpoint: SyncedCheckpoint) -> AttemptRecord:
    """Bring one attempt to `started` and return it; an attempt that was on its way is taken up, not doubled.

    Raises `LockedError` where another client holds the attempt, `NodeUnfitError` where no supervisor gets to start.
    """
    attempt = _next_attempt(context)
    while True:
        decision = _bring_up(context, checkpoint, attempt)
        if decision is Decision.STARTED:
            context.note_entry("launched", attempt=attempt.number, nonce=attempt.nonce)
            return attempt
        context.note_entry("void", attempt=attempt.number, nonce=attempt.nonce)
        if attempt.number >= MAX_ATTEMPTS:
            raise NodeUnfitError(
                f"{MAX_ATTEMPTS} attempts were launched and none started",
                action="Run `remote-eval doctor`; the supervisor ends before its first act.",
            )
        attempt = _intend(context, attempt.number + 1)


def reference(context: RunContext, attempt: AttemptRecord) -> AttemptRef:
    """The attempt as the agent knows it."""
    return AttemptRef(context.node.root, context.plan.run_id, attempt.number, attempt.nonce)


def read_status(context: RunContext, attempt: AttemptRecord, offsets: dict[str, int] | None = None) -> StatusReply:
    return context.node.call("status", status_request(context, attempt, offsets), StatusReply)


def status_request(context: RunContext, attempt: AttemptRecord, offsets: dict[str, int] | None = None) -> StatusRequest:
    return StatusRequest(context.node.root, context.plan.run_id, attempt.number, offsets or {})


def _next_attempt(context: RunContext) -> AttemptRecord:
    current = context.record().current_attempt
    if current is not None and current.fate == "intended":
        return current
    return _intend(context, current.number + 1 if current else 1)


def _intend(context: RunContext, number: int) -> AttemptRecord:
    nonce = secrets.token_hex(16)
    context.note_entry("launch_intent", attempt=number, nonce=nonce)
    return AttemptRecord(number, nonce, "intended")


def _bring_up(context: RunContext, checkpoint: SyncedCheckpoint, attempt: AttemptRecord) -> Decision:
    scheduler = scheduler_for(context.profile.scheduler)
    ref = reference(context, attempt)
    standing = assess(read_status(context, attempt), attempt.nonce, scheduler)
    if standing is Standing.VOID:
        return Decision.VOID
    if standing in (Standing.NOT_CLAIMED, Standing.FOREIGN):
        claimed = context.node.call(
            "claim",
            ClaimRequest(ref.root, attempt.number, attempt.nonce, _client_name(), node_plan(context.plan, checkpoint)),
            Claimed,
        )
        if not claimed.ours:
            raise LockedError(
                f"attempt {attempt.number} of {context.plan.run_id} was claimed by another client",
                action="Follow it from there, or start a new run.",
            )
    if standing in (Standing.NOT_CLAIMED, Standing.NOT_DECIDED):
        launched = context.node.call(scheduler.launch_verb, ref, Launched)
        if launched.decision is not None:
            return launched.decision
    return _await_decision(context, attempt, ref)


def _await_decision(context: RunContext, attempt: AttemptRecord, ref: AttemptRef) -> Decision:
    scheduler = scheduler_for(context.profile.scheduler)
    deadline = time.monotonic() + DECISION_WAIT_S
    while time.monotonic() < deadline:
        reply = read_status(context, attempt)
        if reply.decision is not None:
            return reply.decision
        if assess(reply, attempt.nonce, scheduler) is Standing.FOREIGN:
            raise LockedError(f"attempt {attempt.number} was claimed by another client", action="Follow it there.")
        time.sleep(_POLL_S)
    decided = context.node.call("void", ref, Decided).decision
    if decided is None:
        raise InternalError("the agent voided an attempt and names no decision")
    return decided


def _client_name() -> str:
    return f"{getpass.getuser()}@{platform.node()}"
