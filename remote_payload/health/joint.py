"""A parameter and Adam's two moments of it together: which belong to each other, and what they come to. Needs numpy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from remote_payload.checkpoint.header import CheckpointHeader, OptimizerFacts, TensorEntry
from remote_payload.checkpoint.tensor_bytes import pieces_are_row_ranges
from remote_payload.health.distribution import Array, Distribution
from remote_payload.health.run_config import as_number
from remote_payload.health.stats import AdamSettings, JointStats, Misalignment
from remote_payload.health.training_record import training_record

MASTER_KEYS = ("master_param", "master_params", "master_weight")
"""What optimizers call the float32 weights that they keep beside the moments."""
JOINT_TYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Trio:
    """Names of a parameter and its moments in the header, and what Adam's next step is made with."""

    parameter: str
    first_moment: str
    second_moment: str
    settings: AdamSettings
    master: Optional[str] = None
    """The float32 weights that the optimizer keeps and steps, where the model's own are a copy of them in 16 bits."""

    @property
    def names(self) -> tuple[str, str, str]:
        return self.master or self.parameter, self.first_moment, self.second_moment


@dataclasses.dataclass(frozen=True)
class StepConstants:
    """Adam's numbers as its arithmetic uses them, each a float32: `step = m * rate / (sqrt(v) * root + eps)`."""

    rate: float
    rate_at_peak: float
    root: float
    eps: float


@dataclasses.dataclass
class JointPart:
    """Counts over elements that were read together; see `JointStats`."""

    measured: int = 0
    rounded: int = 0
    rounded_at_peak: int = 0
    ones: int = 0
    ones_rounded: int = 0
    ones_rounded_at_peak: int = 0
    zeros_with_gradient: int = 0

    def add(self, other: JointPart) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@functools.lru_cache(maxsize=1024)
def step_constants(settings: AdamSettings) -> StepConstants:
    """Bias corrections folded in: m_hat and sqrt(v_hat) are never formed."""

    def narrow(value: float) -> float:
        return float(np.float32(value))

    c1, c2 = settings.correction1, settings.correction2
    return StepConstants(
        narrow(settings.learning_rate / c1),
        narrow(settings.peak_learning_rate / c1),
        narrow(1.0 / np.sqrt(c2)),
        narrow(settings.eps),
    )


def find_trios(header: CheckpointHeader) -> tuple[list[Trio], dict[str, str], tuple[Misalignment, ...]]:
    """Every parameter whose moments are in the file, why some cannot be read together, and shapes that disagree."""
    tensors = {t.name: t for t in header.tensors}
    peak = training_record(header).peak_learning_rate
    trios: list[Trio] = []
    reasons: dict[str, str] = {}
    misaligned: list[Misalignment] = []
    for optimizer, index, name in ((o, i, n) for o in header.optimizers for i, n in o.parameters.items()):
        place = f"{optimizer.path}/state/{index}" if optimizer.path else f"state/{index}"
        moments = [tensors.get(f"{place}/{k}") for k in ("exp_avg", "exp_avg_sq")]
        master = next((tensors[m] for m in (f"{place}/{k}" for k in MASTER_KEYS) if m in tensors), None)
        parameter = master or tensors.get(name)
        first, second = moments
        if parameter is None or first is None or second is None:
            continue
        wrong = [m for m in (first, second) if m.shape != parameter.shape]
        misaligned.extend(Misalignment(name, m.name, parameter.shape, m.shape) for m in wrong)
        settings = _settings(optimizer, index, tensors.get(f"{place}/step"), peak)
        reason = "a moment's shape is not the parameter's" if wrong else _unfit(parameter, first, second, settings)
        if reason is None and settings is not None:
            trios.append(Trio(name, first.name, second.name, settings, master.name if master else None))
        else:
            reasons[name] = reason or "the optimizer's numbers are incomplete"
    return trios, reasons, tuple(misaligned)


def _unfit(
    parameter: TensorEntry, first: TensorEntry, second: TensorEntry, settings: Optional[AdamSettings]
) -> Optional[str]:
    three = (parameter, first, second)
    if settings is None:
        return "the file does not give the optimizer's learning rate, betas and eps"
    if any(t.dtype not in JOINT_TYPES for t in three):
        return "a type that is not read together: " + ", ".join(t.dtype for t in three)
    if any(not pieces_are_row_ranges(t) for t in three if t.pieces) and len({_cut(t) for t in three}) > 1:
        return "its pieces are not cut as those of its moments are"
    if any(t.stride != parameter.stride for t in three):
        return "the moments lie in another order than the parameter"
    return None


def _cut(tensor: TensorEntry) -> tuple[Any, ...]:
    return tuple((p.offsets, p.shape, p.stride) for p in tensor.pieces)


def _settings(
    optimizer: OptimizerFacts, index: str, step: Optional[TensorEntry], peak: Optional[float]
) -> Optional[AdamSettings]:
    if not optimizer.groups:
        return None
    number = optimizer.parameter_groups.get(index, 0)
    group = optimizer.groups[number] if number < len(optimizer.groups) else optimizer.groups[0]
    betas = group.get("betas")
    numbers = [as_number(b) for b in betas] if isinstance(betas, list) and len(betas) == 2 else [None, None]
    rate, eps = as_number(group.get("lr")), as_number(group.get("eps"))
    first, second = numbers
    if rate is None or eps is None or first is None or second is None or not 0 <= first < 1 or not 0 <= second < 1:
        return None
    taken = as_number(step.value) if step is not None else None
    if taken is None and len(optimizer.steps) == 1:
        taken = as_number(optimizer.steps[0])
    return AdamSettings(
        learning_rate=rate,
        peak_learning_rate=max(rate, peak or 0.0),
        beta1=first,
        beta2=second,
        eps=eps,
        step=taken if taken and taken > 0 else None,
    )


def finish_joint(
    trio: Trio, count: int, part: JointPart, spreads: Sequence[Distribution], v_nan: int, v_type: str
) -> JointStats:
    """Add what the three's own distributions of finite elements (w, m, v) say to the counts."""
    weight, first, second = spreads
    settings = trio.settings
    positive = second.where(second.values > 0)
    valid = second.where(second.values >= 0)
    roots = valid.quantiles()
    root_v = None if roots is None else tuple(float(np.sqrt(q / settings.correction2)) for q in roots)
    below = np.sqrt(positive.values / settings.correction2) < settings.eps
    return JointStats(
        parameter=trio.parameter,
        first_moment=trio.first_moment,
        second_moment=trio.second_moment,
        count=count,
        settings=settings,
        v_zero_fraction=_part_of(_at_zero(second), count),
        v_negative=int(second.counts[second.values < 0].sum()),
        v_nan=v_nan,
        m_zero_fraction=_part_of(_at_zero(first), count),
        root_v_quantiles=root_v,
        eps_ratio_quantiles=tuple(q / settings.eps for q in root_v) if root_v and settings.eps > 0 else None,
        v_below_eps_fraction=positive.fraction(below),
        v_decay_stalled_fraction=decay_stalled(positive, v_type, settings.beta2),
        w_zero_fraction=_part_of(_at_zero(weight), count),
        w_one_fraction=_part_of(int(weight.counts[weight.values == 1].sum()), count),
        steps_measured=part.measured,
        step_rounded_fraction=_part(part.rounded, part.measured),
        step_rounded_fraction_at_peak=_part(part.rounded_at_peak, part.measured),
        ones_with_step=part.ones,
        ones_rounded_fraction=_part(part.ones_rounded, part.ones),
        ones_rounded_fraction_at_peak=_part(part.ones_rounded_at_peak, part.ones),
        zeros_with_gradient=part.zeros_with_gradient,
    )


def decay_stalled(positive: Distribution, dtype: str, beta2: float) -> Optional[float]:
    """The part of the positive elements that `v *= beta2` in their own type leaves as they are."""
    values = positive.values.astype(np.float32)
    decayed = values * np.float32(beta2)
    return positive.fraction(_rounded(decayed, dtype) == values)


def _rounded(values: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values


def _at_zero(spread: Distribution) -> int:
    return int(spread.counts[spread.values == 0].sum())


def _part(some: int, of: int) -> Optional[float]:
    return some / of if of else None


def _part_of(some: int, of: int) -> float:
    return some / of if of else 0.0


def reduce_joint(w: Any, m: Any, v: Any, constants: StepConstants) -> JointPart:
    """Counts over torch tensors on the CPU in the types in which they are stored; in parts that stay in the cache."""
    import torch

    total = JointPart()
    step = 1 << 16
    for at in range(0, w.numel(), step):
        stored = w[at : at + step]
        wide, first, second = (t[at : at + step].to(torch.float32) for t in (w, m, v))
        root = second.sqrt().mul_(constants.root).add_(constants.eps)
        update = (first * constants.rate).div_(root)
        # Nought times it is 0 for what is finite alone; torch.isfinite takes many times as long. A negative v has a
        # NaN for its root, an infinite one a step of 0.
        valid = ((wide * 0).add_(update * 0) == 0).logical_and_(update != 0)
        stays = ((wide - update).to(stored.dtype) == stored).logical_and_(valid)
        stays_at_peak = stays
        if constants.rate_at_peak != constants.rate:
            at_peak = (first * constants.rate_at_peak).div_(root)
            stays_at_peak = ((wide - at_peak).to(stored.dtype) == stored).logical_and_(valid)
        ones, zeros = (wide == 1).logical_and_(valid), wide == 0
        part = JointPart(_number(valid), _number(stays), _number(stays_at_peak), _number(ones))
        if part.ones:
            part.ones_rounded, part.ones_rounded_at_peak = _number(ones & stays), _number(ones & stays_at_peak)
        if zeros.any():
            part.zeros_with_gradient = _number(zeros & (second > 0))
        total.add(part)
    return total


def _number(mask: Any) -> int:
    return int(mask.sum())
