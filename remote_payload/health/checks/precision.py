"""Updates that a 16-bit type rounds away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

from remote_payload.checkpoint.header import CheckpointHeader, Role, Section, TensorEntry
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.health.training_record import as_number, training_record
from remote_payload.wire.results import Dimension, Finding, Severity

_HALF_STEP_AT_ONE = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
"""Half the distance from 1.0 to the next smaller number: a smaller update of a 1.0 is rounded away."""
_HALF_STEP_RELATIVE = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
"""The least relative change that any normal number can show: half a step right below a power of two."""


def _moments(header: CheckpointHeader, role: Role) -> list[TensorEntry]:
    return [t for t in header.tensors if t.role is role and t.section is Section.OPTIMIZER and t.numel > 1]


def _only_type(tensors: list[TensorEntry]) -> Optional[str]:
    found = {t.dtype for t in tensors}
    return found.pop() if len(found) == 1 else None


def _pure_16_bit(header: CheckpointHeader) -> Optional[str]:
    """The type, if weights and moments share one of 16 bits: then no float32 copy of the weights is kept with them."""
    weights = [t for t in header.model_tensors() if t.role in (Role.WEIGHT_MATRIX, Role.NORM_SCALE)]
    dtype = _only_type(weights)
    if dtype not in _HALF_STEP_AT_ONE or _only_type(_moments(header, Role.FIRST_MOMENT)) != dtype:
        return None
    return dtype


def _update_below_ulp(facts: HealthFacts) -> Iterator[Finding]:
    header = facts.header
    dtype = _pure_16_bit(header)
    rate = training_record(header).peak_learning_rate
    if dtype is None or rate is None or rate >= _HALF_STEP_AT_ONE[dtype]:
        return
    scales = list(facts.measured(Role.NORM_SCALE, section=Section.MODEL))
    stuck = [t for t, s in scales if s.count >= 16 and s.one_fraction is not None and s.one_fraction >= 0.5]
    yield Finding(
        id="precision.update_below_ulp",
        severity=Severity.ERROR if stuck else Severity.WARNING,
        title=f"Trained in {dtype} without float32 master weights: steps of {rate:.3g} cannot move a weight at 1.0",
        dimension=Dimension.NUMERICS,
        where=tuple(t.name[:200] for t in stuck[:50]) or ("optimizer",),
        evidence={
            "dtype": dtype,
            "largest_learning_rate": rate,
            "half_step_at_one": _HALF_STEP_AT_ONE[dtype],
            "scales_still_at_one": len(stuck),
            "scales": len(scales),
        },
        explanation=f"Weights and moments are all {dtype}, so each update is rounded to it. Adam's steps are about "
        "as large "
        f"as the learning rate; a value at 1.0 moves only by steps above {_HALF_STEP_AT_ONE[dtype]:.3g}. Large "
        "weights stand still while small ones move.",
        confidence=0.95 if stuck else 0.7,
        refuted_by="float32 master weights that were kept elsewhere and cast on saving, moments included; or "
        "stochastic rounding.",
        action="Train with autocast over float32 weights, or with an optimizer that keeps master weights.",
    )


def _second_moment_stalled(facts: HealthFacts) -> Iterator[Finding]:
    header = facts.header
    dtype = _only_type(_moments(header, Role.SECOND_MOMENT))
    decay = _beta2(header)
    if dtype not in _HALF_STEP_RELATIVE or decay is None or not 0 < 1 - decay < _HALF_STEP_RELATIVE[dtype]:
        return
    yield Finding(
        id="precision.second_moment_stalled",
        severity=Severity.ERROR,
        title=f"Adam's second moment is {dtype} and can only grow at beta2 = {decay:g}",
        dimension=Dimension.NUMERICS,
        where=("optimizer",),
        evidence={
            "dtype": dtype,
            "beta2": decay,
            "relative_decay": 1 - decay,
            "half_step_relative": _HALF_STEP_RELATIVE[dtype],
            "tensors": len(_moments(header, Role.SECOND_MOMENT)),
        },
        explanation="One step takes a part 1 - beta2 off the second moment. That is less than half a step of the "
        "type for every normal number, so it is rounded away: large gradients are remembered for ever and learning "
        "slows down.",
        confidence=0.95,
        refuted_by="Moments that were kept in float32 and cast on saving; or stochastic rounding.",
        action="Keep the optimizer's state in float32.",
    )


def _beta2(header: CheckpointHeader) -> Optional[float]:
    for group in header.optimizer.groups if header.optimizer else ():
        betas = group.get("betas") if isinstance(group, dict) else None
        if isinstance(betas, list) and len(betas) == 2:
            return as_number(betas[1])
    return None


CHECKS = (
    Check(
        Dimension.NUMERICS,
        "updates against the weights' type",
        _update_below_ulp,
        lambda facts: facts.header.optimizer is not None,
        can_pass=False,
    ),
    Check(
        Dimension.NUMERICS,
        "the second moment's decay against its type",
        _second_moment_stalled,
        lambda facts: _beta2(facts.header) is not None,
        can_pass=False,
    ),
)
