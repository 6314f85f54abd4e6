"""Findings and verdicts: the vocabulary in which a job states what it measured."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any, Optional

RESULTS_SCHEMA_VERSION = 1


class Severity(str, enum.Enum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Outcome(str, enum.Enum):
    PASS = "pass"  # noqa: S105 - a verdict, not a password
    WARN = "warn"
    FAIL = "fail"
    NOT_MEASURED = "not_measured"


class Dimension(str, enum.Enum):
    INTEGRITY = "integrity"
    PROVENANCE = "provenance"
    NUMERICS = "numerics"
    TRAINING_DYNAMICS = "training_dynamics"
    TASK_EVIDENCE = "task_evidence"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One diagnosed fact. `id` is public API; `evidence` holds the numbers it rests on; `confidence` is 0 to 1."""

    id: str
    severity: Severity
    title: str
    dimension: Optional[Dimension] = None
    where: tuple[str, ...] = ()
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)
    explanation: str = ""
    confidence: float = 1.0
    refuted_by: str = ""
    action: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Outcome per dimension and overall; `reasons` says in a sentence per dimension what it rests on."""

    overall: Outcome
    dimensions: dict[str, Outcome]
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)


_WORST_OVERALL = (Outcome.FAIL, Outcome.WARN, Outcome.NOT_MEASURED, Outcome.PASS)
_STRONGEST_EVIDENCE = (Outcome.FAIL, Outcome.WARN, Outcome.PASS, Outcome.NOT_MEASURED)


def overall_outcome(dimensions: Mapping[str, Outcome]) -> Outcome:
    """Across dimensions: fail before warn before not measured before pass, so what was not measured never passes."""
    outcomes = [dimensions.get(d.value, Outcome.NOT_MEASURED) for d in Dimension]
    return min(outcomes, key=_WORST_OVERALL.index)


def merge_outcomes(outcomes: Iterable[Outcome]) -> Outcome:
    """Several jobs on one dimension: what one job measured stands, whatever another did not measure."""
    return min(outcomes, key=_STRONGEST_EVIDENCE.index, default=Outcome.NOT_MEASURED)


def make_verdict(dimensions: Mapping[str, Outcome], reasons: Optional[Mapping[str, str]] = None) -> Verdict:
    """Fill in the dimensions that nobody measured and derive the overall outcome."""
    filled = {d.value: dimensions.get(d.value, Outcome.NOT_MEASURED) for d in Dimension}
    return Verdict(overall_outcome(filled), filled, dict(reasons or {}))


def outcome_from_findings(findings: Iterable[Finding], dimension: Dimension) -> Outcome:
    """Error means fail, warning means warn, else pass: for a dimension whose checks did run."""
    severities = {f.severity for f in findings if f.dimension is dimension}
    if Severity.ERROR in severities:
        return Outcome.FAIL
    return Outcome.WARN if Severity.WARNING in severities else Outcome.PASS
