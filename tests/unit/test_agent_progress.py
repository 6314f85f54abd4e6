"""What a job says on its pipe, and its budgets: pure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remote_payload.agent.progress import LineReader, PhaseClock, Report, parse_report
from remote_payload.agent.supervise import conclude
from remote_payload.wire.states import AttemptState, JobState, JobStatus, Phase


@given(st.binary(max_size=300), st.lists(st.integers(1, 7), max_size=100))
def test_lines_do_not_depend_on_how_the_bytes_arrive(data: bytes, cuts: list[int]) -> None:
    whole = list(LineReader(20).feed(data + b"\n"))
    reader, position, lines = LineReader(20), 0, []
    for cut in cuts:
        lines += reader.feed(data[position : position + cut])
        position += cut
    lines += reader.feed(data[position:] + b"\n")
    assert lines == whole
    assert lines == [line for line in data.split(b"\n") if len(line) <= 20]


@given(st.binary(max_size=200))
def test_no_line_is_too_strange_to_parse(line: bytes) -> None:
    report = parse_report(line)
    assert report is None or isinstance(report, Report)


@pytest.mark.parametrize(
    ("line", "report"),
    [
        (
            b'{"phase": "load", "counter": 2, "total": 9, "message": "a\\u001b[2Jb"}',
            Report(Phase.LOAD, 2, 9, "a\\x1b[2Jb"),
        ),
        (b'{"phase": "run"}', Report(Phase.RUN)),
        (b'{"error": "ValueError:\\nx"}', Report(error="ValueError: x")),
        (b'{"phase": "run", "counter": 1.5}', None),
        (b'{"phase": "run", "counter": true}', None),
        (b'{"phase": "run", "total": "many"}', None),
        (b'{"phase": "run", "counter": 99999999999999999999}', None),
        (b'{"phase": ["run"]}', None),
        (b'"run"', None),
        (b"[" * 50_000, None),
    ],
)
def test_a_report_is_taken_whole_or_not_at_all(line: bytes, report: Report | None) -> None:
    assert parse_report(line) == report


def test_a_budget_counts_from_the_last_change_of_phase_or_counter() -> None:
    clock = PhaseClock({"import": 10.0, "run": 5.0}, now=100.0)
    assert not clock.is_overdue(110.0)
    assert clock.is_overdue(110.1)
    assert clock.observe(Phase.RUN, 0, 110.0)
    assert not clock.observe(Phase.RUN, 0, 114.0)
    assert clock.is_overdue(115.1)
    assert clock.observe(Phase.RUN, 1, 115.1)
    assert not clock.is_overdue(120.0)
    clock.grant_again(120.0)
    assert not clock.is_overdue(125.0)


def test_a_phase_without_a_budget_is_never_overdue() -> None:
    clock = PhaseClock({}, now=0.0)
    assert not clock.is_overdue(1e12)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((JobState.SUCCEEDED, JobState.SUCCEEDED), AttemptState.SUCCEEDED),
        ((JobState.SUCCEEDED, JobState.FAILED), AttemptState.FAILED),
        ((JobState.FAILED, JobState.CANCELLED), AttemptState.CANCELLED),
        ((JobState.SUCCEEDED, JobState.NOT_RUN), AttemptState.CANCELLED),
        ((), AttemptState.FAILED),
    ],
)
def test_an_attempt_succeeds_only_if_every_job_did(states: tuple[JobState, ...], expected: AttemptState) -> None:
    jobs = {f"job_{i}": JobStatus(state=state, error="why") for i, state in enumerate(states)}
    state, cause = conclude(jobs)
    assert state is expected
    assert (cause is None) == (state is AttemptState.SUCCEEDED)
