"""What one reading of the node says of an attempt. Pure."""

from __future__ import annotations

import enum

from orchestrator.schedulers.base import Presence, Scheduler
from remote_payload.wire.run_messages import StatusReply
from remote_payload.wire.states import Decision


class Standing(enum.Enum):
    """Where an attempt stands by one reading."""

    NOT_CLAIMED = "not claimed"
    NOT_DECIDED = "claimed, nobody has decided"
    STARTING = "claimed, a supervisor is on its way"
    VOID = "given up before it started"
    UNDER_WAY = "under way"
    TERMINAL = "ended, with a terminal record"
    ABSENT = "started, no terminal record, no process: two such readings mean lost"
    UNTELLABLE = "started, and this machine cannot see its processes"
    FOREIGN = "claimed with another nonce"


def assess(reply: StatusReply, nonce: str, scheduler: Scheduler) -> Standing:
    """Only a terminal record ends an attempt; absence is reported as absence, never as failure."""
    if reply.claim_nonce is None:
        return Standing.NOT_CLAIMED
    if reply.claim_nonce != nonce:
        return Standing.FOREIGN
    if reply.decision is Decision.VOID:
        return Standing.VOID
    if reply.status is not None and reply.status.state.is_terminal:
        return Standing.TERMINAL
    presence = scheduler.presence(reply)
    if reply.decision is None:
        return Standing.STARTING if presence is Presence.ALIVE else Standing.NOT_DECIDED
    return {
        Presence.ALIVE: Standing.UNDER_WAY,
        Presence.ABSENT: Standing.ABSENT,
        Presence.UNTELLABLE: Standing.UNTELLABLE,
    }[presence]
