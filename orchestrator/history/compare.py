"""What changed between two runs on the same lineage. Pure."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from orchestrator.history.rows import HistoryRow, MetricValue
from remote_payload.wire.codec import to_json

RELATIVE_TOLERANCE = 0.02
"""Of a metric's distance from chance (its size where it has no chance level): smaller differences are no change."""
_RANK = {"pass": 0, "warn": 1, "fail": 2}
_WORDS = {"pass": "pass", "warn": "warning", "fail": "fail", "not_measured": "not measured"}


@dataclasses.dataclass(frozen=True)
class Change:
    """One difference. `tolerance` is what a metric may differ by without counting; None for verdicts and findings."""

    kind: Literal["regression", "improvement"]
    of: Literal["dimension", "metric", "finding"]
    name: str
    earlier: str | float | None
    current: str | float | None
    sentence: str
    tolerance: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(to_json(self))


def compare(current: HistoryRow, earlier: HistoryRow) -> tuple[Change, ...]:
    """Every change of verdict, metric and finding from `earlier` to `current`, regressions first."""
    same_jobs = set(earlier.jobs) <= set(current.jobs)
    changes = [*_dimensions(current, earlier, same_jobs), *_metrics(current, earlier, same_jobs)]
    if same_jobs:
        changes += _findings(current, earlier)
    return tuple(sorted(changes, key=lambda c: c.kind != "regression"))


def regressions(current: HistoryRow, earlier: HistoryRow) -> tuple[Change, ...]:
    """What got worse: a dimension's verdict, a metric by its direction beyond its tolerance, or a new error.

    A dimension or metric that was measured and is not any more counts where the same jobs were asked for. What was not
    measured before cannot have got worse.
    """
    return tuple(c for c in compare(current, earlier) if c.kind == "regression")


def _dimensions(current: HistoryRow, earlier: HistoryRow, same_jobs: bool) -> list[Change]:
    changes = []
    for name, before in earlier.dimensions.items():
        now = current.dimensions.get(name, "not_measured")
        if before == now or before not in _RANK:
            continue
        label = name.replace("_", " ")
        sentence = f"{label}: {_WORDS[before]}, now {_WORDS.get(now, now)}"
        if now in _RANK:
            kind: Literal["regression", "improvement"] = "regression" if _RANK[now] > _RANK[before] else "improvement"
            changes.append(Change(kind, "dimension", name, before, now, sentence))
        elif same_jobs:
            changes.append(Change("regression", "dimension", name, before, now, sentence))
    return changes


def _metrics(current: HistoryRow, earlier: HistoryRow, same_jobs: bool) -> list[Change]:
    now_by_key = {m.key: m for m in current.metrics}
    changes = []
    for before in earlier.metrics:
        now = now_by_key.get(before.key)
        if before.value is None:
            continue
        if now is None or now.value is None:
            if same_jobs and now is not None:
                sentence = f"{before.name}: was {before.value:.4g}, now not measured"
                changes.append(Change("regression", "metric", before.name, before.value, None, sentence))
            continue
        change = _metric_change(now, before, now.value, before.value)
        if change:
            changes.append(change)
    return changes


def _metric_change(now: MetricValue, before: MetricValue, value: float, was: float) -> Change | None:
    if now.direction not in ("higher", "lower"):
        return None
    tolerance = metric_tolerance(now, before)
    gain = value - was if now.direction == "higher" else was - value
    if abs(gain) <= tolerance:
        return None
    kind: Literal["regression", "improvement"] = "improvement" if gain > 0 else "regression"
    word = "better" if gain > 0 else "worse"
    sentence = f"{now.name}: {was:.4g} → {value:.4g}, {word} ({now.direction} is better)"
    return Change(kind, "metric", now.name, was, value, sentence, tolerance)


def metric_tolerance(now: MetricValue, before: MetricValue) -> float:
    """The larger of 2 % of the earlier value's distance from chance and both intervals' half-widths in quadrature."""
    was = before.value or 0.0
    relative = RELATIVE_TOLERANCE * abs(was - (before.chance or 0.0))
    halves = [(m.interval[1] - m.interval[0]) / 2 for m in (now, before) if m.interval and len(m.interval) == 2]
    return max(relative, math.hypot(*halves) if len(halves) == 2 else 0.0)


def _findings(current: HistoryRow, earlier: HistoryRow) -> list[Change]:
    changes = []
    for name, severity in current.findings.items():
        if severity == "error" and earlier.findings.get(name) != "error":
            before = earlier.findings.get(name)
            changes.append(Change("regression", "finding", name, before, severity, f"new error: {name}"))
    for name, severity in earlier.findings.items():
        if severity == "error" and name not in current.findings:
            changes.append(Change("improvement", "finding", name, severity, None, f"no longer found: {name}"))
    return changes
