"""What a transfer tells a person and a program, and how often."""

from __future__ import annotations

import json

import pytest

from orchestrator.cli.output import ConsoleReporter, JsonReporter, Pace, transfer_line
from orchestrator.transfer.progress import TransferProgress
from remote_payload.wire.states import AttemptState, AttemptStatus, JobState, JobStatus, Phase, ProcessIdentity

HALF = TransferProgress(500_000_000, 1_000_000_000, 1e8, 5.0, 300_000_000, 4, 200_000_000, 30_000_000)
ALL = TransferProgress(1_000_000_000, 1_000_000_000, 1e8, 0.0, 100_000_000, 4)


def test_a_line_says_rate_streams_time_left_and_what_was_saved_and_why() -> None:
    assert transfer_line("checkpoint", HALF) == (
        "checkpoint: 500 MB of 1.0 GB, 100 MB/s, 4 streams, 5 s left, 100 MB was there already, 200 MB reused,"
        " 30.0 MB saved by packing"
    )


def test_a_program_gets_one_json_object_a_line_and_the_end_once(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = JsonReporter()
    reporter.stage("sync")
    reporter.note("nothing that a program needs")
    for progress in (HALF, HALF, HALF, ALL, ALL):
        reporter.transfer("checkpoint", progress)
    out, err = capsys.readouterr()
    assert out == ""
    first, last = (json.loads(line) for line in err.splitlines())
    assert first == {
        "event": "transfer",
        "what": "checkpoint",
        "bytes_done": 500_000_000,
        "bytes_total": 1_000_000_000,
        "bytes_per_s": 100_000_000,
        "eta_s": 5.0,
        "streams": 4,
        "saved": {"already_there": 100_000_000, "reused": 200_000_000, "packed": 30_000_000},
    }
    assert last["bytes_done"] == last["bytes_total"]


def test_a_program_hears_of_each_step_of_a_job_once(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = JsonReporter()
    for job in (
        JobStatus(JobState.RUNNING, Phase.RUN, counter=1),
        JobStatus(JobState.RUNNING, Phase.RUN, counter=2),
        JobStatus(JobState.FAILED, Phase.RUN, error="no\x1b[31m way"),
    ):
        process = ProcessIdentity(1, "", "", "")
        reporter.attempt(AttemptStatus("r1", 1, "n", AttemptState.RUNNING, process, {"health": job}))
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(event["event"], event["job"], event["state"], event["phase"]) for event in told] == [
        ("job", "health", "running", "run"),
        ("job", "health", "failed", "run"),
    ]
    assert told[0]["error"] is None
    assert "way" in told[1]["error"]
    assert "\x1b" not in told[1]["error"]


def test_a_name_from_a_node_cannot_break_the_line_or_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    JsonReporter().transfer("a\n\x1b]0;x\x07", ALL)
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in json.loads(line)["what"]


def test_a_pipe_is_not_flooded(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    for _ in range(50):
        reporter.transfer("checkpoint", HALF)
    for _ in range(3):
        reporter.transfer("checkpoint", ALL)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_things_have_a_pace_each_and_begin_anew_after_their_end() -> None:
    now = [0.0]
    pace = Pace(1.0, lambda: now[0])
    told = []
    for at, what, is_last in ((0, "a", False), (0.5, "a", False), (0.5, "b", False), (0.6, "a", True), (5, "a", True)):
        now[0] = at
        told.append(pace.allows(what, is_last=is_last))
    assert told == [True, False, True, True, False]
    assert pace.allows("a", is_last=False)
