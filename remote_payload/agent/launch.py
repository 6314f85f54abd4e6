"""Starting an attempt's supervisor so that it outlives the connection."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Optional

from remote_payload.agent import attempts, own_code, root, sessions
from remote_payload.agent.failure import AgentError
from remote_payload.wire.layout import AttemptLayout, NodeLayout
from remote_payload.wire.plan import NodePlan
from remote_payload.wire.run_messages import AttemptRef, Launched
from remote_payload.wire.states import Decision

_DECISION_WAIT_S = 15.0
_POLL_S = 0.05


def launch(request: AttemptRef) -> Launched:
    """Start the supervisor of a claimed attempt and wait briefly for its decision.

    May be repeated and raced: however many supervisors this starts, the decision file lets one go on. Raises
    `AgentError`: not claimed, claimed by another nonce, or the plan's payload is not here.
    """
    layout = root.open_root(request.root)
    attempt = layout.attempt(request.run_id, request.attempt)
    attempts.require_claim(attempt, request.nonce)
    decided = attempts.read_decision(attempt)
    if decided is not None:
        return Launched(decided.decision, "already decided")
    plan = attempts.read_plan(layout, request.run_id)
    if plan is None:
        raise AgentError("not_found", f"run {request.run_id} has no plan on this node")
    method, prefix = sessions.detached_prefix(sessions.session_rules())
    command = [*prefix, *own_code.command(_payload(layout, plan)), "agent", "supervise", attempt.folder, request.nonce]
    starter = _start(command, attempt)
    return Launched(_await_decision(attempt, starter), method)


def _payload(layout: NodeLayout, plan: NodePlan) -> Optional[str]:
    """The payload that the plan was made for: perhaps not the one that serves this call. None: we run from source."""
    ours = own_code.archive()
    if ours is None:
        return None
    planned = layout.payload(plan.payload_sha256)
    if os.path.isfile(planned):
        return planned
    if own_code.archive_sha256() == plan.payload_sha256:
        return ours
    raise AgentError(
        "not_found",
        f"payload {plan.payload_sha256[:12]} of run {plan.run_id} is not on this node",
        "Install the payload that the run was planned with, or start a new run.",
    )


def _start(command: list[str], attempt: AttemptLayout) -> subprocess.Popen[bytes]:
    """Run the supervisor's starter, which detaches by itself: it forks and its parent ends at once."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    log = os.open(attempt.supervisor_log, flags, 0o600)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=attempt.folder,
            env=own_code.environment(os.environ),
            start_new_session=True,
        )
    except OSError as error:
        raise AgentError("unfit", f"the supervisor cannot be started: {error}") from error
    finally:
        os.close(log)


def _await_decision(attempt: AttemptLayout, starter: subprocess.Popen[bytes]) -> Optional[Decision]:
    deadline = time.monotonic() + _DECISION_WAIT_S
    while time.monotonic() < deadline:
        decided = attempts.read_decision(attempt)
        if decided is not None:
            starter.poll()
            return decided.decision
        if starter.poll() not in (None, 0):
            raise AgentError("internal", "the supervisor ended before it began", "Look at its log.", _log_tail(attempt))
        time.sleep(_POLL_S)
    return None


def _log_tail(attempt: AttemptLayout) -> str:
    try:
        with open(attempt.supervisor_log, encoding="utf-8", errors="replace") as file:
            return file.read()[-4000:]
    except OSError:
        return ""
