"""Evaluating new checkpoints by themselves: targets, the tick that visits them, and its place in a scheduler."""

from orchestrator.nightly.install import (
    InstallPlan,
    Scheduler,
    apply_plan,
    find_scheduler,
    nightly_command,
    plan_install,
    plan_uninstall,
)
from orchestrator.nightly.targets import NightlyFile, Target, is_pattern, load_targets, newest_match
from orchestrator.nightly.tick import NightlySummary, TargetOutcome, TargetResult, tick

__all__ = [
    "InstallPlan",
    "NightlyFile",
    "NightlySummary",
    "Scheduler",
    "Target",
    "TargetOutcome",
    "TargetResult",
    "apply_plan",
    "find_scheduler",
    "is_pattern",
    "load_targets",
    "newest_match",
    "nightly_command",
    "plan_install",
    "plan_uninstall",
    "tick",
]
