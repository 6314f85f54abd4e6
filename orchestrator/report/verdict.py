"""The verdict of a run from its jobs' verdicts, and its words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from remote_payload.wire.results import Dimension, Outcome, Severity, make_verdict, merge_outcomes

DIMENSION_WORDS = {
    "integrity": "integrity",
    "provenance": "provenance",
    "numerics": "numerics",
    "training_dynamics": "training dynamics",
    "task_evidence": "task evidence",
}
OUTCOME_WORDS = {"pass": "pass", "warn": "warning", "fail": "fail", "not_measured": "not measured"}
HEADLINES = {
    "pass": "Usable",
    "warn": "Usable with care",
    "fail": "Not usable",
    "not_measured": "Not established",
}
_JOB_STATE_WORDS = {
    "pending": "has not started",
    "running": "has not ended",
    "failed": "failed",
    "cancelled": "was cancelled",
    "not_run": "did not run",
    "unknown": "left no record of its end",
}
_ATTEMPT_STATE_WORDS = {
    "running": "has not ended",
    "failed": "failed",
    "cancelled": "was cancelled",
    "lost": "was lost",
    "not_started": "did not start",
    "unknown": "left no record of its end",
}


@dataclasses.dataclass(frozen=True)
class JobVerdict:
    """What one job says. `counts` is False for a job that did not succeed: then it measured nothing."""

    job: str
    state: str
    counts: bool
    dimensions: Mapping[str, Outcome]
    reasons: Mapping[str, str]
    error: str | None = None


def finding_floor(findings: Iterable[Mapping[str, Any]]) -> dict[str, Outcome]:
    """The outcome per dimension that findings force: an error fails its dimension, whatever its job claims."""
    forced = {Severity.ERROR.value: Outcome.FAIL, Severity.WARNING.value: Outcome.WARN}
    floor: dict[str, Outcome] = {}
    for finding in findings:
        dimension, outcome = finding.get("dimension"), forced.get(str(finding.get("severity")))
        if dimension and outcome:
            floor[dimension] = merge_outcomes([outcome, floor.get(dimension, Outcome.NOT_MEASURED)])
    return floor


def merge_verdicts(jobs: Sequence[JobVerdict], attempt_state: str) -> dict[str, Any]:
    """Overall outcome, outcome and reason per dimension. An attempt that did not succeed never passes."""
    dimensions: dict[str, Outcome] = {}
    reasons: dict[str, str] = {}
    for dimension in (d.value for d in Dimension):
        counted = [j for j in jobs if j.counts]
        outcome = merge_outcomes(j.dimensions.get(dimension, Outcome.NOT_MEASURED) for j in counted)
        dimensions[dimension] = outcome
        reasons[dimension] = _reason(dimension, outcome, counted, jobs)
    verdict = make_verdict(dimensions, reasons)
    overall = verdict.overall
    if overall is Outcome.PASS and attempt_state != "succeeded":
        overall = Outcome.NOT_MEASURED
    return {
        "overall": overall.value,
        "dimensions": {d: o.value for d, o in verdict.dimensions.items()},
        "reasons": verdict.reasons,
    }


def _reason(dimension: str, outcome: Outcome, counted: Sequence[JobVerdict], jobs: Sequence[JobVerdict]) -> str:
    said = [j.reasons[dimension] for j in counted if j.dimensions.get(dimension) is outcome and dimension in j.reasons]
    if outcome is not Outcome.NOT_MEASURED:
        return " ".join(dict.fromkeys(_sentence(s) for s in said))
    # A job that failed is the reason where nobody else speaks, and for the task, which others can only point at.
    is_told = said and dimension != Dimension.TASK_EVIDENCE.value
    failed = [] if is_told else [j for j in jobs if not j.counts]
    missing = [_sentence(job_state_sentence(j.job, j.state, j.error)) for j in failed]
    parts = list(dict.fromkeys([*(_sentence(s) for s in said), *missing]))
    return " ".join(parts) or "No job of this run measures it."


def job_state_sentence(job: str, state: str, error: str | None) -> str:
    """`Job health failed: <its error>`, for a job that did not succeed."""
    words = f"Job {job} {_JOB_STATE_WORDS.get(state, 'ended without a result')}"
    return f"{words}: {error}" if error else words


def attempt_sentence(attempt: Mapping[str, Any]) -> str:
    """`The run failed: <cause>.` for an attempt that did not succeed; empty for one that did."""
    state = str(attempt.get("state"))
    if state == "succeeded":
        return ""
    words = f"The run {_ATTEMPT_STATE_WORDS.get(state, 'did not succeed')}"
    cause = attempt.get("cause")
    return _sentence(f"{words}: {cause}" if cause else words)


def verdict_sentence(results: Mapping[str, Any]) -> str:
    """The verdict in plain words, worst first. What was not measured is said to be so, never to have passed."""
    verdict, attempt = results["verdict"], results["attempt"]
    by_outcome: dict[str, list[str]] = {}
    for dimension, outcome in verdict["dimensions"].items():
        by_outcome.setdefault(outcome, []).append(DIMENSION_WORDS.get(dimension, dimension))
    measured = [o for o in by_outcome if o != "not_measured"]
    trouble = attempt_sentence(attempt)
    if not measured:
        return f"No verdict: nothing was measured. {trouble}".strip()
    headline = HEADLINES[verdict["overall"]]
    if verdict["overall"] == "pass":
        return f"{headline}: all five dimensions pass."
    clauses = [
        _clause(by_outcome.get("fail"), "fails", "fail"),
        _clause(by_outcome.get("warn"), "has warnings", "have warnings"),
        _clause(by_outcome.get("not_measured"), "was not measured", "were not measured"),
        _clause(by_outcome.get("pass"), "passes", "pass"),
    ]
    return f"{headline}: {'; '.join(c for c in clauses if c)}. {trouble}".strip()


def _clause(names: list[str] | None, singular: str, plural: str) -> str:
    if not names:
        return ""
    if len(names) == 1:
        # Numerics and training dynamics are plural words.
        return f"{names[0]} {plural if names[0].endswith('s') else singular}"
    return f"{', '.join(names[:-1])} and {names[-1]} {plural}"


def _sentence(words: str) -> str:
    words = words.strip()
    return words if not words or words[-1] in ".!?" else words + "."
