"""Checks: pure functions from facts to findings, and the list of them all."""

from __future__ import annotations

from remote_payload.health.checks import (
    batchnorm,
    drift,
    integrity,
    lora,
    losses,
    optimizer,
    precision,
    provenance,
    schedule,
    structure,
    task,
    values,
    weights,
)
from remote_payload.health.checks.check import Check

ALL_CHECKS: tuple[Check, ...] = (
    *integrity.CHECKS,
    *structure.CHECKS,
    *provenance.CHECKS,
    *schedule.CHECKS,
    *values.CHECKS,
    *weights.CHECKS,
    *lora.CHECKS,
    *batchnorm.CHECKS,
    *precision.CHECKS,
    *optimizer.CHECKS,
    *losses.CHECKS,
    *drift.CHECKS,
    *task.CHECKS,
)
"""In the order of the report. A new family of checks is one module and one entry here."""

__all__ = ["ALL_CHECKS", "Check"]
