"""results.json → what the page shows, as plain values; the template only places them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.history.rows import utc_text
from orchestrator.report.curves import history_curves
from orchestrator.report.format import brief, bytes_text, cell, command_text, cut, flatten, seconds_text, words
from orchestrator.report.metrics_view import metric_row
from orchestrator.report.tables import Table, job_tables, object_table
from orchestrator.report.untrusted import mapping, number
from orchestrator.report.verdict import HEADLINES, OUTCOME_WORDS, attempt_sentence, job_state_sentence

MAX_FINDINGS = 150
MAX_METRICS = 200
MAX_ARTIFACTS = 60
MAX_EARLIER = 8
MAX_CHANGES = 60
_STAGES = ("resolve", "preflight", "sync", "launch", "follow", "collect", "report")


def page(results: Mapping[str, Any], documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything of the page but pictures and logs. `documents` are the jobs' own."""
    verdict = results["verdict"]
    nothing_measured = all(o == "not_measured" for o in verdict["dimensions"].values())
    findings = results["findings"]
    sentence = verdict["sentence"]
    return {
        "run": results["run"],
        "created_at": _moment(results["provenance"].get("created_at")),
        "overall": verdict["overall"],
        "headline": "No verdict" if nothing_measured else HEADLINES[verdict["overall"]],
        "clauses": cut(_capital(sentence.partition(": ")[2] or sentence), 1500),
        "failed": cut(attempt_sentence(results["attempt"]), 1500),
        "dimensions": [
            {
                "name": words(name),
                "outcome": outcome,
                "word": OUTCOME_WORDS[outcome],
                "reason": _capital(brief(verdict["reasons"].get(name, ""), 210)),
            }
            for name, outcome in verdict["dimensions"].items()
        ],
        "headlines": [
            (job, _capital(cut(entry["headline"], 900))) for job, entry in results["jobs"].items() if entry["headline"]
        ],
        "finding_counts": {s: sum(f["severity"] == s for f in findings) for s in ("error", "warning", "info")},
        "findings": [_finding(f) for f in findings[:MAX_FINDINGS]],
        "findings_left_out": max(len(findings) - MAX_FINDINGS, 0),
        "metrics": [metric_row(m) for m in results["metrics"][:MAX_METRICS]],
        "metrics_left_out": max(len(results["metrics"]) - MAX_METRICS, 0),
        "jobs": [_job(name, entry, results["provenance"]) for name, entry in results["jobs"].items()],
        "tables": [
            (name, job_tables(name, entry["numbers"], documents.get(name, {})))
            for name, entry in results["jobs"].items()
        ],
        "curves": [
            (name, curves) for name, entry in results["jobs"].items() if (curves := history_curves(entry["numbers"]))
        ],
        "stages": _stages(results["provenance"]),
        "comparison": _comparison(results["comparison"], results),
        "provenance": flatten({k: v for k, v in results["provenance"].items() if k != "stage_seconds"}, limit=80),
        "settings": flatten(results["run"]["settings"], limit=40),
        "artifacts": _artifacts(results["artifacts"]),
        "notes": [cut(note) for note in results["notes"][:50]],
        "command": command_text(results),
    }


def _finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    more = finding["where_count"] - 12
    return {
        **{k: finding[k] for k in ("severity", "job")},
        **{k: cut(finding[k], 120 if k == "id" else 400) for k in ("id", "title", "refuted_by", "action")},
        "explanation": cut(finding["explanation"], 1500),
        "dimension": words(finding["dimension"] or ""),
        "where": [cut(w, 160) for w in finding["where"][:12]],
        "where_more": max(more, 0),
        "evidence": flatten(finding["evidence"], limit=24),
        "confidence": f"{_confidence_word(finding['confidence'])} ({finding['confidence']:.0%})",
    }


def _confidence_word(confidence: float) -> str:
    return next(word for floor, word in _CONFIDENCE if confidence >= floor)


_CONFIDENCE = ((0.99, "certain"), (0.9, "very likely"), (0.7, "likely"), (0.4, "possible"), (0.0, "weak"))


def _job(name: str, entry: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    seconds = number(mapping(provenance.get("job_seconds")).get(name))
    succeeded = entry["state"] == "succeeded"
    progress = ""
    if not succeeded and entry["phase"]:
        done = f" at {entry['counter']} of {entry['total']}" if entry["total"] else ""
        progress = f"Last seen in phase {entry['phase'].replace('_', ' ')}{done}."
    return {
        "name": name,
        "state": words(entry["state"]),
        "tone": "good" if entry["counts"] else "none" if entry["state"] in ("not_run", "pending") else "bad",
        "sentence": "" if entry["counts"] else cut(job_state_sentence(name, entry["state"], entry["error"]), 1500),
        "progress": progress,
        "exit": _exit(entry),
        "overran": ", ".join(entry["overran"]),
        "seconds": seconds_text(seconds) if seconds is not None else "",
        "document": entry["document"],
    }


def _exit(entry: Mapping[str, Any]) -> str:
    if entry["signal"]:
        return f"ended by signal {entry['signal']}"
    return f"exit status {entry['exit_status']}" if entry["exit_status"] else ""


def _stages(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = {name: number(value) for name, value in mapping(provenance.get("stage_seconds")).items()}
    seconds = {name: value for name, value in given.items() if value is not None and value >= 0}
    total = sum(seconds.values())
    ordered = [*(s for s in _STAGES if s in seconds), *(s for s in seconds if s not in _STAGES)]
    return [
        {
            "name": words(s),
            "seconds": seconds_text(seconds[s]),
            "share": round(100 * seconds[s] / total) if total else 0,
        }
        for s in ordered
    ]


def _comparison(comparison: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any] | None:
    if not comparison["earlier"]:
        return None
    rows = []
    for row in comparison["earlier"][:MAX_EARLIER]:
        rows.append(
            {
                "run_id": row["run_id"],
                "created_at": _moment(row["created_at"]),
                "overall": row["overall"],
                "word": OUTCOME_WORDS.get(row["overall"], row["overall"]),
                "dimensions": [(words(d), o, OUTCOME_WORDS.get(o, o)) for d, o in row["dimensions"].items()],
            }
        )
    return {
        "against": comparison["against"],
        "changes": [{"kind": c["kind"], "sentence": cut(c["sentence"])} for c in comparison["changes"][:MAX_CHANGES]],
        "rows": rows,
        "trends": trends(results["metrics"], comparison["earlier"][:MAX_EARLIER]),
    }


def trends(metrics: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per metric its values from the oldest earlier run to this one, each with its height in percent; at most six."""
    found: list[dict[str, Any]] = []
    for metric in metrics:
        values = [_value_in(row, metric) for row in reversed(earlier)] + [metric["value"]]
        numbers = [v for v in values if v is not None]
        if metric["value"] is None or len(numbers) < 2:
            continue
        low, high = min(0.0, *numbers), max(0.0, *numbers)
        span = (high - low) or 1.0
        found.append(
            {
                "name": words(cut(metric["id"].rsplit(".", 1)[-1], 80)),
                "modality": words(cut(metric["modality"] or "", 40)),
                "bars": [None if v is None else (max(round(100 * (v - low) / span), 2), cell(v)) for v in values],
                "text": ", ".join("not measured" if v is None else cell(v) for v in values),
            }
        )
    return found[:6]


def _value_in(row: Mapping[str, Any], metric: Mapping[str, Any]) -> float | None:
    wanted = (metric["job"], metric["id"], metric["modality"], str(metric["version"]))
    values = [m["value"] for m in row["metrics"] if (m["job"], m["id"], m["modality"], m["version"]) == wanted]
    return values[0] if values else None


def _artifacts(artifacts: Sequence[Mapping[str, Any]]) -> Table | None:
    if not artifacts:
        return None
    rows = [{"path": a["path"], "size": bytes_text(a["size"]), "sha256": a["sha256"]} for a in artifacts]
    table = object_table("Artifacts", rows[:MAX_ARTIFACTS])
    return Table(table.title, table.columns, table.rows, (False, False, False), table.note)


def _moment(value: Any) -> str:
    """`2026-01-02 03:04 UTC`; empty where no time is known."""
    moment = utc_text(value)
    return f"{moment[:10]} {moment[11:16]} UTC" if moment else ""


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
