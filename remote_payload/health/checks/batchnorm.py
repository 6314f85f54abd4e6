"""Normalisation layers: scales that never moved, running statistics that cannot be, counters that disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from remote_payload.checkpoint.header import CheckpointHeader, Role, Section, TensorEntry
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.health.frozen import diagnose, is_frozen_by_design, summarise
from remote_payload.health.run_config import run_config
from remote_payload.health.stats import FP16_MAX, TensorStats
from remote_payload.health.training_record import training_record, usual_count
from remote_payload.wire.results import Dimension, Finding, Severity

_AT_INIT_FRACTION = 0.5
_TOO_FEW_SAMPLES = 2
_FEW_SAMPLES = 4
_MOMENTUM = 0.1
"""torch's default."""
_LARGE_FOR_FLOAT32 = (FP16_MAX / 30) ** 2
"""Activations reach 30 standard deviations, so that from here on autocast to fp16 overflows. Trained networks whose
hidden layers stay below it are known to be well in float32."""
_MIN_CHANNELS = 16
"""A handful of scales may well be exactly 1 by chance in a 16-bit type."""


def _gamma_at_init(facts: HealthFacts) -> Iterator[Finding]:
    scales = list(facts.measured(Role.NORM_SCALE, section=Section.MODEL))
    stuck = [
        (t, s)
        for t, s in scales
        if s.count >= _MIN_CHANNELS and s.one_fraction is not None and s.one_fraction >= _AT_INIT_FRACTION
    ]
    if not stuck:
        return
    trained = facts.steps_trained() > 0
    diagnoses = {t.name: diagnose(facts, t) for t, _ in stuck}
    innocent = all(is_frozen_by_design(facts, t, diagnoses[t.name]) for t, _ in stuck[:50])
    yield Finding(
        id="batchnorm.gamma_at_init",
        severity=Severity.WARNING if trained and not innocent else Severity.INFO,
        title=f"{len(stuck)} of {len(scales)} normalisation scales are still at their initial 1",
        dimension=Dimension.NUMERICS,
        where=tuple(t.name[:200] for t, _ in stuck[:50]),
        evidence={
            "steps_trained": training_record(facts.header).batches or facts.steps_trained(),
            "tensors": [
                {
                    "tensor": t.name[:200],
                    "dtype": t.dtype,
                    "fraction_at_one": s.one_fraction,
                    "of": s.count,
                    "cause": diagnoses[t.name].cause.value,
                    **diagnoses[t.name].evidence,
                }
                for t, s in stuck[:20]
            ],
            "scales": len(scales),
        },
        explanation="Scales start at exactly 1. That they are there still after training means that they got no "
        "gradient, are no part of the optimizer, or that every step was rounded away: leaving 1.0 takes a step "
        "over 2^-9 = 0.00195 down or 2^-8 = 0.0039 up in bfloat16, and Adam's steps are about as large as the "
        "learning rate. " + summarise(list(diagnoses.values())),
        confidence=0.95 if trained else 0.5,
        refuted_by="float32 master weights kept elsewhere in which these scales differ from 1.",
        action="Train with float32 master weights (autocast) instead of a 16-bit model, and check that the scales "
        "are in the optimizer.",
    )


def _running_var(facts: HealthFacts) -> Iterator[Finding]:
    variances = list(facts.measured(Role.RUNNING_VAR, section=Section.MODEL))
    bad = [(t, s) for t, s in variances if s.minimum is not None and s.minimum <= 0 and not _is_untouched(facts, t)]
    negative = [(t, s) for t, s in bad if s.minimum is not None and s.minimum < 0]
    if bad:
        yield Finding(
            id="batchnorm.running_var_nonpositive",
            severity=Severity.ERROR if negative else Severity.WARNING,
            title=f"{len(bad)} running variances are zero or negative",
            dimension=Dimension.NUMERICS,
            where=tuple(t.name[:200] for t, _ in bad[:50]),
            evidence={"tensors": [_range(t, s) for t, s in bad[:20]]},
            explanation="A negative variance gives NaN in the square root. A variance of exactly 0 means a channel "
            "whose input never varied: it is divided by the square root of eps, which magnifies any later input "
            "about 300 times.",
            confidence=0.9,
            refuted_by="Channels that are masked or pruned on purpose.",
            action="Look for dead inputs of these channels; recompute the running statistics on real data.",
        )
    large = [(t, s) for t, s in variances if s.maximum is not None and s.maximum > FP16_MAX]
    if large:
        harmless = _greatest(large) <= _LARGE_FOR_FLOAT32 and all(t.dtype in ("float32", "float64") for t, _ in large)
        yield Finding(
            id="batchnorm.running_var_large",
            severity=Severity.INFO if harmless else Severity.WARNING,
            title=f"{len(large)} running variances reach beyond {FP16_MAX:,.0f}, up to {_greatest(large):,.0f}",
            dimension=Dimension.NUMERICS,
            where=tuple(t.name[:200] for t, _ in large[:50]),
            evidence={"tensors": [_range(t, s) for t, s in large[:20]]},
            explanation="The layer's inputs have a standard deviation above 256: raw pixel or code values come in "
            "without normalisation, or activations have grown. fp16 cannot hold such a variance, bfloat16 holds it "
            "to three digits.",
            confidence=0.9,
            refuted_by="Inputs that are of that size by design.",
            action="Normalise the inputs; keep running statistics in float32.",
        )


def _greatest(found: list[tuple[TensorEntry, TensorStats]]) -> float:
    return max(s.maximum or 0.0 for _, s in found)


def _is_untouched(facts: HealthFacts, tensor: TensorEntry) -> bool:
    """The layer's own counter says that it never saw a batch."""
    counter = tensor.name[: -len("running_var")] + "num_batches_tracked"
    try:
        return bool(facts.header.tensor(counter).value == 0)
    except KeyError:
        return False


def _range(tensor: TensorEntry, stats: TensorStats) -> dict[str, object]:
    return {"tensor": tensor.name[:200], "minimum": stats.minimum, "maximum": stats.maximum, "of": stats.count}


def counters(header: CheckpointHeader) -> dict[str, int]:
    """Batches that each normalisation layer of the model has counted."""
    return {t.name: t.value for t in header.model_tensors() if t.role is Role.COUNTER and isinstance(t.value, int)}


def _counter_mismatch(facts: HealthFacts) -> Iterator[Finding]:
    counted = counters(facts.header)
    values = Counter(counted.values())
    if len(values) < 2:
        return
    usual = usual_count(counted.values()) or 0
    others = {n: v for n, v in counted.items() if v != usual}
    doubled = [n for n, v in others.items() if usual > 0 and v == 2 * usual]
    halved = [n for n, v in others.items() if v > 0 and usual == 2 * v]
    twice = doubled or halved
    yield Finding(
        id="batchnorm.counter_mismatch",
        severity=Severity.WARNING if twice else Severity.INFO,
        title=f"{len(others)} of {len(counted)} layers have counted other numbers of batches than the rest",
        dimension=Dimension.TRAINING_DYNAMICS,
        where=tuple(n[:200] for n in list(others)[:50]),
        evidence={
            "counts": {str(v): n for v, n in values.most_common(20)},
            "usual": usual,
            "twice": [n[:200] for n in (doubled or halved)[:20]],
            "effective_momentum": 1 - (1 - _MOMENTUM) ** 2 if twice else None,
        },
        explanation="Layers of one model see the same batches. Exactly twice as many means that the forward pass ran "
        "twice a step, as activation checkpointing does: running statistics then move at an effective momentum of "
        "1 - 0.9^2 = 0.19 instead of 0.1. Other numbers mean layers that were frozen, shared or added later.",
        confidence=0.9 if twice else 0.6,
        refuted_by="A layer that the model really calls twice a step.",
        action="Keep normalisation layers out of activation checkpointing, or freeze their statistics in its second "
        "pass.",
    )


def _samples_per_rank(facts: HealthFacts) -> Iterator[Finding]:
    batch = run_config(facts.header).number("batch_size")
    if batch is None or not 0 < batch <= _FEW_SAMPLES or _is_synchronised(facts.header):
        return
    yield Finding(
        id="batchnorm.samples_per_rank",
        severity=Severity.ERROR if batch <= _TOO_FEW_SAMPLES else Severity.WARNING,
        title=f"{facts.header.class_counts['batchnorm_layers']} BatchNorm layers were trained on {batch:g} samples "
        "at a time",
        dimension=Dimension.TRAINING_DYNAMICS,
        where=("config",),
        evidence={"batch_size": batch, "batchnorm_layers": facts.header.class_counts["batchnorm_layers"]},
        explanation="Without synchronisation a BatchNorm normalises by the samples on its own device. Two samples "
        "become plus and minus one whatever they were, so what is trained is not what is evaluated with running "
        "statistics.",
        confidence=0.85,
        refuted_by="Synchronised BatchNorm, or a layer that normalises over time or space as well.",
        action="Use SyncBatchNorm, a larger batch a device, or a normalisation that does not look across samples.",
    )


def _is_synchronised(header: CheckpointHeader) -> bool:
    return run_config(header).has_flag("sync", "b")


def _knows_batch_size(facts: HealthFacts) -> bool:
    has_layers = facts.header.class_counts["batchnorm_layers"] > 0
    return has_layers and run_config(facts.header).number("batch_size") is not None


CHECKS = (
    Check(
        Dimension.NUMERICS,
        "normalisation scales at their initial value",
        _gamma_at_init,
        lambda facts: any(True for _ in facts.measured(Role.NORM_SCALE, section=Section.MODEL)),
    ),
    Check(
        Dimension.NUMERICS,
        "running variances",
        _running_var,
        lambda facts: any(True for _ in facts.measured(Role.RUNNING_VAR, section=Section.MODEL)),
    ),
    Check(
        Dimension.TRAINING_DYNAMICS,
        "batch counters of normalisation layers",
        _counter_mismatch,
        lambda facts: len(counters(facts.header)) > 1,
        can_pass=False,
    ),
    Check(
        Dimension.TRAINING_DYNAMICS,
        "samples that BatchNorm saw at a time",
        _samples_per_rank,
        _knows_batch_size,
    ),
)
