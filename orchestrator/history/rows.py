"""One run as the history keeps it."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remote_payload.wire.codec import from_json, to_json


@dataclasses.dataclass(frozen=True)
class MetricValue:
    """A metric's value in one run. `parameters_key` digests its parameters: only equal ones are comparable."""

    job: str
    id: str
    version: str
    modality: str | None
    parameters_key: str
    value: float | None
    direction: str | None = None
    chance: float | None = None
    interval: tuple[float, ...] | None = None
    unit: str | None = None
    n: int | None = None

    @property
    def key(self) -> tuple[str, str, str, str | None, str, str | None]:
        """Equal for values that may be compared."""
        return self.job, self.id, self.version, self.modality, self.parameters_key, self.unit

    @property
    def name(self) -> str:
        """`id` with the modality that it is about, for people."""
        return f"{self.id} ({self.modality})" if self.modality else self.id


@dataclasses.dataclass(frozen=True)
class HistoryRow:
    """A run's summary. `created_at` is ISO 8601 in UTC; `checkpoint_identity` is the digest, else the fingerprint.

    Runs are comparable when their `lineage` is equal (checkpoint reference, config, adapter), or their `target_lineage`
    (nightly target, config, adapter). `findings` maps the ids of errors and warnings to their worst severity.
    """

    run_id: str
    created_at: str | None
    cluster: str
    checkpoint: str
    checkpoint_identity: str | None
    config: str | None
    adapter: str | None
    lineage: str
    target_lineage: str | None
    jobs: tuple[str, ...]
    state: str
    overall: str
    sentence: str
    dimensions: dict[str, str]
    metrics: tuple[MetricValue, ...] = ()
    findings: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dict(to_json(self))

    @classmethod
    def from_json(cls, value: Any) -> HistoryRow:
        """Raises `WireError` for what is no row."""
        return from_json(cls, value)

    @property
    def key_metrics(self) -> dict[str, float]:
        """Name → value of what was measured, worth showing first: with a chance level, one a modality."""
        valued = [m for m in self.metrics if m.value is not None]
        ranked = sorted(valued, key=lambda m: m.chance is None)
        seen: set[str | None] = set()
        first: list[MetricValue] = []
        rest: list[MetricValue] = []
        for metric in ranked:
            (rest if metric.modality in seen else first).append(metric)
            seen.add(metric.modality)
        return {m.name: m.value for m in [*first, *rest] if m.value is not None}


def row_from_results(results: Mapping[str, Any]) -> HistoryRow:
    """The row of a results.json. Raises `KeyError` or `TypeError` for what is none."""
    run, provenance, verdict = results["run"], results["provenance"], results["verdict"]
    return HistoryRow(
        run_id=run["run_id"],
        created_at=utc_text(provenance.get("created_at")),
        cluster=run["cluster"] or "",
        checkpoint=run["checkpoint"] or "",
        checkpoint_identity=checkpoint_identity(provenance),
        config=run["config"],
        adapter=run["adapter"],
        lineage=lineage(run),
        target_lineage=target_lineage(run),
        jobs=tuple(run["jobs"]),
        state=results["attempt"]["state"],
        overall=verdict["overall"],
        sentence=verdict["sentence"],
        dimensions=dict(verdict["dimensions"]),
        metrics=tuple(_metric_value(m) for m in results["metrics"]),
        findings=_finding_ids(results["findings"]),
    )


def lineage(run: Mapping[str, Any]) -> str:
    """What makes two runs comparable, as text: checkpoint reference, config (its digest where known) and adapter.

    A relative local checkpoint path counts from the project folder, so that two projects' `best.pt` stay apart.
    """
    checkpoint = str(run["checkpoint"])
    is_local = ":" not in checkpoint.split("/")[0]
    if is_local and not checkpoint.startswith(("/", "~")) and run.get("project_folder"):
        checkpoint = str(Path(run["project_folder"]) / checkpoint)
    return json.dumps([checkpoint, *_setting(run)])


def target_lineage(run: Mapping[str, Any]) -> str | None:
    """The same by nightly target, whose checkpoint may be another file each night; None for other runs."""
    target = run.get("nightly_target")
    return json.dumps([target, *_setting(run)]) if target else None


def _setting(run: Mapping[str, Any]) -> list[Any]:
    return [run.get("config_sha256") or run.get("config"), run.get("adapter")]


def checkpoint_identity(provenance: Mapping[str, Any]) -> str | None:
    """The checkpoint's digest, else its fingerprint as text, else None."""
    nested = provenance.get("checkpoint")
    source = nested if isinstance(nested, Mapping) else {}
    digest = provenance.get("checkpoint_digest") or source.get("digest")
    if isinstance(digest, str):
        return digest
    fingerprint = provenance.get("checkpoint_fingerprint") or source.get("fingerprint")
    return f"fingerprint:{json.dumps(fingerprint, sort_keys=True)}" if fingerprint else None


def utc_text(value: Any) -> str | None:
    """ISO 8601 in UTC to the second, from ISO text or Unix seconds; None for anything else."""
    try:
        if isinstance(value, str):
            moment = datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=datetime.timezone.utc)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            moment = datetime.datetime.fromtimestamp(value, datetime.timezone.utc)
        else:
            return None
        return moment.astimezone(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return None


def _metric_value(metric: Mapping[str, Any]) -> MetricValue:
    parameters = json.dumps(metric["parameters"], sort_keys=True)
    value, chance, interval = metric["value"], metric["chance"], metric["interval"]
    return MetricValue(
        job=metric["job"],
        id=metric["id"],
        version=str(metric["version"]),
        modality=metric["modality"],
        parameters_key=hashlib.sha256(parameters.encode()).hexdigest()[:16],
        value=None if value is None else float(value),
        direction=metric["direction"],
        chance=None if chance is None else float(chance),
        interval=None if interval is None else (float(interval[0]), float(interval[1])),
        unit=metric["unit"],
        n=metric["n"],
    )


def _finding_ids(findings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Finding id → its worst severity, for errors and warnings."""
    ids: dict[str, str] = {}
    for finding in findings:
        if finding["severity"] == "error":
            ids[finding["id"]] = "error"
        elif finding["severity"] == "warning":
            ids.setdefault(finding["id"], "warning")
    return ids
