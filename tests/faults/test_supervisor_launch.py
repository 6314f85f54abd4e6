"""Promise 1, exactly one launch, attacked with races, repeats and late messages. Real processes throughout."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agent_node import AgentFailure, AgentNode, Attempt, agent_node, interpreter_name, interpreters

COUNTS_ITSELF = """
import os
def run(context):
    descriptor = os.open(context.artifacts / "starts", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(descriptor, b"started\\n")
    return {}
"""


@pytest.fixture(params=interpreters(), ids=interpreter_name)
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AgentNode]:
    with agent_node(tmp_path, request.param) as made:
        yield made


def counting_attempt(node: AgentNode) -> Attempt:
    plan = node.plan("run-" + secrets.token_hex(4), {"work.py": COUNTS_ITSELF}, {"work": "work:run"})
    return node.claim(plan)


def starts(attempt: Attempt) -> int:
    path = attempt.artifact("work/starts")
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_twenty_launches_at_once_start_one_supervisor(node: AgentNode) -> None:
    attempt = counting_attempt(node)
    calls = [node.start_call("launch", attempt.ref) for _ in range(20)]
    decisions = {call.result()["decision"] for call in calls}
    truth = attempt.wait_for_end()
    assert decisions <= {"started", None}
    assert truth["state"] == "succeeded"
    assert starts(attempt) == 1
    assert [event["event"] for event in attempt.events()].count("attempt_started") == 1


def test_a_launch_repeated_after_the_end_starts_nothing(node: AgentNode) -> None:
    attempt = counting_attempt(node)
    attempt.launch()
    before = attempt.wait_for_end()
    assert attempt.launch() == {"decision": "started", "method": "already decided"}
    assert attempt.truth() == before
    assert starts(attempt) == 1


def test_of_void_and_launch_at_once_exactly_one_wins(node: AgentNode) -> None:
    for round_number in range(4):
        attempt = counting_attempt(node)
        order = ["launch", "void"] if round_number % 2 else ["void", "launch"]
        replies = [call.result() for call in [node.start_call(verb, attempt.ref) for verb in order]]
        decision = attempt.status()["decision"]
        assert decision in ("started", "void")
        assert {reply["decision"] for reply in replies} <= {decision, None}
        if decision == "started":
            attempt.wait_for_end()
            assert starts(attempt) == 1
        else:
            assert attempt.launch()["decision"] == "void"
            assert starts(attempt) == 0
            assert not Path(attempt.layout.status).exists()


def test_an_attempt_voided_before_its_claim_arrives_can_never_start(node: AgentNode) -> None:
    plan = node.plan("late", {"work.py": COUNTS_ITSELF}, {"work": "work:run"})
    attempt = Attempt(node, "late", 1, secrets.token_hex(16))
    assert attempt.void() == {"decision": "void", "note": ""}
    claimed = node.call("claim", attempt=1, nonce=attempt.nonce, client="tests", plan=plan)
    assert claimed["ours"]
    assert attempt.launch()["decision"] == "void"
    assert node.claim(plan, attempt=2).launch()["decision"] == "started"


def test_a_repeated_claim_is_ours_and_another_nonce_is_not(node: AgentNode) -> None:
    attempt = counting_attempt(node)
    plan = node.plan(attempt.run_id, {"work.py": COUNTS_ITSELF}, {"work": "work:run"})
    again = node.call("claim", attempt=1, nonce=attempt.nonce, client="tests", plan=plan)
    other = node.call("claim", attempt=1, nonce=secrets.token_hex(16), client="others", plan=plan)
    assert again["ours"]
    assert not other["ours"]
    assert other["nonce"] == attempt.nonce


def test_ten_claims_at_once_have_one_holder(node: AgentNode) -> None:
    plan = node.plan("contested", {"work.py": COUNTS_ITSELF}, {"work": "work:run"})
    calls = [
        node.start_call("claim", {"attempt": 1, "nonce": secrets.token_hex(16), "client": str(i), "plan": plan})
        for i in range(10)
    ]
    replies = [call.result() for call in calls]
    assert sum(reply["ours"] for reply in replies) == 1
    assert len({reply["nonce"] for reply in replies}) == 1
    folder = Path(node.layout.run_folder("contested"))
    assert sorted(path.name for path in folder.iterdir()) == ["attempt-1", "plan.json"]


def test_the_next_attempt_cannot_be_claimed_while_this_one_may_still_start(node: AgentNode) -> None:
    attempt = counting_attempt(node)
    plan = node.plan(attempt.run_id, {"work.py": COUNTS_ITSELF}, {"work": "work:run"})
    with pytest.raises(AgentFailure, match="may still start or run") as refused:
        node.claim(plan, attempt=2)
    assert refused.value.kind == "conflict"
    attempt.void()
    node.claim(plan, attempt=2)


def test_a_run_keeps_its_first_plan(node: AgentNode) -> None:
    attempt = counting_attempt(node)
    attempt.void()
    plan = node.plan(attempt.run_id, {"work.py": COUNTS_ITSELF}, {"work": "work:run"}, checkpoint_path="/elsewhere")
    with pytest.raises(AgentFailure, match="another plan"):
        node.claim(plan, attempt=2)


def test_a_strangers_nonce_can_neither_launch_nor_void_nor_cancel(node: AgentNode) -> None:
    attempt = counting_attempt(node)
    stranger = Attempt(node, attempt.run_id, 1, secrets.token_hex(16))
    for act in (stranger.launch, stranger.void, stranger.cancel):
        with pytest.raises(AgentFailure) as refused:
            act()
        assert refused.value.kind == "conflict"
    assert attempt.status()["decision"] is None


def test_cancelling_what_never_started_makes_it_void(node: AgentNode) -> None:
    attempt = counting_attempt(node)
    assert attempt.cancel()["decision"] == "void"
    assert attempt.launch()["decision"] == "void"
    assert starts(attempt) == 0


def test_a_run_is_launched_with_the_payload_it_was_planned_with_or_not_at_all(node: AgentNode) -> None:
    plan = node.plan("pinned", {"work.py": COUNTS_ITSELF}, {"work": "work:run"}, payload_sha256="0" * 64)
    attempt = node.claim(plan)
    with pytest.raises(AgentFailure, match="payload 000000000000") as refused:
        attempt.launch()
    assert refused.value.kind == "not_found"
    assert attempt.status()["decision"] is None
