"""Learning-rate schedules replayed from a config."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up to `peak`, then a half cosine down to `floor` at `total` steps."""

    peak: float
    floor: float
    warmup: float
    total: float

    def at(self, step: float) -> float:
        """The learning rate after `step` steps, in closed form; past the warm-up only, where it starts is not known."""
        progress = (step - self.warmup) / max(1.0, self.total - self.warmup)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2

    def is_near(self, rate: float, step: float, slack: float) -> bool:
        """Whether `rate` is that of some step within `slack` of `step`.

        torch chains its cosine step by step, which drifts from the closed form by a few steps' worth.
        """
        low, high = self.at(step + slack), self.at(step - slack)
        return low * (1 - 1e-3) - 1e-12 <= rate <= high * (1 + 1e-3) + 1e-12
