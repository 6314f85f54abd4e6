"""Claiming an attempt, and giving one up for good."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import time
from typing import Optional

from remote_payload.agent import attempts, files, machine, root
from remote_payload.agent.attempts import Claim
from remote_payload.agent.failure import AgentError
from remote_payload.wire.codec import to_json
from remote_payload.wire.layout import AttemptLayout, NodeLayout
from remote_payload.wire.names import check_nonce
from remote_payload.wire.plan import NodePlan
from remote_payload.wire.run_messages import AttemptRef, Claimed, ClaimRequest, Decided
from remote_payload.wire.states import Decision


def claim(request: ClaimRequest) -> Claimed:
    """Claim attempt `request.attempt` of the plan's run. The same nonce again gets the same answer.

    Raises `AgentError` conflict: the run has another plan here, or its previous attempt may still start or run.
    """
    layout = root.open_root(request.root)
    run_id = request.plan.run_id
    attempt = layout.attempt(run_id, request.attempt)
    if attempts.read_claim(attempt) is None:
        _make_run_folder(layout, run_id)
        if request.attempt > 1:
            _check_previous_is_over(layout.attempt(run_id, request.attempt - 1))
        _fix_plan(layout, request.plan)
        _claim_folder(layout, run_id, attempt, request.nonce, request.client)
    holder = attempts.read_claim(attempt)
    if holder is None:
        raise AgentError("internal", f"the claim of {attempt.folder} vanished")
    return Claimed(holder.nonce == request.nonce, holder.nonce, holder.machine_id)


def void(request: AttemptRef) -> Decided:
    """Give the attempt up, unless its supervisor has started; one that nobody claimed is claimed to be void.

    So a claim or a launch that is still on its way when this returns can start nothing later.
    """
    layout = root.open_root(request.root)
    attempt = layout.attempt(request.run_id, request.attempt)
    if attempts.read_claim(attempt) is None:
        _make_run_folder(layout, request.run_id)
        _claim_folder(layout, request.run_id, attempt, request.nonce, "void", Decision.VOID)
    attempts.require_claim(attempt, request.nonce)
    attempts.decide(attempt, Decision.VOID)
    decided = attempts.read_decision(attempt)
    return Decided(decided.decision if decided is not None else None)


def _make_run_folder(layout: NodeLayout, run_id: str) -> None:
    folder = layout.run_folder(run_id)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    files.fsync_folder(layout.runs)
    files.fsync_folder(layout.root)


def _fix_plan(layout: NodeLayout, plan: NodePlan) -> None:
    """Write the plan once; every attempt of a run has the same. A digest that was learnt since does not count."""
    fixed = attempts.read_plan(layout, plan.run_id)
    if fixed is None:
        files.create_once(layout.plan(plan.run_id), files.json_bytes(to_json(plan)))
        fixed = attempts.read_plan(layout, plan.run_id)
    if fixed is not None and None in (fixed.checkpoint_digest, plan.checkpoint_digest):
        plan = dataclasses.replace(plan, checkpoint_digest=fixed.checkpoint_digest)
    # Compared as written: numbers that JSON cannot tell apart are the same.
    if fixed is None or files.json_bytes(to_json(fixed)) != files.json_bytes(to_json(plan)):
        raise AgentError(
            "conflict",
            f"run {plan.run_id} has another plan on this node",
            "Start a new run instead of resuming this one.",
        )


def _check_previous_is_over(previous: AttemptLayout) -> None:
    if attempts.read_claim(previous) is None:
        return
    if attempts.is_over(previous) is not True:
        raise AgentError(
            "conflict",
            f"{os.path.basename(previous.folder)} of this run may still start or run",
            "Void or cancel it first.",
        )


def _claim_folder(
    layout: NodeLayout,
    run_id: str,
    attempt: AttemptLayout,
    nonce: str,
    client: str,
    decision: Optional[Decision] = None,
) -> None:
    """Rename a prepared folder to the attempt's. Whether that was refused is for the caller to see by reading."""
    unique = secrets.token_hex(8)
    prepared = AttemptLayout(layout.new_claim(run_id, check_nonce(nonce), unique))
    holder = Claim(nonce, client[:200], machine.machine_id(), time.time())
    refusal: Optional[OSError] = None
    os.mkdir(prepared.folder, 0o700)
    try:
        os.mkdir(prepared.artifacts, 0o700)
        files.write_new(prepared.claim, files.json_bytes(to_json(holder)))
        if decision is not None:
            attempts.decide(prepared, decision)
        files.fsync_folder(prepared.folder)
        # A folder that is not empty is never replaced by a rename, and an attempt's folder never is empty.
        try:
            os.rename(prepared.folder, attempt.folder)
        except OSError as error:
            refusal = error
    finally:
        if os.path.exists(prepared.folder):
            shutil.rmtree(prepared.folder)
    files.fsync_folder(layout.run_folder(run_id))
    if attempts.read_claim(attempt) is None:
        raise AgentError("unfit", f"{attempt.folder} could not be created: {refusal}") from refusal
