"""The lab's table: classes of entries with their counts, tensors of standard deviation 0, and large values."""

from __future__ import annotations

from typing import Any

from remote_payload.checkpoint.header import Role, Section
from remote_payload.health.facts import HealthFacts

_MOST_LISTED = 200


def classes(facts: HealthFacts) -> dict[str, Any]:
    """Counts by class, what each role's values come to over all its tensors, constants, and what fp16 cannot hold.

    Constants are of the model's parameters and running statistics; counters are neither and are left out.
    """
    return {
        "counts": dict(facts.header.class_counts),
        "by_role": _by_role(facts),
        "std_zero": _std_zero(facts),
        "large_values": _large_values(facts),
    }


def _by_role(facts: HealthFacts) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for role in Role:
        measured = list(facts.measured(role))
        minima = [s.minimum for _, s in measured if s.minimum is not None]
        maxima = [s.maximum for _, s in measured if s.maximum is not None]
        if measured:
            table[role.value] = {
                "tensors": len(measured),
                "elements": sum(s.count for _, s in measured),
                "nan": sum(s.nan for _, s in measured),
                "inf": sum(s.inf for _, s in measured),
                "constant_tensors": sum(1 for _, s in measured if s.is_constant),
                "minimum": min(minima, default=None),
                "maximum": max(maxima, default=None),
            }
    return table


def _std_zero(facts: HealthFacts) -> list[dict[str, Any]]:
    found = [
        {"tensor": t.name[:200], "role": t.role.value, "value": s.minimum, "of": s.count}
        for t, s in facts.measured(section=Section.MODEL)
        if s.is_constant and t.role is not Role.COUNTER
    ]
    return found[:_MOST_LISTED]


def _large_values(facts: HealthFacts) -> list[dict[str, Any]]:
    found = [
        {
            "tensor": t.name[:200],
            "role": t.role.value,
            "minimum": s.minimum,
            "maximum": s.maximum,
            "values": s.over_fp16,
        }
        for t, s in facts.measured(section=Section.MODEL)
        if s.over_fp16 and t.role is not Role.COUNTER
    ]
    return found[:_MOST_LISTED]
