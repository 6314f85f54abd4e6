"""results.json: one run's facts, verdict, findings and numbers in the form of `results.schema.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from orchestrator.history.compare import compare
from orchestrator.history.rows import HistoryRow, row_from_results
from orchestrator.layout import RunLayout
from orchestrator.report import parts
from orchestrator.report.documents import RunDocuments, load_documents
from orchestrator.report.untrusted import clean, mapping, objects, text
from orchestrator.report.verdict import JobVerdict, finding_floor, merge_verdicts, verdict_sentence
from remote_payload.wire.results import RESULTS_SCHEMA_VERSION, Outcome, merge_outcomes
from remote_payload.wire.states import JobState, JobStatus

PREFLIGHT = "preflight"
"""Stands as `job` for what the preflight found before any job ran."""
_COMMON_KEYS = frozenset({"schema_version", "job", "findings", "verdict", "metrics", "pictures", "headline"})
_USERS_OWN = frozenset({"user_config", "user_config_text"})
"""The user's own config may hold anything, a token too; reports get passed on, so they name it by its digest."""
_LONG_KEYS = frozenset({"tensors"})
MAX_NUMBERS_BYTES = 64 * 1024
"""A job's own key whose JSON is longer stays in the job's document alone; results.json names it."""


@dataclasses.dataclass(frozen=True)
class AttemptOutcome:
    """How the attempt ended as the client knows it: AttemptState's values, or lost, not_started, unknown."""

    number: int | None
    state: str
    cause: str | None = None


def build_results(
    run: RunLayout, earlier: Sequence[HistoryRow] = (), attempt: AttemptOutcome | None = None
) -> dict[str, Any]:
    """results.json of the run in this folder, compared with `earlier` runs (newest first).

    `attempt` tells what the truth file cannot: that the attempt was lost or never started. Never raises for absent or
    damaged documents: what could not be read stands in `notes`, and what it would have told is not measured.
    """
    return results_from_documents(load_documents(run), earlier, attempt)


def results_from_documents(
    documents: RunDocuments, earlier: Sequence[HistoryRow] = (), attempt: AttemptOutcome | None = None
) -> dict[str, Any]:
    """The pure part of `build_results`."""
    notes = list(documents.notes)
    ended = attempt or _attempt_of(documents)
    findings: list[dict[str, Any]] = parts.read_findings(documents.preflight, PREFLIGHT, notes)
    verdicts = [_preflight_verdict(findings)] if findings else []
    metrics: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    jobs: dict[str, Any] = {}
    for job in documents.jobs:
        document = documents.documents.get(job, {})
        status = documents.status.jobs.get(job) if documents.status else None
        own_findings = parts.read_findings(document, job, notes)
        verdict = _job_verdict(job, document, status, ended, own_findings, notes)
        findings += own_findings
        verdicts.append(verdict)
        metrics += parts.read_metrics(document, job, notes)
        pictures += parts.read_pictures(document, job, notes)
        jobs[job] = _job_entry(job, document, status, verdict)
    results: dict[str, Any] = {
        "schema_version": RESULTS_SCHEMA_VERSION,
        "run": _run_facts(documents),
        "attempt": {"number": ended.number, "state": ended.state, "cause": clean(ended.cause)},
        "verdict": merge_verdicts(verdicts, ended.state),
        "findings": parts.sort_findings(findings),
        "jobs": jobs,
        "metrics": metrics,
        "pictures": pictures,
        "artifacts": parts.read_artifacts(documents.manifest, notes),
        "provenance": _provenance(documents),
        "notes": notes,
    }
    results["verdict"]["sentence"] = verdict_sentence(results)
    results["comparison"] = _comparison(results, earlier)
    results["regressions"] = results["comparison"].pop("regressions")
    return results


def dump_results(results: dict[str, Any]) -> str:
    """The file's text: stable order, no NaN."""
    return json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _attempt_of(documents: RunDocuments) -> AttemptOutcome:
    status = documents.status
    if status is None:
        return AttemptOutcome(None, "unknown" if documents.documents else "not_started")
    return AttemptOutcome(status.attempt, status.state.value, text(status.cause))


def _preflight_verdict(findings: Sequence[dict[str, Any]]) -> JobVerdict:
    """The preflight can fail a dimension and never passes one."""
    reasons: dict[str, str] = {}
    for finding in reversed(parts.sort_findings(findings)):
        if finding["dimension"]:
            reasons[finding["dimension"]] = finding["title"]
    return JobVerdict(PREFLIGHT, JobState.SUCCEEDED.value, True, finding_floor(findings), reasons)


def _job_verdict(
    job: str,
    document: dict[str, Any],
    status: JobStatus | None,
    attempt: AttemptOutcome,
    findings: Sequence[dict[str, Any]],
    notes: list[str],
) -> JobVerdict:
    state, error = _job_state(status, attempt)
    if state == JobState.SUCCEEDED.value and not document:
        error = "it succeeded and left no readable document"
    counts = state == JobState.SUCCEEDED.value and bool(document)
    stated = parts.read_dimensions(document, job, notes)
    floor = finding_floor(findings)
    dimensions = {
        d: merge_outcomes([stated.get(d, Outcome.NOT_MEASURED), floor.get(d, Outcome.NOT_MEASURED)])
        for d in {**stated, **floor}
    }
    return JobVerdict(job, state, counts, dimensions if counts else {}, parts.read_reasons(document), error)


def _job_state(status: JobStatus | None, attempt: AttemptOutcome) -> tuple[str, str | None]:
    if status is None:
        return (JobState.NOT_RUN.value if attempt.state == "not_started" else "unknown"), None
    unfinished = status.state in (JobState.PENDING, JobState.RUNNING)
    if unfinished and attempt.state not in ("running", "unknown"):
        return (JobState.NOT_RUN.value if status.state is JobState.PENDING else "unknown"), text(status.error)
    return status.state.value, text(status.error)


def _job_entry(job: str, document: dict[str, Any], status: JobStatus | None, verdict: JobVerdict) -> dict[str, Any]:
    own = {k: v for k, v in document.items() if k not in _COMMON_KEYS}
    short = {k: v for k, v in own.items() if k not in _LONG_KEYS and len(json.dumps(v)) <= MAX_NUMBERS_BYTES}
    return {
        "state": verdict.state,
        "error": verdict.error,
        "counts": verdict.counts,
        "headline": text(document.get("headline")),
        "dimensions": {d: o.value for d, o in sorted(verdict.dimensions.items())},
        "exit_status": status.exit_status if status else None,
        "signal": status.signal if status else None,
        "phase": status.phase.value if status and status.phase else None,
        "counter": status.counter if status else None,
        "total": status.total if status else None,
        "overran": list(status.overran) if status else [],
        "document": f"artifacts/{job}/{job}.json" if document else None,
        "numbers": short,
        "only_in_document": sorted(set(own) - set(short)),
    }


def _run_facts(documents: RunDocuments) -> dict[str, Any]:
    plan, settings = documents.plan, documents.settings
    checkpoint = plan.get("checkpoint")
    reference = mapping(checkpoint)
    path, cluster = text(reference.get("path")), text(reference.get("cluster"))
    return {
        "run_id": documents.run_id,
        "cluster": text(plan.get("cluster")),
        "checkpoint": text(checkpoint) or (f"{cluster}:{path}" if cluster and path else path),
        "config": text(plan.get("config_path")) or text(plan.get("config")),
        "config_sha256": text(plan.get("config_sha256")),
        "adapter": text(settings.get("adapter")),
        "jobs": list(documents.jobs),
        "settings": {k: v for k, v in settings.items() if k not in _USERS_OWN},
        "plan_key": text(plan.get("plan_key")),
        "project_folder": text(plan.get("project_folder")),
        "nightly_target": text(plan.get("nightly_target")),
    }


def _provenance(documents: RunDocuments) -> dict[str, Any]:
    """Times, hosts and versions: what may differ between two runs that give the same numbers."""
    provenance = {"created_at": documents.plan.get("created_at"), **documents.provenance}
    preflight = documents.preflight
    if preflight:
        node = {name: preflight.get(f"{name}_version") for name in ("python", "torch", "cuda", "driver")}
        provenance.setdefault("node", {**node, "gpus": [g.get("name") for g in objects(preflight.get("gpus"))]})
    if documents.status:
        seconds = {
            job: round(status.ended_at - status.started_at, 3)
            for job, status in documents.status.jobs.items()
            if status.started_at is not None and status.ended_at is not None
        }
        if seconds:
            provenance.setdefault("job_seconds", seconds)
    return provenance


def _comparison(results: dict[str, Any], earlier: Sequence[HistoryRow]) -> dict[str, Any]:
    rows = [row for row in earlier if row.run_id != results["run"]["run_id"]]
    changes = compare(row_from_results(results), rows[0]) if rows else ()
    return {
        "against": clean(rows[0].run_id) if rows else None,
        "earlier": [clean(row.to_json()) for row in rows],
        "changes": [change.to_json() for change in changes],
        "regressions": [change.sentence for change in changes if change.kind == "regression"],
    }
