"""Low-rank adapters that add nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from remote_payload.checkpoint.header import Section, TensorEntry
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.health.stats import TensorStats
from remote_payload.wire.results import Dimension, Finding, Severity

_SECOND_FACTOR = re.compile(r"(^|[._])lora_(b|up|embedding_b)([._]|$)", re.IGNORECASE)


def _factors(facts: HealthFacts) -> list[tuple[TensorEntry, TensorStats]]:
    return [(t, s) for t, s in facts.measured(section=Section.MODEL) if _SECOND_FACTOR.search(t.name)]


def _b_zero(facts: HealthFacts) -> Iterator[Finding]:
    factors = _factors(facts)
    zero = [t for t, s in factors if s.zero_fraction == 1.0]
    if not zero:
        return
    steps = facts.steps_trained()
    severity = Severity.INFO
    if steps:
        severity = Severity.ERROR if len(zero) == len(factors) else Severity.WARNING
    yield Finding(
        id="lora.b_zero",
        severity=severity,
        title=f"{len(zero)} of {len(factors)} low-rank adapters are exactly 0",
        dimension=Dimension.NUMERICS,
        where=tuple(t.name[:200] for t in zero[:50]),
        evidence={"zero": len(zero), "adapters": len(factors), "steps_trained": steps},
        explanation="An adapter adds B times A to a weight, and B starts at 0. Still 0 after training means that this "
        "adapter never got a step: with it the model is its base."
        + ("" if steps else " The file does not say that it was trained, so it may be a fresh adapter."),
        confidence=0.95 if steps else 0.6,
        refuted_by="An adapter that was saved before its first step.",
        action="Check that the adapter's parameters are in the optimizer and that its layers are used.",
    )


CHECKS = (
    Check(
        Dimension.NUMERICS,
        "low-rank adapters",
        _b_zero,
        lambda facts: bool(_factors(facts)),
        can_pass=False,
    ),
)
