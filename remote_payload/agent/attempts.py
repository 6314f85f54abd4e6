"""Reading what became of an attempt: claim, decision, truth file and the supervisor's process."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Optional, TypeVar

from remote_payload.agent import files, machine
from remote_payload.agent.failure import AgentError
from remote_payload.wire.codec import WireError, from_json, to_json
from remote_payload.wire.layout import AttemptLayout, NodeLayout
from remote_payload.wire.plan import NodePlan
from remote_payload.wire.states import AttemptStatus, Decision, ProcessIdentity

T = TypeVar("T")
_SMALL = 4 * 1024 * 1024
_ATTEMPT = re.compile(r"attempt-([1-9][0-9]*)\Z")


@dataclasses.dataclass(frozen=True)
class Claim:
    """`claim.json`: who holds the attempt."""

    nonce: str
    client: str
    machine_id: str
    claimed_at: float = 0.0
    schema: int = 1


@dataclasses.dataclass(frozen=True)
class Decided:
    """The decision file; `supervisor` is the process that started the attempt."""

    decision: Decision
    supervisor: Optional[ProcessIdentity] = None


def of_run(layout: NodeLayout, run_id: str) -> list[AttemptLayout]:
    """The run's attempts, in no order; none where the run is not known here."""
    try:
        names = os.listdir(layout.run_folder(run_id))
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbers = [int(match.group(1)) for match in map(_ATTEMPT.match, names) if match is not None]
    return [layout.attempt(run_id, number) for number in numbers]


def read_claim(attempt: AttemptLayout) -> Optional[Claim]:
    """The claim, or None where the attempt was never claimed. Raises `AgentError` for a damaged one."""
    return _read(Claim, attempt.claim)


def read_status(attempt: AttemptLayout) -> Optional[AttemptStatus]:
    """The truth file, or None where there is none yet. Raises `AgentError` for a damaged one."""
    return _read(AttemptStatus, attempt.status)


def read_plan(layout: NodeLayout, run_id: str) -> Optional[NodePlan]:
    return _read(NodePlan, layout.plan(run_id))


def read_decision(attempt: AttemptLayout) -> Optional[Decided]:
    """Who got to the attempt first, or None while nobody has."""
    data = files.read_up_to(attempt.decision, _SMALL)
    if not data:
        return None
    try:
        value = files.parse_json(data)
        return from_json(Decided, value)
    except ValueError as error:
        raise AgentError("integrity", f"{attempt.decision} is damaged: {error}") from error


def decide(attempt: AttemptLayout, decision: Decision, supervisor: Optional[ProcessIdentity] = None) -> bool:
    """Try to be the one who decides. True if we were; the first ever to call this wins."""
    return files.create_once(attempt.decision, files.json_bytes(to_json(Decided(decision, supervisor))))


def require_claim(attempt: AttemptLayout, nonce: str) -> Claim:
    """The attempt's claim, which must be `nonce`'s. Raises `AgentError` not_found or conflict."""
    claim = read_claim(attempt)
    if claim is None:
        raise AgentError("not_found", f"nobody has claimed {attempt.folder}")
    if claim.nonce != nonce:
        raise AgentError("conflict", f"{attempt.folder} is claimed by another launch ({claim.client})")
    return claim


def supervisor_of(decided: Optional[Decided], status: Optional[AttemptStatus]) -> Optional[ProcessIdentity]:
    if status is not None:
        return status.supervisor
    return decided.supervisor if decided is not None else None


def is_over(attempt: AttemptLayout) -> Optional[bool]:
    """Whether nothing of the attempt can happen any more; None where only its own machine can tell.

    Over means: a terminal record, a void decision, or a supervisor that is provably gone.
    """
    decided = read_decision(attempt)
    if decided is None:
        return False
    if decided.decision is Decision.VOID:
        return True
    supervisor = supervisor_of(decided, read_status(attempt))
    alive = machine.is_alive(supervisor) if supervisor is not None else None
    # The truth file is read after the process was looked for: one that ended in between has left its last word.
    status = read_status(attempt)
    if status is not None and status.state.is_terminal:
        return True
    return None if alive is None else not alive


def _read(cls: type[T], path: str) -> Optional[T]:
    try:
        value = files.read_json(path)
        return None if value is None else from_json(cls, value)
    except (WireError, ValueError) as error:
        raise AgentError("integrity", f"{path} is damaged: {error}") from error
