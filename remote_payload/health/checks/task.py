"""What the file's own figures say about the task. They can fail it; they never pass it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.health.training_record import Series, training_record
from remote_payload.wire.results import Dimension, Finding, Severity

_CORRELATION = re.compile(r"corr|pearson|spearman", re.IGNORECASE)
_AT_CHANCE = 0.02
"""Correlations of smooth, autocorrelated signals scatter around 0 by about this much even over many samples."""


def _correlations(facts: HealthFacts) -> list[Series]:
    return [s for s in training_record(facts.header).series if s.held_out and _CORRELATION.search(s.name)]


def _chance_level(facts: HealthFacts) -> Iterator[Finding]:
    for series in _correlations(facts):
        best = max(series.values, key=abs)
        if abs(best) >= _AT_CHANCE:
            continue
        yield Finding(
            id="task.chance_level",
            severity=Severity.ERROR,
            title=f"{series.name[:100]} never left chance: {series.values[-1]:.4g} at the end",
            dimension=Dimension.TASK_EVIDENCE,
            where=(series.name[:200],),
            evidence={
                "last": series.values[-1],
                "furthest_from_zero": best,
                "chance": 0.0,
                "threshold": _AT_CHANCE,
                "epochs": len(series.values),
            },
            explanation="A correlation this close to 0 is what a predictor that knows nothing gets. Counting every "
            "voxel and volume as independent makes it look significant; neighbours in space and time are not "
            "independent.",
            confidence=0.85,
            refuted_by="A permutation test that keeps the autocorrelation, on held-out data, above chance.",
            action="Run the reconstruct job, which measures the task with chance levels and baselines.",
        )


CHECKS = (
    Check(
        Dimension.TASK_EVIDENCE,
        "correlations in the histories",
        _chance_level,
        lambda facts: bool(_correlations(facts)),
        can_pass=False,
    ),
)
