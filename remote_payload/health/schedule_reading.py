"""Which learning-rate schedule a file describes: by its config, or by its scheduler's own state. Pure.

Nothing is made up: a setting that a schedule needs and that is not in the file is named in `missing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Optional

from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.health.run_config import RunConfig, as_number, run_config
from remote_payload.health.schedules import (
    RateAt,
    Schedule,
    chained_cosine,
    constant,
    cosine,
    exponential,
    linear,
    multistep,
    one_cycle,
    phased,
    polynomial,
    stepped,
    warmed_up,
)

_DEFAULT_WARMUP_START = 0.01
"""Part of the peak at which warm-ups usually start; rates inside a warm-up are only judged where the file says more."""


@dataclasses.dataclass(frozen=True)
class ScheduleReading:
    """Every schedule that the settings may mean, or why there is none. `kind` is the schedule's name in the file."""

    kind: str
    schedules: tuple[Schedule, ...]
    missing: str = ""
    plateau: Optional[PlateauSettings] = None


@dataclasses.dataclass(frozen=True)
class PlateauSettings:
    """What reducing on a plateau leaves in the file: by which factor, from where, down to where."""

    factor: float
    peak: float
    floor: float


def read_config_schedule(header: CheckpointHeader, batches_per_epoch: Optional[float]) -> ScheduleReading:
    """The schedule that the config names. Settings in epochs need `batches_per_epoch` to become batches."""
    config = run_config(header)
    kind = config.scheduler()
    if not kind:
        return ScheduleReading("", (), "the config names no schedule")
    peak = _peak(header, config)
    if peak is None:
        return ScheduleReading(kind, (), "the config has no learning rate")
    if "plateau" in kind:
        factor = _factor(config.number("gamma"))
        if factor is None:
            return ScheduleReading(kind, (), "the config has no factor for its plateau schedule")
        return ScheduleReading(kind, (), "", PlateauSettings(factor, peak, config.number("min_lr") or 0.0))
    schedules = tuple(_named(kind, config, peak, batches_per_epoch))
    return ScheduleReading(kind, schedules, "" if schedules else _what_is_missing(kind))


def read_scheduler_state(header: CheckpointHeader) -> tuple[Optional[int], Optional[float], Optional[Schedule]]:
    """The scheduler's own count of steps, its last rate, and its curve by its own settings, each None if unknown."""
    state = _first_state(header.scheduler)
    if state is None:
        return None, None, None
    last = as_number(state.get("last_epoch"))
    rates = state.get("_last_lr")
    rate = as_number(rates[0]) if isinstance(rates, list) and rates else None
    bases = state.get("base_lrs")
    base = as_number(bases[0]) if isinstance(bases, list) and bases else None
    curve = _phases_curve(header, state)
    if curve is None and base is not None:
        curve = _state_curve(state, base)
    schedule = None if curve is None else Schedule("the scheduler's own state", "step", curve)
    return None if last is None else int(last), rate, schedule


def _first_state(scheduler: Any) -> Optional[dict[str, Any]]:
    if isinstance(scheduler, list):
        scheduler = next((s for s in scheduler if isinstance(s, dict)), None)
    return scheduler if isinstance(scheduler, dict) else None


def _state_curve(state: dict[str, Any], base: float) -> Optional[RateAt]:
    """Only schedules whose closed form is what torch computes, and which say all they need."""
    if state.get("_schedulers") is not None or "lr_lambdas" in state:
        return None
    numbers = {k: as_number(v) for k, v in state.items()}
    gamma, size, length = _factor(numbers.get("gamma")), numbers.get("step_size"), numbers.get("T_max")
    if length is not None and "T_0" not in state:
        # Behind T_max torch's cosine rises again; nobody means it to, and the closed form here does not.
        step = numbers.get("last_epoch") or 0.0
        return cosine(base, numbers.get("eta_min") or 0.0, length) if step <= length else None
    if gamma is not None and size is not None:
        return stepped(base, gamma, size)
    if gamma is not None and isinstance(state.get("milestones"), dict):
        milestones = tuple(sorted(float(m) for m in state["milestones"] if m.isdecimal()))
        return multistep(base, gamma, milestones) if len(milestones) == len(state["milestones"]) else None
    if gamma is not None and not {"milestones", "step_size", "max_lrs", "base_momentums"} & set(state):
        return exponential(base, gamma)
    start, end, total = numbers.get("start_factor"), numbers.get("end_factor"), numbers.get("total_iters")
    if start is not None and end is not None and total is not None:
        return linear(base * start, base * end, total)
    return None


def _phases_curve(header: CheckpointHeader, state: dict[str, Any]) -> Optional[RateAt]:
    """torch's OneCycleLR keeps its phases in its state and the rates that they name in the parameter groups."""
    phases, groups = state.get("_schedule_phases"), header.optimizer.groups if header.optimizer else ()
    if not isinstance(phases, list) or not groups or state.get("_anneal_func_type") not in ("cos", "linear"):
        return None
    joints: list[tuple[float, float, float]] = []
    for phase in phases:
        named = phase if isinstance(phase, dict) else {}
        end = as_number(named.get("end_step"))
        rates = [as_number(groups[0].get(str(named.get(k)))) for k in ("start_lr", "end_lr")]
        if end is None or rates[0] is None or rates[1] is None:
            return None
        joints.append((end, rates[0], rates[1]))
    return phased(tuple(joints), state["_anneal_func_type"] == "cos") if joints else None


def _peak(header: CheckpointHeader, config: RunConfig) -> Optional[float]:
    peak = config.number("lr")
    if peak is not None:
        return peak
    groups = header.optimizer.groups if header.optimizer else ()
    rates = [as_number(g.get("initial_lr")) for g in groups if isinstance(g, dict)]
    return max((r for r in rates if r is not None), default=None)


def _named(kind: str, config: RunConfig, peak: float, per_epoch: Optional[float]) -> Iterator[Schedule]:
    """Every reading of the settings: in batches where lengths are known in batches, and in epochs."""
    for unit, scale in (("batch", per_epoch), ("epoch", 1.0)):
        total = _total(config, unit, scale)
        warmup = _warmup(config, unit, scale, total)
        if warmup is None:
            continue
        start = config.number("start_lr")
        for name, curve, variant_warmup in _curves(kind, config, peak, total, warmup, start):
            judged_from = 0.0 if start is not None or not variant_warmup else variant_warmup
            yield Schedule(f"{kind}{name}, stepped every {unit}", unit, curve, judged_from)


def _curves(
    kind: str,
    config: RunConfig,
    peak: float,
    total: Optional[float],
    warmup: float,
    given_start: Optional[float],
) -> Iterator[tuple[str, RateAt, float]]:
    floor = config.number("min_lr") or 0.0
    start = given_start if given_start is not None else _DEFAULT_WARMUP_START * peak
    gamma = _factor(config.number("gamma"))
    after: list[tuple[str, RateAt]] = []
    if "onecycle" in kind:
        if total is not None:
            yield "", _config_one_cycle(config, peak, total), 0.0
        return
    if "cosine" in kind and total is not None:
        if warmup:
            yield ", taken over one step early", chained_cosine(start, peak, floor, warmup, total - warmup), warmup
        after.append(("", cosine(peak, floor, total - warmup)))
        if warmup:
            # The whole run as the cosine's length, with the warm-up laid over its beginning.
            yield " over the warm-up", cosine(peak, floor, total), warmup
            after.append((" of the run's length", cosine(peak, floor, total)))
    elif "linear" in kind and total is not None:
        after.append(("", linear(peak, floor, total - warmup)))
    elif "poly" in kind and total is not None:
        after.append(("", polynomial(peak, floor, total - warmup, _power(config))))
    elif "multistep" in kind and gamma is not None and config.milestones():
        after.append(("", multistep(peak, gamma, config.milestones())))
    elif "step" in kind and gamma is not None and config.number("step_size"):
        after.append(("", stepped(peak, gamma, config.number("step_size") or 1.0)))
    elif "exp" in kind and gamma is not None:
        after.append(("", exponential(peak, gamma)))
    elif "constant" in kind or kind in ("none", "fixed"):
        after.append(("", constant(peak)))
    for name, curve in after:
        yield name, warmed_up(start, peak, warmup, curve) if warmup else curve, warmup
        if warmup and ("step" in kind or "exp" in kind):
            yield f"{name} counted from the start", curve, warmup


def _config_one_cycle(config: RunConfig, peak: float, total: float) -> RateAt:
    return one_cycle(
        peak,
        total,
        config.number("warmup_ratio") or 0.3,
        max(1.0, config.number("div_factor") or 25.0),
        max(1.0, config.number("final_div_factor") or 1e4),
    )


def _factor(number: Optional[float]) -> Optional[float]:
    """A schedule's factor; growing ones are no schedule that anybody runs, and overflow."""
    return number if number is not None and 0 < number <= 1 else None


def _power(config: RunConfig) -> float:
    power = config.number("power") or 1.0
    return power if 0 < power <= 100 else 1.0


def _total(config: RunConfig, unit: str, scale: Optional[float]) -> Optional[float]:
    steps, epochs = config.number("steps"), config.number("epochs")
    if unit == "epoch":
        return epochs
    if steps is not None and steps > 0:
        return steps
    return None if epochs is None or scale is None else epochs * scale


def _warmup(config: RunConfig, unit: str, scale: Optional[float], total: Optional[float]) -> Optional[float]:
    """Its length in steps of `unit`, 0 without one, None if it cannot be told in them."""
    steps, epochs = config.number("warmup_steps"), config.number("warmup_epochs")
    ratio = config.number("warmup_ratio")
    if steps:
        return steps if unit == "batch" else None
    if epochs:
        return None if scale is None else epochs * scale
    if ratio:
        return None if total is None else ratio * total
    return 0.0


def _what_is_missing(kind: str) -> str:
    needs = (
        ("multistep", "milestones and a factor"),
        ("step", "a step size and a factor"),
        ("exp", "a factor"),
    )
    for mark, what in needs:
        if mark in kind:
            return f"the config lacks {what} for its schedule"
    if any(mark in kind for mark in ("cosine", "linear", "poly", "onecycle")):
        return "the config does not say how long its schedule is, or the batches of an epoch are unknown"
    return "the config's schedule is none that can be replayed"
