"""From checks to a verdict: what failed, or what was tested."""

from __future__ import annotations

from collections.abc import Iterable

from remote_payload.health.checks import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.wire.results import (
    Dimension,
    Finding,
    Outcome,
    Severity,
    Verdict,
    make_verdict,
    outcome_from_findings,
)

_NOBODY_LOOKED = {
    Dimension.INTEGRITY: "Nothing could be read.",
    Dimension.PROVENANCE: "No check of labels against the file's contents applied.",
    Dimension.NUMERICS: "No tensor could be measured.",
    Dimension.TRAINING_DYNAMICS: "The file holds too little to judge the training by.",
    Dimension.TASK_EVIDENCE: "A checkpoint cannot vouch for its own results: the reconstruct job measures them.",
}
_SEVERITY_ORDER = (Severity.ERROR, Severity.WARNING, Severity.INFO)


def run_checks(facts: HealthFacts, checks: Iterable[Check]) -> tuple[list[Finding], Verdict]:
    """Every finding, the worst first, and the verdict. A dimension passes only by checks whose silence proves it."""
    findings: list[Finding] = []
    ran: list[Check] = []
    gaps: list[tuple[Check, str]] = []
    for check in checks:
        if check.applies(facts):
            ran.append(check)
            findings.extend(check.run(facts))
        elif why := check.why_not(facts):
            gaps.append((check, why))
    findings.sort(key=lambda f: _SEVERITY_ORDER.index(f.severity))
    outcomes = {d: _outcome(d, ran, findings, facts) for d in Dimension}
    reasons = {d.value: _reason(d, outcomes[d], ran, findings, facts) + _gaps(d, gaps) for d in Dimension}
    return findings, make_verdict({d.value: o for d, o in outcomes.items()}, reasons)


def unreadable_verdict(findings: list[Finding], message: str) -> Verdict:
    """The verdict on a file that has no readable header."""
    reasons = {d.value: _NOBODY_LOOKED[d] for d in Dimension}
    reasons[Dimension.INTEGRITY.value] = message
    return make_verdict({Dimension.INTEGRITY.value: outcome_from_findings(findings, Dimension.INTEGRITY)}, reasons)


def _outcome(dimension: Dimension, ran: list[Check], findings: list[Finding], facts: HealthFacts) -> Outcome:
    outcome = outcome_from_findings(findings, dimension)
    proven = any(c.dimension is dimension and c.can_pass for c in ran)
    # A checkpoint's own figures can fail the task; they never pass it.
    if outcome is Outcome.PASS and (not proven or dimension is Dimension.TASK_EVIDENCE):
        return Outcome.NOT_MEASURED
    if outcome is Outcome.PASS and dimension is Dimension.NUMERICS and facts.unmeasured:
        return Outcome.NOT_MEASURED
    return outcome


def _reason(
    dimension: Dimension, outcome: Outcome, ran: list[Check], findings: list[Finding], facts: HealthFacts
) -> str:
    if outcome is Outcome.NOT_MEASURED:
        unmeasured = facts.unmeasured if dimension is Dimension.NUMERICS else []
        if unmeasured:
            why = facts.scan.not_measured[unmeasured[0]]
            return (
                f"{len(unmeasured)} of {len(facts.header.tensors)} tensors were not measured, the first because {why}."
            )
        return _NOBODY_LOOKED[dimension]
    if outcome in (Outcome.FAIL, Outcome.WARN):
        worst = Severity.ERROR if outcome is Outcome.FAIL else Severity.WARNING
        return "; ".join(f.title for f in findings if f.dimension is dimension and f.severity is worst) + "."
    tested = "Tested: " + "; ".join(c.tests for c in ran if c.dimension is dimension) + "."
    return tested + _limits(dimension, facts)


def _gaps(dimension: Dimension, gaps: list[tuple[Check, str]]) -> str:
    """What could not be looked at, and what it would have taken."""
    missing = [f"{check.tests} ({why})" for check, why in gaps if check.dimension is dimension]
    return f" Not measured: {'; '.join(missing)}." if missing else ""


def _limits(dimension: Dimension, facts: HealthFacts) -> str:
    """What a pass does not cover."""
    if dimension is Dimension.INTEGRITY and facts.scan.checksums.without:
        return f" {facts.scan.checksums.without} of {facts.scan.checksums.records} records carry no checksum."
    return ""
