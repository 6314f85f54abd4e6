"""A metric as a row of the report: its words, and its bar against chance and baselines. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from orchestrator.report.format import cell, cut, number_text, words

MAX_BASELINES = 12
_NOT_DEMANDED = frozenset({"previous_sample"})
"""It knows the truth a moment ago: a level to see the numbers by, and none that a model must reach."""
_WITHOUT_VALUE = "baselines_without_value"
"""The key of a metric's details that says why baselines have no value."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A mark on a bar at `at` percent from its left end."""

    kind: str
    at: int
    label: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """Marks on one common scale; the interval covers `width` percent from `start`. `text` says it all in words."""

    marks: tuple[Mark, ...]
    start: int | None
    width: int | None
    low: str
    high: str
    text: str


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """`tone` is good, bad, plain or none (not measured). `id` is empty where the name says as much."""

    name: str
    id: str
    modality: str
    job: str
    value: str
    unit: str
    interval: str
    n: str
    chance: str
    baselines: tuple[tuple[str, str], ...]
    parameters: str
    direction: str
    tone: str
    judgement: str
    bar: Bar | None


def metric_row(metric: Mapping[str, Any]) -> MetricRow:
    """Everything that the page shows of one metric of results.json."""
    shown = {cut(name, 60): value for name, value in list(metric["baselines"].items())[:MAX_BASELINES]}
    metric = {**metric, "baselines": shown}
    tone, judgement = judge(metric)
    interval = metric["interval"]
    direction = metric["direction"]
    name = words(cut(metric["id"].rsplit(".", 1)[-1], 80))
    return MetricRow(
        name=name,
        id="" if words(metric["id"]) == name else cut(metric["id"], 120),
        modality=words(cut(metric["modality"] or "", 40)),
        job=metric["job"],
        value=number_text(metric["value"]),
        unit="" if metric["unit"] in (None, "1") else cut(metric["unit"], 40),
        interval=f"{number_text(interval[0])} to {number_text(interval[1])}" if interval else "",
        n=number_text(metric["n"]),
        chance=number_text(metric["chance"]),
        baselines=tuple((words(name), _baseline_text(metric, name, value)) for name, value in shown.items()),
        parameters=cut("; ".join(f"{k} {cell(v)}" for k, v in _stated(metric).items())),
        direction=f"{direction} is better" if direction else "",
        tone=tone,
        judgement=judgement,
        bar=_bar(metric),
    )


def judge(metric: Mapping[str, Any]) -> tuple[str, str]:
    """(tone, sentence) of a metric against its chance level and baselines; empty where the numbers carry no claim."""
    value, chance, interval = metric["value"], metric["chance"], metric["interval"]
    if value is None:
        return "none", cut(f"Not measured: {metric['reason']}")
    demanded = {n: v for n, v in metric["baselines"].items() if v is not None and n not in _NOT_DEMANDED}
    unbeaten = [words(n).lower() for n, v in demanded.items() if not _beats(metric, v)]
    loses = f"does not beat {_and(unbeaten)}" if unbeaten and metric["direction"] else ""
    if chance is None or metric["direction"] is None:
        beats = "beats every baseline" if demanded and metric["direction"] and not unbeaten else ""
        return ("bad" if loses else "good" if beats else "plain"), _capital(loses or beats)
    if interval and interval[0] <= chance <= interval[1]:
        return "bad", _capital("; ".join(filter(None, ["cannot be told from chance", loses])))
    if not _beats(metric, chance):
        return "bad", _capital("; ".join(filter(None, ["no better than chance", loses])))
    sure = "" if interval else " (no interval given)"
    return ("bad" if loses else "good"), _capital("; ".join(filter(None, [f"better than chance{sure}", loses])))


def _baseline_text(metric: Mapping[str, Any], name: str, value: Any) -> str:
    if value is not None:
        return number_text(value)
    reasons = metric.get("details", {}).get(_WITHOUT_VALUE)
    reason = reasons.get(name) if isinstance(reasons, Mapping) else None
    return f"not measured: {cut(reason, 120)}" if isinstance(reason, str) else "not measured"


def _stated(metric: Mapping[str, Any]) -> dict[str, Any]:
    """What came out beside the value before what the value depends on: p is what readers look for."""
    details = {k: v for k, v in metric.get("details", {}).items() if v is not None and k != _WITHOUT_VALUE}
    return {**details, **metric["parameters"]}


def _beats(metric: Mapping[str, Any], other: float) -> bool:
    value = metric["value"]
    if value is None:
        return False
    return bool(value > other) if metric["direction"] == "higher" else bool(value < other)


def _bar(metric: Mapping[str, Any]) -> Bar | None:
    value, chance, interval = metric["value"], metric["chance"], metric["interval"]
    baselines = {n: v for n, v in metric["baselines"].items() if v is not None}
    points = [v for v in (value, chance, *(interval or ()), *baselines.values()) if v is not None]
    if value is None or len(points) < 2 or min(points) == max(points):
        return None
    low, high = float(min(points)), float(max(points))
    pad = (high - low) * 0.05
    low, high = low - pad, high + pad
    if not high - low < float("inf"):
        return None

    def at(point: float) -> int:
        return round((point - low) / (high - low) * 100)

    marks = [Mark("baseline", at(v), f"{words(n)} {number_text(v)}") for n, v in baselines.items()]
    if chance is not None:
        marks.append(Mark("chance", at(chance), f"Chance {number_text(chance)}"))
    marks.append(Mark("value", at(value), f"Value {number_text(value)}"))
    start = at(interval[0]) if interval else None
    width = max(at(interval[1]) - at(interval[0]), 1) if interval else None
    return Bar(
        tuple(marks),
        start,
        width,
        number_text(min(points)),
        number_text(max(points)),
        ", ".join(m.label for m in marks),
    )


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
