"""Weights that do not vary."""

from __future__ import annotations

from collections.abc import Iterator

from remote_payload.checkpoint.header import Role, Section
from remote_payload.health.checks.check import Check, has_statistics
from remote_payload.health.facts import HealthFacts
from remote_payload.wire.results import Dimension, Finding, Severity

_MATRICES = (Role.WEIGHT_MATRIX, Role.EMBEDDING)


def _constant_matrices(facts: HealthFacts) -> Iterator[Finding]:
    constant = [
        (t, s)
        for t, s in facts.measured(*_MATRICES, section=Section.MODEL)
        if s.is_constant and "lora_" not in t.name.lower()
    ]
    if constant:
        yield Finding(
            id="weights.constant",
            severity=Severity.WARNING,
            title=f"{len(constant)} weight matrices hold one value only",
            dimension=Dimension.NUMERICS,
            where=tuple(t.name[:200] for t, _ in constant[:50]),
            evidence={
                "tensors": [{"tensor": t.name[:200], "value": s.minimum, "of": s.count} for t, s in constant[:20]]
            },
            explanation="A matrix of equal values passes on nothing but the sum of its inputs; one of zeros passes on "
            "nothing. Training makes no such matrix: it was never initialised, never trained, or zeroed.",
            confidence=0.9,
            refuted_by="A layer that starts at zero by design and was not trained yet.",
            action="Check that the layer is part of the model that is trained and of its optimizer.",
        )


def _constant_biases(facts: HealthFacts) -> Iterator[Finding]:
    constant = [(t, s) for t, s in facts.measured(Role.BIAS, Role.NORM_SHIFT, section=Section.MODEL) if s.is_constant]
    if constant and facts.steps_trained() > 0:
        yield Finding(
            id="weights.constant",
            severity=Severity.INFO,
            title=f"{len(constant)} biases hold one value only after training",
            dimension=Dimension.NUMERICS,
            where=tuple(t.name[:200] for t, _ in constant[:50]),
            evidence={
                "tensors": [{"tensor": t.name[:200], "value": s.minimum, "of": s.count} for t, s in constant[:20]]
            },
            explanation="A bias that is still exactly 0 had a gradient of exactly 0 (it stands in front of a "
            "normalisation, which takes any constant away again) or is no part of the optimizer. Rounding cannot "
            "hold a value at 0.",
            confidence=0.8,
            refuted_by="A non-zero second moment for this bias in the optimizer's state.",
            action="None if a normalisation follows; such a bias can be left out of the model.",
        )


CHECKS = (
    Check(Dimension.NUMERICS, "constant weight matrices", _constant_matrices, has_statistics),
    Check(Dimension.NUMERICS, "constant biases", _constant_biases, has_statistics),
)
