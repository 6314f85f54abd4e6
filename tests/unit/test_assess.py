"""One reading of the node: what may be concluded from it, and what may not."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.pipeline.assess import Standing, assess
from orchestrator.schedulers.direct import Direct
from remote_payload.wire.run_messages import StatusReply
from remote_payload.wire.states import AttemptState, AttemptStatus, Decision, ProcessIdentity

NONCE = "a" * 32
SUPERVISOR = ProcessIdentity(10, "1", "boot", "machine")
RUNNING = AttemptStatus("r", 1, NONCE, AttemptState.RUNNING, SUPERVISOR, {})
ENDED = dataclasses.replace(RUNNING, state=AttemptState.FAILED)
CLAIMED = StatusReply(
    machine_id="machine",
    boot_id="boot",
    claim_nonce=NONCE,
    claim_machine_id="machine",
    decision=None,
    status=None,
    supervisor_alive=False,
    processes_with_nonce=(),
    manifest_present=False,
)
STARTED = dataclasses.replace(CLAIMED, decision=Decision.STARTED, status=RUNNING, supervisor_alive=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"claim_nonce": None}, Standing.NOT_CLAIMED),
        ({"claim_nonce": "b" * 32}, Standing.FOREIGN),
        ({"decision": None, "status": None, "supervisor_alive": False}, Standing.NOT_DECIDED),
        (
            {"decision": None, "status": None, "supervisor_alive": False, "processes_with_nonce": (SUPERVISOR,)},
            Standing.STARTING,
        ),
        ({"decision": Decision.VOID}, Standing.VOID),
        ({}, Standing.UNDER_WAY),
        ({"status": ENDED, "supervisor_alive": False}, Standing.TERMINAL),
        ({"supervisor_alive": False}, Standing.ABSENT),
        ({"supervisor_alive": False, "status": None}, Standing.ABSENT),
        ({"supervisor_alive": False, "processes_with_nonce": (SUPERVISOR,)}, Standing.UNDER_WAY),
        ({"supervisor_alive": None}, Standing.UNTELLABLE),
    ],
)
def test_a_reading_means(changes: dict[str, object], expected: Standing) -> None:
    assert assess(dataclasses.replace(STARTED, **changes), NONCE, Direct()) is expected  # type: ignore[arg-type]


def test_another_machine_behind_the_same_name_can_tell_no_absence() -> None:
    elsewhere = dataclasses.replace(STARTED, machine_id="other", supervisor_alive=False)
    assert assess(elsewhere, NONCE, Direct()) is Standing.UNTELLABLE


def test_a_terminal_record_is_believed_from_any_machine() -> None:
    elsewhere = dataclasses.replace(STARTED, machine_id="other", supervisor_alive=None, status=ENDED)
    assert assess(elsewhere, NONCE, Direct()) is Standing.TERMINAL
