"""Updates that a 16-bit type rounds away: of weights, of Adam's second moment, of an average of the weights."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, Optional

from remote_payload.checkpoint.header import CheckpointHeader, Role, Section, TensorEntry
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.health.frozen import HALF_STEP_BELOW_ONE, moments
from remote_payload.health.run_config import as_number, run_config
from remote_payload.health.stats import JointStats
from remote_payload.health.training_record import training_record
from remote_payload.wire.results import Dimension, Finding, Severity

_16_BIT = ("bfloat16", "float16")
_MIN_EXTREMES = 16
"""As many values that are all exact in bfloat16 are no chance: each has one in 65,536."""
_MOST_STEPS = 0.5


def _only_type(tensors: list[TensorEntry]) -> Optional[str]:
    found = {t.dtype for t in tensors}
    return found.pop() if len(found) == 1 else None


def _pure_16_bit(header: CheckpointHeader) -> Optional[str]:
    """The type, if weights and moments share one of 16 bits: then no float32 copy of the weights is kept with them."""
    weights = [t for t in header.model_tensors() if t.role in (Role.WEIGHT_MATRIX, Role.NORM_SCALE)]
    dtype = _only_type(weights)
    if dtype not in _16_BIT or _only_type(moments(header, Role.FIRST_MOMENT)) != dtype:
        return None
    return dtype


def _exact_in_bfloat16(facts: HealthFacts, *roles: Role) -> tuple[int, int]:
    """Of the extremes of these tensors, how many bfloat16 holds exactly, and how many there are; 0 and 1 left out."""
    extremes = [
        value
        for _, stats in facts.measured(*roles, section=Section.MODEL)
        for value in (stats.minimum, stats.maximum)
        if value is not None and value not in (0.0, 1.0)
    ]
    return sum(1 for v in extremes if is_exact_in_bfloat16(v)), len(extremes)


def is_exact_in_bfloat16(value: float) -> bool:
    """Whether a number is a bfloat16: a float32 whose lower half is 0."""
    try:
        data = struct.pack(">f", value)
    except OverflowError:
        return False
    return bool(struct.unpack(">f", data)[0] == value) and data[2:] == b"\0\0"


def _update_below_ulp(facts: HealthFacts) -> Iterator[Finding]:
    header = facts.header
    dtype = _pure_16_bit(header)
    widened = dtype is None and _was_widened(facts)
    if widened:
        dtype = "bfloat16"
    rate = training_record(header).peak_learning_rate
    if dtype is None or rate is None or rate >= HALF_STEP_BELOW_ONE[dtype]:
        return
    half = HALF_STEP_BELOW_ONE[dtype]
    scales = list(facts.measured(Role.NORM_SCALE, section=Section.MODEL))
    stuck = [t for t, s in scales if s.count >= 16 and s.one_fraction is not None and s.one_fraction >= 0.5]
    joints = [j for j in facts.scan.joint.values() if j.steps_measured and not widened]
    lost, lost_at_peak = _lost(joints, "step_rounded_fraction"), _lost(joints, "step_rounded_fraction_at_peak")
    exact, extremes = _exact_in_bfloat16(facts, Role.RUNNING_VAR)
    severe = bool(stuck) or (lost_at_peak or 0.0) >= _MOST_STEPS
    lost_words = f" {lost:.0%} of all steps are rounded away at the stored learning rate." if lost is not None else ""
    yield Finding(
        id="precision.update_below_ulp",
        severity=Severity.ERROR if severe else Severity.WARNING,
        title=f"Trained in {dtype} without float32 master weights: steps of {rate:.3g} cannot move a weight at 1.0",
        dimension=Dimension.NUMERICS,
        where=tuple(t.name[:200] for t in stuck[:50]) or ("optimizer",),
        evidence={
            "dtype": dtype,
            "stored_as_float32": widened,
            "largest_learning_rate": rate,
            "half_step_at_one": half,
            "half_step_at_one_upwards": 2 * half,
            "scales_still_at_one": len(stuck),
            "scales": len(scales),
            "steps_rounded_fraction": lost,
            "steps_rounded_fraction_at_peak": lost_at_peak,
            "most_rounded": _most_rounded(joints),
            "running_variances_exact_in_bfloat16": exact,
            "running_variances_looked_at": extremes,
        },
        explanation=f"Weights and moments are all {dtype}, so each update is rounded to it. Adam's steps are about "
        f"as large as the learning rate; a value at 1.0 moves down only by steps over {half:.3g} and up only by steps "
        f"over {2 * half:.3g}. Large weights stand still while small ones move.{lost_words}"
        + (" The running variances hold no digit that bfloat16 lacks." if exact == extremes > 0 else ""),
        confidence=0.95 if severe else 0.7,
        refuted_by="float32 master weights that were kept elsewhere and cast on saving, moments included; or "
        "stochastic rounding.",
        action="Train with autocast over float32 weights, or with an optimizer that keeps master weights.",
    )


def _was_widened(facts: HealthFacts) -> bool:
    """Stored as float32, but without one digit that bfloat16 does not have: in weights and in running variances."""
    for role in (Role.WEIGHT_MATRIX, Role.RUNNING_VAR):
        if any(t.dtype != "float32" for t, _ in facts.measured(role, section=Section.MODEL)):
            return False
        exact, looked_at = _exact_in_bfloat16(facts, role)
        if looked_at < _MIN_EXTREMES or exact < looked_at:
            return False
    return True


def _lost(joints: Iterable[JointStats], name: str) -> Optional[float]:
    """The part of all predicted steps that is rounded away, over all parameters."""
    pairs = [(j.steps_measured, getattr(j, name)) for j in joints]
    known = [(n, f) for n, f in pairs if f is not None]
    total = sum(n for n, _ in known)
    return sum(n * f for n, f in known) / total if total else None


def _most_rounded(joints: list[JointStats]) -> list[dict[str, Any]]:
    ranked = sorted(joints, key=lambda j: -(j.step_rounded_fraction_at_peak or 0.0))[:10]
    return [
        {
            "parameter": j.parameter[:200],
            "steps_rounded_fraction": j.step_rounded_fraction,
            "steps_rounded_fraction_at_peak": j.step_rounded_fraction_at_peak,
            "of": j.steps_measured,
        }
        for j in ranked
    ]


def _second_moment_stalled(facts: HealthFacts) -> Iterator[Finding]:
    header = facts.header
    held = moments(header, Role.SECOND_MOMENT)
    dtype = _only_type(held)
    decay = _beta2(header)
    if dtype not in _16_BIT or decay is None or not 0 < 1 - decay < HALF_STEP_BELOW_ONE[dtype]:
        return
    measured = [(j.count, j.v_decay_stalled_fraction) for j in facts.scan.joint.values()]
    known = [(n, f) for n, f in measured if f is not None]
    total = sum(n for n, _ in known)
    stalled = sum(n * f for n, f in known) / total if total else None
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
            "half_step_relative": HALF_STEP_BELOW_ONE[dtype],
            "tensors": len(held),
            "stalled_fraction": stalled,
        },
        explanation="One step takes a part 1 - beta2 off the second moment. That is less than half a step of the "
        "type for every normal number, so it is rounded away: large gradients are remembered for ever and learning "
        "slows down.",
        confidence=0.95,
        refuted_by="Moments that were kept in float32 and cast on saving; or stochastic rounding.",
        action="Keep the optimizer's state in float32.",
    )


def _beta2(header: CheckpointHeader) -> Optional[float]:
    for group in (g for o in header.optimizers for g in o.groups):
        betas = group.get("betas") if isinstance(group, dict) else None
        if isinstance(betas, list) and len(betas) == 2:
            return as_number(betas[1])
    return None


def _averages(header: CheckpointHeader) -> list[TensorEntry]:
    kept = (Role.WEIGHT_MATRIX, Role.EMBEDDING, Role.NORM_SCALE, Role.NORM_SHIFT, Role.BIAS)
    return [t for t in header.tensors if t.section is Section.AVERAGE and t.role in kept]


def _ema_decay(header: CheckpointHeader) -> Optional[float]:
    """The average's decay: from the config, or beside the average itself."""
    decay = run_config(header).number("ema_decay")
    if decay is None:
        named = {k.lower(): as_number(v) for k, v in header.scalars.items()}
        decay = next((v for k, v in named.items() if v is not None and "ema" in k and "decay" in k), None)
    return decay if decay is not None and 0 < decay < 1 else None


def _ema_stalled(facts: HealthFacts) -> Iterator[Finding]:
    header = facts.header
    held = _averages(header)
    dtype, decay = _only_type(held), _ema_decay(header)
    if dtype not in _16_BIT or decay is None or 1 - decay >= HALF_STEP_BELOW_ONE[dtype]:
        return
    at_one = [
        t
        for t, s in facts.measured(Role.NORM_SCALE, section=Section.AVERAGE)
        if s.count >= 16 and (s.one_fraction or 0.0) >= 0.5
    ]
    yield Finding(
        id="precision.ema_stalled",
        severity=Severity.ERROR,
        title=f"The average of the weights is {dtype} and cannot follow them at decay {decay:g}",
        dimension=Dimension.NUMERICS,
        where=tuple(t.name[:200] for t in held[:50]),
        evidence={
            "dtype": dtype,
            "decay": decay,
            "part_taken_a_step": 1 - decay,
            "half_step_relative": HALF_STEP_BELOW_ONE[dtype],
            "tensors": len(held),
            "scales_still_at_one": len(at_one),
        },
        explanation="Each step moves the average by the part 1 - decay of its distance to the weights. Where a weight "
        "changed by less than its own size, that is under half a step of the type, so the average stays where it "
        "began.",
        confidence=0.9,
        refuted_by="An average that was kept in float32 and cast on saving.",
        action="Keep the average in float32.",
    )


CHECKS = (
    Check(
        Dimension.NUMERICS,
        "updates against the weights' type",
        _update_below_ulp,
        lambda facts: facts.header.optimizer is not None,
        can_pass=False,
        why_not=lambda _: "the file holds no optimizer",
    ),
    Check(
        Dimension.NUMERICS,
        "the second moment's decay against its type",
        _second_moment_stalled,
        lambda facts: _beta2(facts.header) is not None,
        can_pass=False,
    ),
    Check(
        Dimension.NUMERICS,
        "the averaged weights' decay against their type",
        _ema_stalled,
        lambda facts: bool(_averages(facts.header)) and _ema_decay(facts.header) is not None,
        can_pass=False,
        why_not=lambda facts: "the file gives no decay for its averaged weights" if _averages(facts.header) else "",
    ),
)
