"""`health.json`: the health job's document."""

from __future__ import annotations

from typing import Any, Optional

from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.header import TensorEntry
from remote_payload.checkpoint.plain import json_number
from remote_payload.checkpoint.tensor_bytes import pieces_are_row_ranges
from remote_payload.health.classes import classes
from remote_payload.health.facts import HealthFacts
from remote_payload.health.verdict import unreadable_verdict
from remote_payload.wire.codec import to_json
from remote_payload.wire.results import RESULTS_SCHEMA_VERSION, Dimension, Finding, Severity, Verdict


def health_document(facts: HealthFacts, findings: list[Finding], verdict: Verdict, device: str) -> dict[str, Any]:
    """The document of a file that could be read, at least in part."""
    header = facts.header.to_json()
    # The tensors stand in the document's own list, with their statistics.
    header.pop("tensors")
    return {
        **_frame(findings, verdict),
        "header": header,
        "tensors": [_tensor(facts, index) for index in range(len(facts.header.tensors))],
        "classes": classes(facts),
        "joint": {name: joint.to_json() for name, joint in facts.scan.joint.items()},
        "joint_not_measured": dict(facts.scan.joint_not_measured),
        "misaligned": to_json(facts.scan.misaligned),
        "checksums": to_json(facts.scan.checksums),
        "drift": _without_infinities(to_json(facts.drift)),
        "spectra": _without_infinities(to_json(facts.spectra)),
        "device": device,
        "compiled_kernels": to_json(facts.scan.native),
        "bytes_read": facts.scan.bytes_read,
    }


def unreadable_document(error: CheckpointError) -> dict[str, Any]:
    """The document of a file that has no readable header: a finding says why."""
    finding = Finding(
        id="integrity.truncated" if error.kind == "truncated" else f"integrity.{error.kind}",
        severity=Severity.ERROR,
        title=str(error)[:300],
        dimension=Dimension.INTEGRITY,
        evidence={"kind": error.kind},
        explanation="The header could not be read, so nothing else was measured.",
        refuted_by="A copy of the same file that can be read.",
        action=error.action,
    )
    findings = [finding, *error.findings]
    document = _frame(findings, unreadable_verdict(findings, str(error)[:300]))
    document.update(
        {
            "header": None,
            "tensors": [],
            "classes": None,
            "joint": {},
            "joint_not_measured": {},
            "misaligned": [],
            "checksums": None,
            "device": None,
            "compiled_kernels": None,
            "bytes_read": 0,
        }
    )
    return document


def _frame(findings: list[Finding], verdict: Verdict) -> dict[str, Any]:
    return {
        "schema_version": RESULTS_SCHEMA_VERSION,
        "job": "health",
        "findings": [_json_finding(f) for f in findings],
        "verdict": to_json(verdict),
        "metrics": [],
        "pictures": [],
    }


def _json_finding(finding: Finding) -> Any:
    return _without_infinities(to_json(finding))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float):
        return json_number(value)
    if isinstance(value, dict):
        return {k: _without_infinities(v) for k, v in value.items()}
    return [_without_infinities(v) for v in value] if isinstance(value, list) else value


def _tensor(facts: HealthFacts, index: int) -> dict[str, Any]:
    tensor = facts.header.tensors[index]
    stats = facts.scan.stats.get(tensor.name)
    reason: Optional[str] = None
    if stats is None:
        reason = facts.scan.not_measured.get(tensor.name, "the pass ended before it")
    return {
        "name": tensor.name,
        "section": tensor.section.value,
        "role": tensor.role.value,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "numel": tensor.numel,
        "nbytes": tensor.nbytes,
        "value": tensor.value,
        "statistics": stats.to_json() if stats else None,
        "not_measured": reason,
        "rows_not_measured": _why_no_rows(tensor) if stats else None,
    }


def _why_no_rows(tensor: TensorEntry) -> Optional[str]:
    if len(tensor.shape) >= 2 and tensor.pieces and not pieces_are_row_ranges(tensor):
        return "its pieces are no ranges of its rows"
    return None
