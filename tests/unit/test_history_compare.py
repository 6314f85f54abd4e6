"""What counts as a change between two runs."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.history import HistoryRow, MetricValue, compare, regressions

BASE = HistoryRow(
    run_id="r",
    created_at=None,
    cluster="c",
    checkpoint="p",
    checkpoint_identity=None,
    config=None,
    adapter=None,
    lineage="l",
    target_lineage=None,
    jobs=("health",),
    state="succeeded",
    overall="pass",
    sentence="",
    dimensions={"numerics": "pass"},
)


def value(number: float | None, **over: object) -> MetricValue:
    given = MetricValue("reconstruct", "ssim", "1", "video", "k", number, "higher", chance=0.0)
    return dataclasses.replace(given, **over)  # type: ignore[arg-type]


def pair(before: MetricValue, now: MetricValue, **over: object) -> list[tuple[str, str]]:
    earlier = dataclasses.replace(BASE, metrics=(before,))
    current = dataclasses.replace(BASE, metrics=(now,), **over)  # type: ignore[arg-type]
    return [(c.kind, c.of) for c in compare(current, earlier)]


@pytest.mark.parametrize(
    ("before", "now", "kinds"),
    [
        ("pass", "pass", []),
        ("pass", "warn", ["regression"]),
        ("pass", "fail", ["regression"]),
        ("warn", "fail", ["regression"]),
        ("fail", "warn", ["improvement"]),
        ("pass", "not_measured", ["regression"]),
        ("fail", "not_measured", ["regression"]),
        ("not_measured", "pass", []),
        ("not_measured", "fail", []),
    ],
)
def test_a_dimension_gets_worse_only_from_what_was_measured(before: str, now: str, kinds: list[str]) -> None:
    earlier = dataclasses.replace(BASE, dimensions={"numerics": before})
    current = dataclasses.replace(BASE, dimensions={"numerics": now})
    assert [c.kind for c in compare(current, earlier)] == kinds


def test_what_was_not_asked_for_this_time_is_no_regression() -> None:
    earlier = dataclasses.replace(BASE, jobs=("health", "reconstruct"), dimensions={"task_evidence": "pass"})
    current = dataclasses.replace(BASE, dimensions={"task_evidence": "not_measured"})
    assert regressions(current, earlier) == ()


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (value(0.5), value(0.495), []),
        (value(0.5), value(0.48), [("regression", "metric")]),
        (value(0.5), value(0.52), [("improvement", "metric")]),
        (value(0.5, direction="lower"), value(0.52, direction="lower"), [("regression", "metric")]),
        (value(0.5, direction=None), value(0.1, direction=None), []),
        (value(0.5), value(None), [("regression", "metric")]),
        (value(None), value(0.1), []),
        (value(0.5), value(0.1, parameters_key="other"), []),
        (value(0.5), value(0.1, version="2"), []),
        (value(0.5), value(0.1, unit="dB"), []),
        (value(0.52, chance=0.5), value(0.51, chance=0.5), [("regression", "metric")]),
        (value(0.5, interval=(0.4, 0.6)), value(0.45, interval=(0.35, 0.55)), []),
        (value(0.5, interval=(0.4, 0.6)), value(0.3, interval=(0.2, 0.4)), [("regression", "metric")]),
    ],
)
def test_a_metric_changes_only_beyond_its_tolerance(
    before: MetricValue, now: MetricValue, expected: list[tuple[str, str]]
) -> None:
    assert pair(before, now) == expected


def test_a_new_error_is_a_regression_and_a_gone_one_an_improvement() -> None:
    clean = dataclasses.replace(BASE, findings={"b": "warning"})
    dirty = dataclasses.replace(BASE, findings={"a": "error", "b": "error"})
    assert [(c.kind, c.name) for c in compare(dirty, clean)] == [("regression", "a"), ("regression", "b")]
    assert [(c.kind, c.name) for c in compare(clean, dirty)] == [("improvement", "a")]


def test_regressions_stand_before_improvements() -> None:
    earlier = dataclasses.replace(BASE, dimensions={"integrity": "fail", "numerics": "pass"})
    current = dataclasses.replace(BASE, dimensions={"integrity": "pass", "numerics": "fail"})
    assert [c.kind for c in compare(current, earlier)] == ["regression", "improvement"]
