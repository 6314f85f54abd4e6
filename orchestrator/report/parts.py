"""What jobs and the manifest hold → the forms of results.json. Pure; what is unsound is left out and noted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.report.untrusted import integer, mapping, number, objects, text
from remote_payload.wire import codec, names
from remote_payload.wire.results import Dimension, Finding, Outcome

PICTURE_KINDS = ("image", "audio")
_DIRECTIONS = ("higher", "lower")
_SEVERITY_ORDER = ("error", "warning", "info")
MAX_WHERE = 200


def read_findings(document: dict[str, Any], job: str, notes: list[str]) -> list[dict[str, Any]]:
    """The findings of one job's document, each with its job; a malformed one becomes a note."""
    found = []
    listed = document.get("findings")
    for index, item in enumerate(listed if isinstance(listed, list) else []):
        try:
            finding = codec.from_json(Finding, item, f"findings[{index}]")
        except codec.WireError as error:
            notes.append(f"{job}: a finding could not be read: {error}")
            continue
        value = codec.to_json(finding)
        value["where"], value["where_count"] = value["where"][:MAX_WHERE], len(finding.where)
        value["confidence"] = min(max(finding.confidence, 0.0), 1.0)
        found.append({"job": job, **value})
    return found


def sort_findings(findings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Worst first, surest first, otherwise as the jobs listed them."""
    return sorted(findings, key=lambda f: (_SEVERITY_ORDER.index(f["severity"]), -f["confidence"]))


def read_dimensions(document: dict[str, Any], job: str, notes: list[str]) -> dict[str, Outcome]:
    """The outcomes that a job's document states, by dimension; what is none of ours becomes a note."""
    stated = mapping(mapping(document.get("verdict")).get("dimensions"))
    known = {d.value for d in Dimension}
    outcomes = {}
    for dimension, value in stated.items():
        if dimension in known and value in [o.value for o in Outcome]:
            outcomes[dimension] = Outcome(value)
        else:
            notes.append(f"{job}: verdict {dimension} = {str(value)[:40]!r} is not in the vocabulary")
    return outcomes


def read_reasons(document: dict[str, Any]) -> dict[str, str]:
    reasons = mapping(mapping(document.get("verdict")).get("reasons"))
    return {dimension: value for dimension, value in reasons.items() if text(value)}


def read_metrics(document: dict[str, Any], job: str, notes: list[str]) -> list[dict[str, Any]]:
    """The metrics of one job's document. A metric without a value says why, or that no reason was given."""
    metrics = []
    for item in objects(document.get("metrics")):
        identifier = text(item.get("id"))
        if identifier is None:
            notes.append(f"{job}: a metric without id was left out")
            continue
        value = number(item.get("value"))
        reason = text(item.get("reason"))
        if value is None and reason is None:
            reason = "the job gave neither a value nor a reason"
        version = item.get("version")
        direction = item.get("direction")
        baselines = mapping(item.get("baselines"))
        metrics.append(
            {
                "job": job,
                "id": identifier,
                "version": version if isinstance(version, (int, str)) and not isinstance(version, bool) else None,
                "modality": text(item.get("modality")),
                "value": value,
                "reason": reason,
                "unit": text(item.get("unit")),
                "n": integer(item.get("n")),
                "direction": direction if direction in _DIRECTIONS else None,
                "chance": number(item.get("chance")),
                "interval": _interval(item.get("interval")),
                "baselines": {name: number(baselines[name]) for name in baselines},
                "parameters": mapping(item.get("parameters")),
                "details": mapping(item.get("details")),
            }
        )
    return metrics


def read_pictures(document: dict[str, Any], job: str, notes: list[str]) -> list[dict[str, Any]]:
    """The pictures of one job's document whose paths can only lie below `artifacts/`."""
    pictures = []
    for item in objects(document.get("pictures")):
        path, kind = text(item.get("path")), item.get("kind")
        try:
            names.check_artifact_path(path or "")
        except codec.WireError as error:
            notes.append(f"{job}: a picture was left out: {error}")
            continue
        if kind not in PICTURE_KINDS:
            notes.append(f"{job}: picture {path} is neither image nor audio and was left out")
            continue
        sample = item.get("sample")
        pictures.append(
            {
                "job": job,
                "path": path,
                "kind": kind,
                "title": text(item.get("title")),
                "caption": text(item.get("caption")),
                "sample": sample if isinstance(sample, (int, str)) and not isinstance(sample, bool) else None,
                "modality": text(item.get("modality")),
                "role": text(item.get("role")),
            }
        )
    return pictures


def read_artifacts(manifest: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """The manifest's entries, sorted by path; an entry with an unsound name or digest becomes a note."""
    artifacts = []
    for item in objects(manifest.get("entries")):
        try:
            path = names.check_artifact_path(text(item.get("path")) or "")
            sha256 = names.check_sha256(text(item.get("sha256")) or "")
        except codec.WireError as error:
            notes.append(f"manifest.json: an entry was left out: {error}")
            continue
        size = integer(item.get("size"))
        if size is None or size < 0:
            notes.append(f"manifest.json: {path} has no size and was left out")
            continue
        artifacts.append({"path": path, "size": size, "sha256": sha256})
    return sorted(artifacts, key=lambda a: str(a["path"]))


def _interval(value: Any) -> list[float | int] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None or low > high else [low, high]
