"""The verdict's words."""

from __future__ import annotations

import itertools

import pytest

from orchestrator.report.metrics_view import judge, metric_row
from orchestrator.report.verdict import verdict_sentence
from remote_payload.wire.results import Dimension, Outcome, overall_outcome

NAMES = [d.value for d in Dimension]


def results(dimensions: dict[str, str], state: str = "succeeded", cause: str | None = None) -> dict:
    overall = overall_outcome({d: Outcome(o) for d, o in dimensions.items()}).value
    return {
        "verdict": {"overall": overall, "dimensions": dimensions},
        "attempt": {"state": state, "cause": cause},
    }


def test_failing_dimensions_are_named_first() -> None:
    given = dict(zip(NAMES, ["pass", "fail", "fail", "warn", "not_measured"], strict=True))
    assert verdict_sentence(results(given)) == (
        "Not usable: provenance and numerics fail; training dynamics have warnings; "
        "task evidence was not measured; integrity passes."
    )


def test_no_combination_calls_usable_what_was_not_measured() -> None:
    for outcomes in itertools.product(["pass", "warn", "fail", "not_measured"], repeat=5):
        sentence = verdict_sentence(results(dict(zip(NAMES, outcomes, strict=True))))
        claims = sentence.startswith("Usable:")
        assert claims == (set(outcomes) == {"pass"}), sentence
        assert ("not measured" in sentence or "nothing was measured" in sentence) == ("not_measured" in outcomes)
        assert sentence.startswith("Not usable") == ("fail" in outcomes)


def metric(value: float | None, direction: str | None = "higher", **over: object) -> dict:
    return {
        "job": "reconstruct",
        "id": "a.b",
        "version": 1,
        "modality": None,
        "value": value,
        "reason": "why",
        "unit": None,
        "n": 3,
        "direction": direction,
        "chance": None,
        "interval": None,
        "baselines": {},
        "parameters": {},
        **over,
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (metric(None), ("none", "Not measured: why")),
        (metric(0.3, chance=0.1, interval=[0.2, 0.4]), ("good", "Better than chance")),
        (metric(0.3, chance=0.1), ("good", "Better than chance (no interval given)")),
        (metric(0.3, chance=0.1, interval=[0.05, 0.4]), ("bad", "Cannot be told from chance")),
        (metric(0.05, chance=0.1, interval=[0.02, 0.08]), ("bad", "No better than chance")),
        (metric(0.05, "lower", chance=0.1, interval=[0.02, 0.08]), ("good", "Better than chance")),
        (metric(0.3, baselines={"train_mean": 0.4, "shuffled": 0.1}), ("bad", "Does not beat train mean")),
        (metric(0.5, baselines={"train_mean": 0.4}), ("good", "Beats every baseline")),
        (metric(0.4, baselines={"train_mean": 0.4}), ("bad", "Does not beat train mean")),
        (metric(0.3, None, chance=0.1, baselines={"train_mean": 0.4}), ("plain", "")),
        (metric(0.5, baselines={"previous_sample": 0.9}), ("plain", "")),
        (metric(0.5, baselines={"train_mean": 0.4, "previous_sample": 0.9}), ("good", "Beats every baseline")),
        (metric(0.5, baselines={"train_mean": None, "ridge": 0.6}), ("bad", "Does not beat ridge")),
    ],
)
def test_a_metric_is_judged_by_its_numbers_alone(given: dict, expected: tuple[str, str]) -> None:
    assert judge(given) == expected


def test_a_bars_marks_lie_on_one_scale_within_the_bar() -> None:
    row = metric_row(metric(0.3, chance=-0.1, interval=[0.2, 0.4], baselines={"train_mean": 1.9, "unknown": None}))
    assert row.bar is not None
    at = {mark.kind: mark.at for mark in row.bar.marks}
    assert 0 <= at["chance"] < at["value"] < at["baseline"] <= 100
    assert row.bar.start is not None
    assert row.bar.start < at["value"] < row.bar.start + (row.bar.width or 0)


def test_a_baseline_without_a_value_is_shown_with_its_reason() -> None:
    told = {"baselines_without_value": {"ridge": "inputs are no numbers"}, "p": 0.01}
    row = metric_row(metric(0.5, baselines={"train_mean": 0.4, "ridge": None, "odd": None}, details=told))
    assert row.baselines == (
        ("Train mean", "0.4"),
        ("Ridge", "not measured: inputs are no numbers"),
        ("Odd", "not measured"),
    )
    assert row.parameters == "p 0.01"


@pytest.mark.parametrize("value", [1e308, -1e308])
def test_numbers_too_far_apart_for_a_scale_get_no_bar(value: float) -> None:
    assert metric_row(metric(value, chance=-value, baselines={"b": value})).bar is None
