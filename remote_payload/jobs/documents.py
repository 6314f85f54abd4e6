"""The document of a user's job: what the job returned, with the parts that every document has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.results import (
    RESULTS_SCHEMA_VERSION,
    Dimension,
    Finding,
    Outcome,
    Verdict,
    make_verdict,
    outcome_from_findings,
)


def user_document(job: str, returned: Mapping[str, Any]) -> dict[str, Any]:
    """`returned` as the job's document. Findings and verdict are checked; a verdict that is missing follows from the
    findings, where a dimension without any was not measured. Raises `WireError` naming the field that does not fit.
    """
    document = to_json(dict(returned))
    findings = [from_json(Finding, f, f"findings[{i}]") for i, f in enumerate(document.get("findings", []))]
    verdict = from_json(Verdict, document["verdict"]) if "verdict" in document else _verdict_of(findings)
    return {
        **document,
        "schema_version": RESULTS_SCHEMA_VERSION,
        "job": job,
        "findings": to_json(findings),
        "verdict": to_json(verdict),
    }


def _verdict_of(findings: list[Finding]) -> Verdict:
    spoken_of = {finding.dimension for finding in findings}
    dimensions: dict[str, Outcome] = {
        dimension.value: outcome_from_findings(findings, dimension) for dimension in Dimension if dimension in spoken_of
    }
    return make_verdict(dimensions)
