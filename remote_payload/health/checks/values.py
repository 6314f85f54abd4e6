"""Values that no tensor should have: NaN, infinities, and what fp16 cannot hold."""

from __future__ import annotations

from collections.abc import Iterator

from remote_payload.checkpoint.dtypes import is_floating
from remote_payload.checkpoint.header import Section, TensorEntry
from remote_payload.health.checks.check import Check, has_statistics
from remote_payload.health.facts import HealthFacts
from remote_payload.health.stats import FP16_MAX, TensorStats
from remote_payload.wire.results import Dimension, Finding, Severity

_MANY_DENORMALS = 0.01
_MOSTLY_DENORMAL = 0.5
Measured = list[tuple[TensorEntry, TensorStats]]


def _nan(facts: HealthFacts) -> Iterator[Finding]:
    bad = [(t, s) for t, s in facts.measured() if s.nan]
    if bad:
        yield Finding(
            id="values.nan",
            severity=Severity.ERROR,
            title=f"{sum(s.nan for _, s in bad):,} NaN in {len(bad)} tensors",
            dimension=Dimension.NUMERICS,
            where=_names(bad),
            evidence={"tensors": [_bad(t, s, s.nan, s.first_nan) for t, s in bad[:20]]},
            explanation="One NaN in a weight makes every output that it reaches NaN; one in an optimizer moment "
            "makes its weight NaN at the next step.",
            refuted_by="A tensor that the model never uses.",
            action="Go back to the last checkpoint without NaN and look for the step at which it appeared.",
        )


def _inf(facts: HealthFacts) -> Iterator[Finding]:
    # A mask filled with -inf is a buffer by design; only what is trained or averaged counts.
    bad = [(t, s) for t, s in facts.measured() if s.inf and not _is_mask(t, s)]
    if bad:
        yield Finding(
            id="values.inf",
            severity=Severity.ERROR,
            title=f"{sum(s.inf for _, s in bad):,} infinities in {len(bad)} tensors",
            dimension=Dimension.NUMERICS,
            where=_names(bad),
            evidence={"tensors": [_bad(t, s, s.inf, s.first_inf) for t, s in bad[:20]]},
            explanation="An infinity overflowed its type; the next operation on it makes NaN.",
            refuted_by="A buffer that is meant to hold infinities, such as an attention mask.",
            action="Find the overflow: the tensor's type, the learning rate and gradient clipping at that step.",
        )


def _is_mask(tensor: TensorEntry, stats: TensorStats) -> bool:
    only_minus = stats.positive_inf == 0 and stats.minimum in (0.0, None) and stats.maximum in (0.0, None)
    return tensor.section is Section.MODEL and tensor.role.value == "other" and only_minus


def _fp16_overflow(facts: HealthFacts) -> Iterator[Finding]:
    large = [(t, s) for t, s in facts.measured(section=Section.MODEL) if s.over_fp16 and is_floating(t.dtype)]
    if large:
        yield Finding(
            id="values.fp16_overflow",
            severity=Severity.INFO,
            title=f"{len(large)} tensors hold values that fp16 turns into infinities",
            dimension=Dimension.NUMERICS,
            where=_names(large),
            evidence={
                "largest_fp16": FP16_MAX,
                "tensors": [
                    {"tensor": t.name[:200], "values": s.over_fp16, "minimum": s.minimum, "maximum": s.maximum}
                    for t, s in large[:20]
                ],
            },
            explanation="Converted to fp16 for inference these values overflow. In the type they are stored in they "
            "are finite.",
            refuted_by="A conversion that rescales or leaves these tensors in a wider type.",
            action="Keep them in float32 or bfloat16 when the model is exported.",
        )


def _denormal(facts: HealthFacts) -> Iterator[Finding]:
    found = [
        (t, s)
        for t, s in facts.measured(section=Section.MODEL)
        if (s.denormal_fraction or 0.0) >= _MANY_DENORMALS and s.count >= 16
    ]
    if not found:
        return
    # fp16's normal numbers end at 6e-5, which small weights are below by nature.
    wide = [(t, s) for t, s in found if t.dtype != "float16" and (s.denormal_fraction or 0.0) >= _MOSTLY_DENORMAL]
    yield Finding(
        id="values.denormal",
        severity=Severity.WARNING if wide else Severity.INFO,
        title=f"{len(found)} tensors hold subnormal numbers",
        dimension=Dimension.NUMERICS,
        where=_names(found),
        evidence={
            "tensors": [
                {
                    "tensor": t.name[:200],
                    "dtype": t.dtype,
                    "denormal_fraction": s.denormal_fraction,
                    "largest": s.abs_max,
                    "of": s.count,
                }
                for t, s in found[:20]
            ]
        },
        explanation="Subnormal numbers have fewer digits the smaller they are, are 0 on hardware that flushes them, "
        "and slow down processors that do not. In weights of float32 or bfloat16 they are what weight decay leaves of "
        "units that get no gradient.",
        confidence=0.9,
        refuted_by="A scale factor elsewhere that brings these values back to a normal size.",
        action="Set them to 0, or prune the units; in float16 keep the tensor in a wider type.",
    )


def _names(found: Measured) -> tuple[str, ...]:
    return tuple(t.name[:200] for t, _ in found[:50])


def _bad(tensor: TensorEntry, stats: TensorStats, count: int, first: tuple[tuple[int, ...], ...]) -> dict[str, object]:
    return {
        "tensor": tensor.name[:200],
        "role": tensor.role.value,
        "count": count,
        "of": stats.count,
        "first": [list(index) for index in first],
    }


CHECKS = (
    Check(Dimension.NUMERICS, "NaN in every tensor", _nan, has_statistics),
    Check(Dimension.NUMERICS, "infinities in every tensor", _inf, has_statistics),
    Check(Dimension.NUMERICS, "values beyond fp16's range", _fp16_overflow, has_statistics),
    Check(Dimension.NUMERICS, "subnormal values", _denormal, has_statistics),
)
