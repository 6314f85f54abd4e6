"""Learning-rate schedules as functions of the step. Pure; formulas as in torch.optim.lr_scheduler and transformers."""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Callable

RateAt = Callable[[float], float]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate by step. `unit` is what a step is: `batch` or `epoch`.

    `judged_from` is the first step at which it says something: before it a warm-up starts from an unknown rate.
    """

    name: str
    unit: str
    rate_at: RateAt
    judged_from: float = 0.0

    def is_near(self, rate: float, step: float, slack: float) -> bool:
        """Whether `rate` is among the rates within `slack` steps of `step`, rounding allowed for."""
        low, high = self.between(step, slack)
        return low * (1 - 1e-3) - 1e-12 <= rate <= high * (1 + 1e-3) + 1e-12

    def between(self, step: float, slack: float) -> tuple[float, float]:
        """The least and the greatest rate within `slack` steps of `step`."""
        tried = [max(0.0, step + slack * k / 10) for k in range(-10, 11)]
        rates = [self.rate_at(s) for s in tried]
        return min(rates), max(rates)


def cosine(peak: float, floor: float, length: float) -> RateAt:
    """Half a cosine from `peak` to `floor` over `length` steps, and the floor from there on."""

    def rate(step: float) -> float:
        progress = min(1.0, max(0.0, step / max(1.0, length)))
        return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2

    return rate


def linear(peak: float, floor: float, length: float) -> RateAt:
    """A straight line from `peak` to `floor` over `length` steps."""
    return polynomial(peak, floor, length, 1.0)


def polynomial(peak: float, floor: float, length: float, power: float) -> RateAt:
    """(1 - step / length) ** power between `peak` and `floor`."""

    def rate(step: float) -> float:
        left = 1 - min(1.0, max(0.0, step / max(1.0, length)))
        return floor + (peak - floor) * float(left**power)

    return rate


def constant(peak: float) -> RateAt:
    return lambda _: peak


def stepped(peak: float, gamma: float, size: float) -> RateAt:
    """`gamma` at every multiple of `size`."""
    return lambda step: float(peak * gamma ** math.floor(step / max(1.0, size)))


def multistep(peak: float, gamma: float, milestones: tuple[float, ...]) -> RateAt:
    """`gamma` at every milestone."""
    return lambda step: float(peak * gamma ** bisect.bisect_right(milestones, step))


def exponential(peak: float, gamma: float) -> RateAt:
    return lambda step: float(peak * gamma**step)


def one_cycle(
    peak: float, total: float, rise: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> RateAt:
    """torch's OneCycleLR with its two cosine phases: up for the part `rise`, then down (Smith and Topin 2017)."""
    first = peak / div_factor
    return phased(((rise * total - 1, first, peak), (total - 1, peak, first / final_div_factor)), True)


def phased(phases: tuple[tuple[float, float, float], ...], by_cosine: bool) -> RateAt:
    """Phases in a row, each with its last step and the rates at its two ends."""

    def rate(step: float) -> float:
        begin = 0.0
        for end, first, last in phases:
            if step <= end or (end, first, last) == phases[-1]:
                progress = min(1.0, max(0.0, (step - begin) / max(1e-9, end - begin)))
                part = (1 - math.cos(math.pi * progress)) / 2 if by_cosine else progress
                return first + (last - first) * part
            begin = end
        return phases[-1][2]

    return rate


def warmed_up(start: float, peak: float, warmup: float, after: RateAt) -> RateAt:
    """A straight rise from `start` to `peak` over `warmup` steps, then `after`, counted from there."""

    def rate(step: float) -> float:
        return start + (peak - start) * step / warmup if step < warmup else after(step - warmup)

    return rate


def chained_cosine(start: float, peak: float, floor: float, warmup: float, length: float) -> RateAt:
    """A cosine that takes over one step before the warm-up has reached its peak.

    torch's cosine works from the rate that it finds, so the step that the warm-up lacks is lacking for good: the curve
    ends up a little lower than the closed form, and one step earlier.
    """
    handover = max(0.0, warmup - 1)
    reached = start + (peak - start) * handover / max(1.0, warmup)
    falling = cosine(reached, floor, length)
    return lambda step: (
        start + (peak - start) * step / max(1.0, warmup) if step < handover else falling(step - handover)
    )


def is_power_of(factor: float, ratio: float, tolerance: float = 1e-3) -> bool:
    """Whether `ratio` is `factor` to a whole power of 0 or more: what reducing on a plateau leaves."""
    if not 0 < ratio < math.inf or not 0 < factor < 1:
        return False
    times = math.log(ratio) / math.log(factor)
    return times > -tolerance and abs(times - round(times)) <= tolerance * max(1.0, times)
