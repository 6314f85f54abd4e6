"""Everything that tells what became of an attempt, read at one time, and the request to cancel it."""

from __future__ import annotations

import base64
import os
import signal
from typing import Optional

from remote_payload.agent import attempts, files, machine, root
from remote_payload.wire.layout import AttemptLayout
from remote_payload.wire.run_messages import AttemptRef, Decided, StatusReply, StatusRequest
from remote_payload.wire.states import AttemptStatus, Decision, JobState, ProcessIdentity

MAX_TAIL_BYTES = 8 * 1024 * 1024


def status(request: StatusRequest) -> StatusReply:
    """Truth file, decision, processes and log tails. A terminal record is read before the tails, so they are whole."""
    layout = root.open_root(request.root)
    attempt = layout.attempt(request.run_id, request.attempt)
    claim = attempts.read_claim(attempt)
    decided = attempts.read_decision(attempt)
    truth = attempts.read_status(attempt)
    alive = _supervisor_alive(decided, truth)
    if alive is False:
        # It may have written its last word between the two looks above.
        truth = attempts.read_status(attempt)
    tails, sizes = _tails(attempt, request)
    return StatusReply(
        machine_id=machine.machine_id(),
        boot_id=machine.boot_id(),
        claim_nonce=claim.nonce if claim else None,
        claim_machine_id=claim.machine_id if claim else None,
        decision=decided.decision if decided else None,
        status=truth,
        supervisor_alive=alive,
        processes_with_nonce=machine.processes_with_argument(claim.nonce) if claim else (),
        manifest_present=os.path.exists(attempt.manifest),
        tails=tails,
        sizes=sizes,
    )


def cancel(request: AttemptRef) -> Decided:
    """Ask the supervisor to stop its jobs; an attempt that has not started is made void instead.

    Where the supervisor is provably gone, what is left of its job's process group is killed, if that is provably it.
    """
    layout = root.open_root(request.root)
    attempt = layout.attempt(request.run_id, request.attempt)
    attempts.require_claim(attempt, request.nonce)
    files.create_once(attempt.cancel_request, request.nonce.encode() + b"\n")
    attempts.decide(attempt, Decision.VOID)
    decided = attempts.read_decision(attempt)
    if decided is None or decided.decision is Decision.VOID:
        return Decided(Decision.VOID, "the attempt had not started and never will")
    alive = _supervisor_alive(decided, attempts.read_status(attempt))
    truth = attempts.read_status(attempt)
    if truth is not None and truth.state.is_terminal:
        return Decided(decided.decision, f"the attempt had ended before: {truth.state.value}")
    if alive is not False:
        return Decided(decided.decision, "the supervisor will stop its jobs")
    return Decided(decided.decision, _kill_orphans(truth))


def _supervisor_alive(decided: Optional[attempts.Decided], truth: Optional[AttemptStatus]) -> Optional[bool]:
    supervisor = attempts.supervisor_of(decided, truth)
    return None if supervisor is None else machine.is_alive(supervisor)


def _kill_orphans(truth: Optional[AttemptStatus]) -> str:
    killed = [
        name
        for name, job in sorted((truth.jobs if truth else {}).items())
        if job.state is JobState.RUNNING and job.process is not None and _kill_group(job.process)
    ]
    if killed:
        return f"the supervisor is gone; killed what was left of {', '.join(killed)}"
    return "the supervisor is gone and left no job that is provably its own"


def _kill_group(leader: ProcessIdentity) -> bool:
    if machine.is_alive(leader) is not True:
        return False
    try:
        if os.getpgid(leader.pid) != leader.pid:
            return False
        os.killpg(leader.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _tails(attempt: AttemptLayout, request: StatusRequest) -> tuple[dict[str, str], dict[str, int]]:
    limit = max(0, min(request.max_bytes, MAX_TAIL_BYTES))
    tails: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for path in attempt.diagnostics:
        name = os.path.basename(path)
        try:
            sizes[name] = os.lstat(path).st_size
        except FileNotFoundError:
            continue
        if name in request.offsets:
            data = files.read_up_to(path, limit, max(0, request.offsets[name]))
            tails[name] = base64.b64encode(data or b"").decode()
    return tails, sizes
